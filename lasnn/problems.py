"""What does not fit in a recipe, collected so that all of it can be said at once."""

import re
from collections.abc import Callable
from contextlib import contextmanager
from typing import TypeVar

from lasnn.errors import UserError
from lasnn.recipe.schema import Recipe

Made = TypeVar("Made")


class Problems:
    """The lines of a recipe's problems so far."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.lines: list[str] = []

    def report(self, key: str, message: str) -> None:
        """Add a line about a key."""
        line = self.recipe.line(key, message)
        # Two checks may come to the same fault.
        if line not in self.lines:
            self.lines.append(line)

    def attempt(self, key: str, make: Callable[[], Made], default: Made | None = None) -> Made | None:
        """What `make` returns; a failure is reported under the key, and `default` returned."""
        try:
            with _sizes_named():
                return make()
        except UserError as error:
            for problem in error.problems:
                self.report(key, problem)
            return default


@contextmanager
def _sizes_named():
    """Turn what PyTorch says of sizes that it cannot count, or that fit in no memory, into an error of the recipe's."""
    try:
        yield
    except MemoryError as error:
        raise UserError("its sizes fit in no memory") from error
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        if not re.search("overflow|too large|too big|can't allocate|invalid size|out of range", reason, re.IGNORECASE):
            raise
        raise UserError(f"its sizes are too large: {reason}") from error
