"""How a run's folder begins, and how it is taken up again: with the same recipe and data, as far as they matter."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from lasnn import files, lock, processes
from lasnn.bound_data import Splits
from lasnn.compatibility import match_names
from lasnn.data import Dataset, DatasetDescription
from lasnn.errors import MachineError, UserError
from lasnn.factory import find_checkpoint
from lasnn.foreign_weights import read_checkpoint
from lasnn.recipe.paths import expanded
from lasnn.recipe.plugins import is_file, module_file, module_version
from lasnn.recipe.schema import Recipe
from lasnn.resume import changes_between, more_epochs
from lasnn.run import DATA, RUNS, STATE_FILE, WRITTEN, RunFolder, all_runs, read_text
from lasnn.weights import load_state, load_weights


@contextmanager
def open_run(
    recipe: Recipe, out: Path | None, resume: bool, note: Callable[[str], None] = lambda text: None
) -> Iterator[RunFolder]:
    """Make a run's folder with its recipe, or take up the one that is there; other processes are kept out of it within
    the block.

    Without `out`, `resume` takes the run whose recipe it is, or else the newest run of the same recipe under `runs/`
    that is not done, whatever its folder's name.

    Args:
        note: gets what is worth a line.

    Raises:
        UserError: the folder is not empty and `resume` is not given, it holds another recipe (but for what leaves the
            result as it would have been, see `lasnn.resume`), a process is at it, or there is no run to go on with and
            no `out`.
        MachineError: the folder cannot be made.
    """
    out = _folder(recipe, out, resume) or _new_folder(recipe.name)
    run = check_folder(out, resume)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError(f"--out {run.path}: {error.filename} is a file; name a folder") from error
    except OSError as error:
        raise MachineError(f"cannot write {run.path}: {error.strerror}") from error
    with lock.locked(run.path, note):
        _begin(run, recipe, resume, note)
        yield run


def check_run(recipe: Recipe, out: Path | None, resume: bool) -> None:
    """Check that a run could begin, or go on, and leave everything as it is.

    Raises:
        UserError: as for `open_run`.
    """
    out = _folder(recipe, out, resume)
    if out is not None and (check_folder(out, resume) / "recipe.toml").is_file():
        _check_changes(RunFolder(out), recipe)


def _folder(recipe: Recipe, out: Path | None, resume: bool) -> Path | None:
    """The run's folder; None where it is to be a new one."""
    if out is not None or not resume:
        return out
    return recipe.run_folder or _unfinished(recipe)


def check_folder(out: Path, resume: bool) -> RunFolder:
    """The run folder that `out` is, or is to be.

    Raises:
        UserError: it is a file, not empty, or a run that is not to be resumed.
    """
    run = RunFolder(expanded(out, "--out"))
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"--out {run.path} is a file; name a folder")
    begun = (run / "recipe.toml").is_file()
    if run.path.is_dir() and set(os.listdir(run.path)) - {lock.NAME} and not begun:
        raise UserError(f"{run.path} is not empty{' and not a run folder' if resume else ''}; choose another --out")
    if begun and not resume:
        raise UserError(f"{run.path} is not empty; choose another --out, or --resume to go on with the run in it")
    return run


def _begin(run: RunFolder, recipe: Recipe, resume: bool, note: Callable[[str], None]) -> None:
    """Write the recipe and its plugins, or check that the run that is there can go on with them."""
    if not (run / "recipe.toml").is_file():
        # The recipe comes first: it makes the folder one that can be resumed.
        files.write(run / "recipe.toml", recipe.to_toml())
        for plugin in recipe.plugin_files:
            files.write(run / plugin.name, plugin.read_bytes())
        return
    # Another process may have begun it in the meantime.
    check_folder(run.path, resume)
    accepted = _check_changes(run, recipe)
    _check_plugins(recipe, run)
    files.remove_partial(run.path, (*WRITTEN, *(plugin.name for plugin in recipe.plugin_files)))
    for line in accepted:
        note(f"changed  {line}")


def _check_changes(run: RunFolder, recipe: Recipe) -> list[str]:
    """What of the recipe has changed since the run began and leaves its result what it would have been, a line each.

    Raises:
        UserError: the other changes, all together.
    """
    changes = changes_between(read_text(run / "recipe.toml"), recipe.to_toml())
    refused, accepted = [str(change) for change in changes.refused], [str(change) for change in changes.accepted]
    for name, table in (("teacher", recipe.teacher), ("start", recipe.start)):
        key = f"{name}.checkpoint"
        if any(change.key == key for change in changes.accepted) and not _same_weights(run, recipe, name):
            refused.append(f"{key}: {table.checkpoint} has other weights than the run's {name}")
    if changes.epochs:
        try:
            accepted.append(more_epochs(changes.epochs, recipe, _student_begun(run)))
        except UserError as error:
            refused += error.problems
    if refused:
        raise UserError(
            f"{run.path} holds a run of another recipe ({'; '.join(refused)}); resume it as it was, or choose another "
            "--out"
        )
    return accepted


