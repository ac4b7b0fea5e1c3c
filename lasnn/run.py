"""The run folder: what a distillation leaves behind, and all that `evaluate` needs.

recipe.toml          the recipe with every default written down
env.json             versions, device, world size
metrics.jsonl        one object an epoch, the teacher's first
teacher.safetensors  student.safetensors
last.pt              full state, from which `--resume` goes on
summary.json         the result; its presence says that the run is done
"""

import itertools
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lasnn import __version__, files, lock, processes
from lasnn.compatibility import fitted_weights
from lasnn.data import Dataset
from lasnn.description import DescribedData, Description, describe_student, describe_teacher
from lasnn.errors import MachineError, UserError
from lasnn.factory import make_data, make_student, make_teacher, pick_device
from lasnn.network.staged import Staged
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.recipe.load import parse
from lasnn.recipe.schema import Recipe
from lasnn.weights import check_state, read_description

RUNS = Path("runs")
WRITTEN = (
    "recipe.toml",
    "env.json",
    "metrics.jsonl",
    "teacher.json",
    "teacher.safetensors",
    "student.safetensors",
    "last.pt",
    "summary.json",
)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run; a student's own file, as `lasnn export` writes it, counts as a run without others."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file in one step."""
        files.write(self / name, json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run, {} where there is none yet."""
        path = self / name
        try:
            value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        if not isinstance(value, dict):
            raise UserError(f"{path} is damaged: it holds no JSON object")
        return value

    def metrics(self) -> list[dict[str, Any]]:
        """The epochs so far; a last line that a kill cut short is left out."""
        path = self / "metrics.jsonl"
        lines = read_text(path).splitlines() if path.is_file() else []
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                epoch = json.loads(line)
            except (ValueError, RecursionError) as error:
                if number < len(lines):
                    raise UserError(f"{path}: line {number} is damaged: {error}") from error
                continue
            if not isinstance(epoch, dict) or not {"phase", "epoch"} <= epoch.keys():
                raise UserError(f"{path}: line {number} is damaged: it is not an epoch")
            found.append(epoch)
        return found

    def write_metrics(self, epochs: list[dict[str, Any]]) -> None:
        """Replace the epochs, as a resumed run does with those it does again."""
        files.write(self / "metrics.jsonl", "".join(json.dumps(epoch) + "\n" for epoch in epochs))

    def add_metrics(self, epoch: dict[str, Any]) -> None:
        """Append one epoch."""
        files.append_line(self / "metrics.jsonl", json.dumps(epoch))


@contextmanager
def open_run(
    recipe: Recipe, out: Path | None, resume: bool, note: Callable[[str], None] = lambda text: None
) -> Iterator[RunFolder]:
    """Make a run's folder with its recipe, or take up the one that is there; other processes are kept out of it within
    the block.

    Without `out`, `resume` takes the newest run of the same recipe under `runs/` that is not done.

    Args:
        note: gets what is worth a line.

    Raises:
        UserError: the folder is not empty and `resume` is not given, it holds another recipe, or a process is at it.
        MachineError: the folder cannot be made.
    """
    text = _resolved(recipe)
    if out is None:
        out = (_unfinished(recipe.name, text) if resume else None) or _new_folder(recipe.name)
    run = RunFolder(out)
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"--out {run.path} is a file; name a folder")
    if run.path.is_dir() and set(os.listdir(run.path)) - {lock.NAME} and not (run / "recipe.toml").is_file():
        raise UserError(f"{run.path} is not empty{' and not a run folder' if resume else ''}; choose another --out")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError(f"--out {run.path}: {error.filename} is a file; name a folder") from error
    except OSError as error:
        raise MachineError(f"cannot write {run.path}: {error.strerror}") from error
    with lock.locked(run.path, note):
        _begin(run, recipe, text, resume)
        yield run


def _begin(run: RunFolder, recipe: Recipe, text: str, resume: bool) -> None:
    """Write the recipe and its plugins, or check that they are those of the run that is there."""
    if not (run / "recipe.toml").is_file():
        # The recipe comes first: it makes the folder one that can be resumed.
        files.write(run / "recipe.toml", text)
        for plugin in recipe.plugin_files:
            files.write(run / plugin.name, plugin.read_bytes())
        return
    if not resume:
        raise UserError(f"{run.path} is not empty; choose another --out, or --resume to go on with the run in it")
    before = read_text(run / "recipe.toml")
    if before != text:
        raise UserError(f"{run.path} holds a run of another recipe; {_first_difference(before, text)}")
    _check_plugins(recipe, run)
    files.remove_partial(run.path, (*WRITTEN, *(plugin.name for plugin in recipe.plugin_files)))


def read_text(path: Path) -> str:
    """A text file; bytes that are no UTF-8 stand out as U+FFFD, and make it another text than any that was written."""
    return path.read_text(encoding="utf-8", errors="replace")


def finished(recipe: Recipe, folder: Path) -> bool:
    """Whether a folder holds this very recipe's finished run.

    Raises:
        UserError: it holds a run of another recipe.
    """
    if not (folder / "recipe.toml").is_file():
        return False
    before, now = read_text(folder / "recipe.toml"), _resolved(recipe)
    if before != now:
        raise UserError(f"{folder} holds a run of another recipe; {_first_difference(before, now)}")
    return (folder / "summary.json").is_file()


def _check_plugins(recipe: Recipe, run: RunFolder) -> None:
    """The plugins must be those that the run began with; one that a kill left out is copied now."""
    for plugin in recipe.plugin_files:
        copy = run / plugin.name
        if not copy.is_file():
            files.write(copy, plugin.read_bytes())
        elif copy.read_bytes() != plugin.read_bytes():
            raise UserError(
                f"{plugin} has changed since the run in {run.path} began; resume with {run / 'recipe.toml'}"
            )


def _resolved(recipe: Recipe) -> str:
    """The recipe's text for a run folder; its paths hold from every working directory."""
    data = recipe.data.model_copy(update={"root": str(Path(recipe.data.root).absolute())})
    teacher = recipe.teacher
    if teacher and teacher.checkpoint is not None:
        teacher = teacher.model_copy(update={"checkpoint": str(Path(teacher.checkpoint).absolute())})
    return recipe.model_copy(update={"data": data, "teacher": teacher}).to_toml()


def _unfinished(name: str, text: str) -> Path | None:
    """The newest run of this very recipe under `runs/` that is not done."""
    for folder in reversed(all_runs()):
        same = folder.name.rpartition("-")[0] == name and read_text(folder / "recipe.toml") == text
        if same and not (folder / "summary.json").is_file():
            return folder
    return None


def _new_folder(name: str) -> Path:
    """Make `runs/<name>-<number>` with the first free number; two runs that start at once get two."""
    for number in itertools.count(1):
        folder = RUNS / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise MachineError(f"cannot write {folder}: {error.strerror}") from error


def _first_difference(before: str, now: str) -> str:
    table = ""
    for old, new in zip([*before.splitlines(), ""], [*now.splitlines(), ""], strict=False):
        if old != new:
            return f"in {table or 'its head'} it has {old or 'nothing'!r}, now {new or 'nothing'!r}"
        table = old if old.startswith("[") else table
    return "one of them goes on where the other ends"


def environment(device: torch.device) -> dict[str, Any]:
    """What a run's numbers depend on besides its recipe."""
    import torchvision

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "lasnn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "triton": triton_version,
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "world_size": processes.world_size(),
        "command": sys.argv,
    }


