"""Where the files lie that a recipe names."""

import json
from pathlib import Path

from lasnn.errors import UserError

# What a run folder's env.json calls the absolute path of each.
RECORDED = {"data.root": "data_root", "teacher.checkpoint": "teacher_checkpoint"}


def expanded(path: str | Path, key: str) -> Path:
    """A path that a user gave; `~` is the home.

    Raises:
        UserError: there is no such user; the line begins with `key`.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key} {path}: {error}; give the path without ~") from error


def located(written: str, key: str, folder: Path, given: bool = True) -> Path:
    """Where a path of a recipe leads: from the working directory, or, where a run's own recipe is read from another
    one than the run was begun in, to where it led then.

    Args:
        written: as the recipe has it.
        key: of the recipe.
        folder: of the recipe's file.
        given: whether the recipe has it at all; a student's file travels without.
    """
    path = expanded(written, key)
    if path.is_absolute() or (given and path.exists()):
        return path
    then = recorded(key, folder)
    # Another path that was set since is not to be found where the first one was.
    same = then is not None and (not given or then.parts[len(then.parts) - len(path.parts) :] == path.parts)
    return then if same and then.exists() else path


def recorded(key: str, folder: Path) -> Path | None:
    """The absolute path in the env.json of a run folder; None where there is none, or none that can be read."""
    try:
        found = json.loads((folder / "env.json").read_text(encoding="utf-8"))[RECORDED[key]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return Path(found) if isinstance(found, str) else None
