"""Where the files lie that a recipe names."""

import json
from pathlib import Path

from lasnn.errors import UserError

# What a run folder's env.json calls the absolute path of each.
RECORDED = {
    "data.root": "data_root",
    "teacher.checkpoint": "teacher_checkpoint",
    "start.checkpoint": "start_checkpoint",
    "student.init": "student_init",
}


def expanded(path: str | Path, key: str) -> Path:
    """A path that a user gave; `~` is the home.

    Raises:
        UserError: there is no such user; the line begins with `key`.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key} {path}: {error}; give the path without ~") from error


def located(written: str, key: str, folder: Path, left_out: bool = False) -> Path:
    """Where a path of a recipe leads: where it led when the run began, if it is a run's own recipe that is read and
    that is still there; otherwise from the working directory.

    Args:
        written: as the recipe has it.
        key: of the recipe.
        folder: of the recipe's file.
        left_out: whether the recipe does not have it, as that of a student's file, which travels without.
    """
    path = expanded(written, key)
    then = None if path.is_absolute() else recorded(key, folder)
    # Another path that was written there since does not lead where the first one did.
    same = then is not None and (left_out or then.parts[len(then.parts) - len(path.parts) :] == path.parts)
    return then if same and then.exists() else path


def recorded(key: str, folder: Path) -> Path | None:
    """The absolute path in the env.json of a run folder; None where there is none, or none that can be read."""
    try:
        found = json.loads((folder / "env.json").read_text(encoding="utf-8"))[RECORDED[key]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return Path(found) if isinstance(found, str) else None


def unfinished(folder: Path) -> bool:
    """Whether a folder's run is being trained or was stopped; a finished one that goes on with more epochs is, too."""
    return (folder / "metrics.jsonl").is_file() and not (folder / "summary.json").is_file()