def find_run(run: str | Path | None) -> RunFolder:
    """The run folder, or the student's .safetensors file, that the user means; None is the newest folder under `runs/`.

    Raises:
        UserError: it is neither, or there is none.
    """
    if run is not None:
        path = Path(run)
        if path.is_file() and path.suffix == ".safetensors":
            return RunFolder(path)
        if not path.exists():
            raise UserError(f"no folder {path}; give a run folder{_known_runs()}")
        if not (path / "recipe.toml").is_file():
            raise UserError(f"{path} is not a run folder (it has no recipe.toml){_known_runs()}")
        return RunFolder(path)
    runs = all_runs()
    if not runs:
        raise UserError(f"no runs in {RUNS.absolute()}; `lasnn distill quickstart` makes one")
    return RunFolder(runs[-1])


def all_runs(compared: bool = False) -> list[Path]:
    """The run folders under `runs/`, with those of comparisons if they are asked for, the newest last."""
    patterns = ["*/recipe.toml", *(["compare/*/*/recipe.toml"] if compared else [])]
    return sorted((path.parent for pattern in patterns for path in RUNS.glob(pattern)), key=_made)


def status(folder: Path) -> dict[str, Any]:
    """How far a run is; none of its plugins is loaded.

    Returns:
        `run`, `state` ("finished", "running", "stopped" or "broken"), `phase`, `epoch` and `epochs` of what it did
        last, `accuracy` of that epoch, `teacher_accuracy`, `resumable`, and `problem` where it is broken.
    """
    run = RunFolder(folder)
    found: dict[str, Any] = {"run": str(folder), "state": "stopped", "phase": None, "epoch": 0, "epochs": None}
    found |= {"accuracy": None, "teacher_accuracy": None, "resumable": False, "problem": None}
    try:
        tables = parse((folder / "recipe.toml").read_bytes(), str(folder / "recipe.toml"))
        epochs = run.metrics()
        summary, teacher = run.read_json("summary.json"), run.read_json("teacher.json")
        if epochs:
            phase = str(epochs[-1]["phase"])
            table = tables.get({"student": "distill"}.get(phase, phase), {})
            last = {"phase": phase, "epoch": epochs[-1]["epoch"], "accuracy": epochs[-1].get("accuracy")}
            found |= {**last, "epochs": table.get("epochs") if isinstance(table, dict) else None}
        found["teacher_accuracy"] = teacher.get("accuracy")
        if lock.holder(folder):
            found["state"] = "running"
        elif summary:
            found |= {"state": "finished", "accuracy": summary.get("accuracy")}
        else:
            if (folder / "last.pt").is_file():
                check_state(folder / "last.pt")
            found["resumable"] = True
        for key in ("epoch", "epochs", "accuracy", "teacher_accuracy"):
            if not isinstance(found[key], int | float | None):
                raise UserError(f"{folder}: its {key} is damaged: {found[key]!r}")
    except (UserError, OSError) as error:
        found |= {"state": "broken", "problem": str(error), "resumable": False}
        found |= {"epoch": 0, "epochs": None, "accuracy": None, "teacher_accuracy": None}
    return found