def _same_weights(run: RunFolder, recipe: Recipe, name: str) -> bool:
    """Whether the checkpoint of "teacher" or "start" has the weights that the run has begun with, if it has any."""
    if not (run / f"{name}.safetensors").is_file():
        return True
    kept, _ = load_weights(run / f"{name}.safetensors")
    weights, _ = match_names(read_checkpoint(find_checkpoint(recipe, name)).weights, kept)
    return weights.keys() <= kept.keys() and all(
        torch.equal(value.to(kept[name].dtype), kept[name]) for name, value in weights.items()
    )


def _student_begun(run: RunFolder) -> bool:
    """Whether a step of the student's training is done and saved."""
    if any(epoch["phase"] == "student" for epoch in run.metrics()):
        return True
    return (run / STATE_FILE).is_file() and load_state(run / STATE_FILE)["phase"] == "student"


def finished(recipe: Recipe, folder: Path) -> bool:
    """Whether a folder holds this recipe's finished run.

    Raises:
        UserError: it holds a run of another recipe.
    """
    if not (folder / "recipe.toml").is_file():
        return False
    _check_changes(RunFolder(folder), recipe)
    return is_done(RunFolder(folder), recipe)


def is_done(run: RunFolder, recipe: Recipe) -> bool:
    """Whether a run has its result; one that gets more epochs has it no longer."""
    summary = run.read_json("summary.json")
    return bool(summary) and summary.get("epochs", recipe.distill.epochs) == recipe.distill.epochs


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
    now = module_digests(recipe)
    for module, digest in run.read_json("env.json").get("plugins", {}).items():
        if now.get(module, digest) != digest:
            raise UserError(f"the module {module} has changed since the run in {run.path} began; put it back as it was")


def module_digests(recipe: Recipe) -> dict[str, str]:
    """The version of each plugin that is a module, for `env.json`: it has no copy in the run folder."""
    files = {plugin: module_file(plugin) for plugin in recipe.plugins if not is_file(plugin)}
    return {plugin: module_version(file) for plugin, file in files.items() if file}


def _unfinished(recipe: Recipe) -> Path | None:
    """The newest run under `runs/` that is not done and can go on with this recipe.

    Where processes are started again, the first time may have ended before there was one: None.

    Raises:
        UserError: there is none; the newest that is called as the recipe is says why.
    """
    problems = []
    for folder in reversed(all_runs()):
        if (folder / "summary.json").is_file():
            continue
        try:
            _check_changes(RunFolder(folder), recipe)
        except UserError as error:
            if folder.name.rpartition("-")[0] == recipe.name:
                problems.append(error)
            continue
        return folder
    if processes.restarted():
        return None
    if problems:
        raise problems[0]
    raise UserError(
        f"there is no unfinished run of {recipe.name} under {RUNS} to resume; leave --resume out, or give --out DIR, "
        "which begins one where there is none"
    )


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


def bind(run: RunFolder, recipe: Recipe, data: Dataset, splits: Splits) -> DatasetDescription:
    """Keep the recipe that an opened run goes on with, and what data it is trained on and measured with; a run that has
    begun must have the same.

    Args:
        splits: the training images, those that are held out among them, and the test images, loaded.

    Raises:
        UserError: the data is not what the run began with; the lines say what has changed.
    """
    now = replace(data.describe(recipe.data.name, splits), validation=recipe.data.validation)
    begun = any((run / name).is_file() for name in (STATE_FILE, "metrics.jsonl", "teacher.json", "start.json"))
    # A run of an earlier lasnn does not have it; its last.pt knows the training images again.
    if begun and (found := run.read_json(DATA)):
        before = DatasetDescription.from_json(found, str(run / DATA))
        if changes := data.changes_since(before, splits):
            fix = "put them back as they were, or choose another --out"
            raise UserError(*changes, f"{run.path}: its images are not those that the run began with: {fix}")
    if not begun:
        run.write_json(DATA, now.as_json())
    if read_text(run / "recipe.toml") != recipe.to_toml():
        # With more epochs than it was finished with it is finished no longer.
        (run / "summary.json").unlink(missing_ok=True)
        files.write(run / "recipe.toml", recipe.to_toml())
    return now
