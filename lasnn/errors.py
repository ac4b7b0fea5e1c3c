"""The two kinds of failure that end a command in one line instead of a traceback, and how names are suggested."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """What the user gave cannot work (exit code 2). `problems` holds one line each; all are shown."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class MachineError(Exception):
    """The input is right but the work failed: a full or read-only disk, a training that diverged (exit code 1)."""


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The line for a name that is not known: the nearest right one and all the choices."""
    known = sorted(known)
    near = get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {kind} {name!r}{hint} known: {', '.join(known) or 'none'}"
