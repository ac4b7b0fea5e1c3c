"""Which changes of its recipe a run may be resumed with: those that leave its result what it would have been."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lasnn.errors import UserError, printable
from lasnn.recipe.load import toml_value
from lasnn.recipe.schema import DataTable, DistillTable, LossTable, Recipe, StartTable, StudentTable, TeacherTable

# How and where a run is computed, and where its files lie; what they are is compared by content.
HARMLESS = frozenset(
    {
        "save_minutes",
        "device",
        "data.root",
        "data.download",
        "data.workers",
        "data.residence",
        "teacher.checkpoint",
        "teacher.min_accuracy",
        "start.checkpoint",
        "start.min_accuracy",
        "distill.diagnostics",
    }
)
# Whose defaults hold where the recipe of a run of an earlier lasnn does not have a key yet.
TABLES = {
    "": Recipe,
    "data": DataTable,
    "teacher": TeacherTable,
    "start": StartTable,
    "student": StudentTable,
    "distill": DistillTable,
}
MISSING = object()


@dataclass(frozen=True)
class Change:
    """A key whose value is another than the run began with; one of the two may be missing."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        said = ("not set" if one is MISSING else printable(toml_value(one), 200) for one in (self.before, self.now))
        return f"{self.key}: was {next(said)}, now {next(said)}"


@dataclass
class Changes:
    """What differs between a run's recipe and the one that it shall be resumed with."""

    accepted: list[Change] = field(default_factory=list)
    refused: list[Change] = field(default_factory=list)
    epochs: Change | None = None
    """`distill.epochs`, which may change where that leaves the rates of the steps that are done (see `more_epochs`)."""


def changes_between(before: str, now: str) -> Changes:
    """Compare two recipes as `Recipe.to_toml` writes them.

    Raises:
        UserError: the first is no TOML.
    """
    try:
        old = dict(_flat(tomllib.loads(before)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"recipe.toml is damaged: {str(error).partition(chr(10))[0]}") from error
    new = dict(_flat(tomllib.loads(now)))
    found = Changes()
    for key in dict.fromkeys([*old, *new]):
        change = Change(key, old.get(key, MISSING), new.get(key, MISSING))
        if change.before == change.now or (change.before is MISSING and change.now == _default(key)):
            continue
        # A teacher that is trained is another than one that is read.
        another = key in ("teacher.checkpoint", "start.checkpoint") and MISSING in (change.before, change.now)
        if key == "distill.epochs":
            found.epochs = change
        elif key in HARMLESS and not another:
            found.accepted.append(change)
        else:
            found.refused.append(change)
    return found


def more_epochs(change: Change, recipe: Recipe, begun: bool) -> str:
    """What other `distill.epochs` do to a run, a line.

    Args:
        recipe: with the new number.
        begun: whether the student's training has begun.

    Raises:
        UserError: they would change what is done already.
    """
    table = recipe.distill
    if not begun:
        return f"{change}: the student's training has not begun"
    if change.now < change.before:
        raise UserError(f"{change}: the student's training has begun, and fewer epochs change its learning rates")
    if table.schedule == "step":
        raise UserError(
            f"{change}: the student's training has begun, and its learning rate falls at shares of all epochs, so that "
            "more of them change the rates of those that are done"
        )
    if table.min_lr != table.lr:
        raise UserError(
            f"{change}: the student's training has begun, and its learning rate follows a schedule over all epochs, "
            "so that more of them change the rates of those that are done; with min_lr = lr, a constant rate, they do "
            "not"
        )
    if falling := [loss.name for loss in recipe.losses if loss.schedule != "constant"]:
        raise UserError(
            f"{change}: the student's training has begun, and the weight of {falling[0]!r} follows a schedule over all "
            "epochs, so that more of them change what is done"
        )
    return f"{change}: the rate is constant, so that the epochs that are done stay as they are"


def _flat(tables: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested tables; an entry of a list of tables goes by its name."""
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value):
            # Their order counts too: losses are summed and augmentations applied in it.
            yield f"{prefix}{key}", [one["name"] for one in value]
            for one in value:
                options = {name: item for name, item in one.items() if name != "name"}
                yield from _flat(options, f"{prefix}{key}.{one['name']}.")
        else:
            yield f"{prefix}{key}", value


def _default(key: str) -> Any:
    """What a key of lasnn's own tables means where it is left out."""
    table, _, name = key.rpartition(".")
    model = LossTable if table.startswith("losses.") else TABLES.get(table)
    known = model.model_fields.get(name) if model else None
    return MISSING if known is None or known.is_required() else known.default