def _made(folder: Path) -> tuple[int, str]:
    return (folder / "recipe.toml").stat().st_mtime_ns, folder.name


def _known_runs() -> str:
    runs = [str(path) for path in all_runs()[-5:]]
    return f"; the newest: {', '.join(runs)}" if runs else ""


@dataclass(frozen=True)
class Run:
    """A finished run, ready to use."""

    folder: RunFolder
    recipe: Recipe
    data: Dataset
    device: torch.device
    student: Student = field(repr=False)

    @property
    def summary(self) -> dict[str, Any]:
        """What `summary.json` says."""
        return self.folder.read_json("summary.json")

    @cached_property
    def teacher(self) -> Teacher | None:
        """The teacher in eval mode, None where the run has none."""
        path = self.folder / "teacher.safetensors"
        if self.recipe.teacher is None or not path.is_file():
            return None
        teacher = make_teacher(self.recipe, self.data)
        load_into(teacher.network, path, describe_teacher(self.recipe, self.data, teacher.network))
        return teacher.to(self.device).eval()


def load_run(run: str | Path | None = None, device: str = "cpu") -> Run:
    """Read a run folder.

    Args:
        run: the folder, or a student's .safetensors file, whose metadata has the recipe (the run's own, or an export);
            the recipe's plugins must then lie beside the file. None is the newest folder under `runs/`.
        device: where the networks go; "auto" takes CUDA if present.

    Returns:
        The run; `.student` is an `nn.Module` in eval mode, images [B, C, H, W] in [0, 1] -> logits [B, K].

    Raises:
        UserError: it is no run, or has no trained student.
    """
    folder = find_run(run)
    if folder.path.is_file():
        recipe, data = _recipe_in(folder.path)
        weights = folder.path
    else:
        recipe, weights = Recipe.load(folder / "recipe.toml"), folder / "student.safetensors"
        data = make_data(recipe)
    if not weights.is_file():
        raise UserError(f"{folder.path} has no student yet; finish it with `{resume_command(folder.path)}`")
    where = pick_device(device)
    student = make_student(recipe, data)
    load_into(student.network, weights, describe_student(recipe, data))
    return Run(folder, recipe, data, where, student.to(where).eval())


def _recipe_in(path: Path) -> tuple[Recipe, Dataset]:
    """The recipe in the metadata of a student's file, whose plugins that are files are looked for beside it, and the
    data set as the file describes it; its images need not be here.
    """
    description = read_description(path)
    text = description.get("recipe")
    if not isinstance(text, str):
        raise UserError(
            f"{path} has no recipe in its metadata; give a run folder, or what `lasnn export --format safetensors` "
            "wrote"
        )
    recipe = Recipe.from_tables(parse(text.encode(), f"{path}, the recipe in its metadata"), source=str(path))
    known = DescribedData.is_complete(description)
    return recipe, DescribedData(path, recipe, description) if known else make_data(recipe)


def resume_command(folder: Path) -> str:
    """The command that goes on with a run, in as many processes as there are now."""
    command = ["distill", str(folder / "recipe.toml"), "--out", str(folder), "--resume"]
    return shlex.join([*processes.launcher(), *command])


def load_into(network: Staged, path: Path, expected: Description) -> list[str]:
    """Load a weights file into a network.

    Args:
        expected: what the file should say of the network, as far as it says it (see `lasnn.description`).

    Returns:
        What of the file was left out or converted, a line each.

    Raises:
        UserError: the file is damaged or does not fit.
    """
    weights, notes = fitted_weights(path, network, expected)
    network.load_state_dict(weights)
    return notes
