"""The run folder: what a distillation leaves behind, and where it is found again (open_run.py begins and resumes one).

recipe.toml          the recipe with every default written down, paths as the user wrote them
env.json             versions, device, world size, and the absolute paths
data.json            the data set: classes, image size, normalisation, which images are for training and which for test
metrics.jsonl        one object an epoch, the teacher's first
teacher.safetensors  start.safetensors (of a recipe's [start])  student.safetensors
last.pt              full state, from which `--resume` goes on
summary.json         the result; its presence says that the run is done
"""

import html
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from lasnn import __version__, files, lock, processes
from lasnn.compatibility import fitted_weights
from lasnn.description import Description
from lasnn.errors import UserError, unknown
from lasnn.network.staged import Staged
from lasnn.recipe.load import parse
from lasnn.recipe.paths import RECORDED, expanded
from lasnn.recipe.schema import Recipe
from lasnn.weights import check_state

RUNS = Path("runs")
# What a student that ships with lasnn is named by, as model:NAME.
MODEL = "model:"
DATA = "data.json"
STATE_FILE = "last.pt"
# What the figures of a run depend on besides its recipe: the key of env.json, and what tables call it.
CONDITIONS = {
    "device": "{}",
    "device_name": "{}",
    "precision": "{}",
    "threads": "{} threads",
    "lasnn": "lasnn {}",
    "torch": "torch {}",
    "python": "Python {}",
}
WRITTEN = (
    "recipe.toml",
    "env.json",
    "data.json",
    "metrics.jsonl",
    "teacher.json",
    "teacher.safetensors",
    "start.json",
    "start.safetensors",
    "student.safetensors",
    STATE_FILE,
    "summary.json",
)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run; a student's own file, as `lasnn export` writes it, counts as a run without others.

    Args:
        path: the folder, or the student's file.
        model: the name of a student that ships with lasnn, whose folder this is; "" for any other.
    """

    path: Path
    model: str = ""

    def __str__(self) -> str:
        return f"{MODEL}{self.model}" if self.model else str(self.path)

    def output(self, name: str) -> Path:
        """Where a file made of the run goes unless told otherwise: to its folder, of a shipped student to this one."""
        if self.model:
            return Path(f"{self.model}-{name}")
        return (self.path.parent if self.path.is_file() else self.path) / name

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

    def facts(self) -> dict[str, str]:
        """What has become of the run, for people: how far it is, or its result."""
        if self.path.is_file():
            return {"student": str(self.path)}
        found = status(self.path)
        if found["state"] != "finished":
            at = f", {found['phase']} epoch {found['epoch']}/{found['epochs']}" if found["phase"] else ""
            further = {"go on with": resume_command(self.path)} if found["resumable"] else {}
            problem = {"problem": found["problem"]} if found["problem"] else {}
            return {"run": str(self.path), "state": found["state"] + at, **further, **problem}
        summary = self.read_json("summary.json")

        def digits(name: str, places: int) -> str:
            value = summary.get(name)
            return f"{value:.{places}f}" if isinstance(value, int | float) else "unknown"

        beside = "" if summary.get("teacher_accuracy") is None else f" (teacher {digits('teacher_accuracy', 4)})"
        return {
            "run": str(self.path),
            "accuracy": digits("accuracy", 4) + beside,
            "time steps": digits("timesteps", 0),
            "spikes per neuron and step": digits("firing_rate", 4),
            "energy": f"{digits('energy_uj', 3)} µJ an image, of operations",
            "training": f"{digits('seconds', 0)} s",
        }

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, value in self.facts().items():
            table.add_row(name, Text(value))
        return table

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in self.facts().items()
        )
        return f"<table><tbody>{''.join(rows)}</tbody></table>"

    def add_metrics(self, epoch: dict[str, Any]) -> None:
        """Append one epoch."""
        files.append_line(self / "metrics.jsonl", json.dumps(epoch))


def read_text(path: Path) -> str:
    """A text file; bytes that are no UTF-8 stand out as U+FFFD, and make it another text than any that was written."""
    return path.read_text(encoding="utf-8", errors="replace")


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
        # What stands in the place of "lasnn".
        "launcher": processes.launcher(),
        "command": sys.argv,
    }


def sessions(known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a run's `env.json` says of each time that it was trained: the first, and those that went on with it."""
    last = {key: value for key, value in known.items() if key != "earlier"}
    return [*known.get("earlier", []), *([last] if last else [])]


def earlier_sessions(run: RunFolder) -> list[dict[str, Any]]:
    """Those of a run that is resumed, each kind once; none where its env.json is damaged, which is written anew."""
    try:
        found = sessions(run.read_json("env.json"))
    except UserError:
        return []
    return [one for at, one in enumerate(found) if one not in found[:at]]


def changed_conditions(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What a resumed run goes on with that is other than before, a line each."""
    for key, form in CONDITIONS.items():
        if before.get(key, now[key]) != now[key]:
            yield f"the run goes on with {form.format(now[key])}, it had {form.format(before[key])} before"


def conditions_of(known: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What a run was made under, by the keys of `CONDITIONS`: more than one value where a resumed run went on under
    others.
    """
    made = sessions(known)
    found = {key: list(dict.fromkeys(one[key] for one in made if key in one)) for key in CONDITIONS}
    return {key: values for key, values in found.items() if values}


def absolute_paths(recipe: Recipe) -> dict[str, str]:
    """Where the files that a recipe names lie, for `env.json`: found again from another working directory."""
    paths = {
        "data.root": recipe.data_root,
        "teacher.checkpoint": recipe.teacher_checkpoint,
        "start.checkpoint": recipe.start_checkpoint,
        "student.init": recipe.init_path,
    }
    return {RECORDED[key]: str(path.absolute()) for key, path in paths.items() if path is not None}


def find_run(run: str | Path | None) -> RunFolder:
    """The run folder, the student's .safetensors file or the shipped student (model:NAME) that the user means; None is
    the newest folder under `runs/`.

    Raises:
        UserError: it is none of them, or there is none.
    """
    if isinstance(run, str) and run.startswith(MODEL):
        models, name = shipped_models(), run.removeprefix(MODEL)
        if name not in models:
            raise UserError(unknown("model", name, models))
        return RunFolder(models[name], name)
    if run is not None:
        path = expanded(run, "the run")
        if path.is_file() and path.suffix == ".safetensors":
            return RunFolder(path)
        if not path.exists():
            ships = f"; the student that ships is called {MODEL}{path.name}" if path.name in shipped_models() else ""
            raise UserError(f"no folder {path}{ships}; give a run folder{_known_runs()}")
        if not (path / "recipe.toml").is_file():
            raise UserError(f"{path} is not a run folder (it has no recipe.toml){_known_runs()}")
        return RunFolder(path)
    runs = all_runs()
    if not runs:
        raise UserError(f"no runs in {RUNS.absolute()}; `lasnn distill quickstart` makes one")
    return RunFolder(runs[-1])


def shipped_models() -> dict[str, Path]:
    """The students that ship with lasnn, name -> run folder."""
    import lasnn.models

    folder = Path(lasnn.models.__file__).parent
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/recipe.toml"))}


def model_facts(folder: Path) -> dict[str, Any]:
    """What `lasnn list models` says of one: `description`, `data`, `architecture`, `timesteps` of its training, the
    `accuracy` there and `teacher_accuracy`, `bytes`.
    """
    card, run = read_text(folder / "README.md"), RunFolder(folder)
    recipe = parse((folder / "recipe.toml").read_bytes(), str(folder))
    summary = run.read_json("summary.json")
    return {
        "description": card.partition("\n")[0].removeprefix("#").strip(),
        "data": recipe["data"]["name"],
        "architecture": recipe["student"]["architecture"],
        "timesteps": summary["timesteps"],
        "accuracy": summary["accuracy"],
        "teacher_accuracy": summary["teacher_accuracy"],
        "bytes": (folder / "student.safetensors").stat().st_size,
    }


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
            if (folder / STATE_FILE).is_file():
                check_state(folder / STATE_FILE)
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


def resume_command(folder: Path) -> str:
    """The command that goes on with a run, in as many processes as there are now, with the options that it has."""
    try:
        options = RunFolder(folder).read_json("env.json").get("options", [])
    except UserError:
        # Damaged; it is written anew.
        options = []
    command = ["distill", str(folder / "recipe.toml"), "--out", str(folder), "--resume", *options]
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
