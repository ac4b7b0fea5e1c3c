"""A finished run, ready to use: its networks, and today's images where they are asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from lasnn.bound_data import data_changes
from lasnn.data import Dataset, DatasetDescription, Images, Streamed, hold_out
from lasnn.description import data_described, describe_student, describe_teacher
from lasnn.errors import UserError
from lasnn.factory import load_data, make_data, make_student, make_teacher, pick_device
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.plan import check_validation
from lasnn.recipe.load import parse
from lasnn.recipe.paths import expanded, unfinished
from lasnn.recipe.schema import Recipe
from lasnn.registry import datasets
from lasnn.run import DATA, RunFolder, find_run, load_into, resume_command
from lasnn.weights import read_description


@dataclass(frozen=True)
class RunImages:
    """The images of a run as its data set has them today, on the run's device or streamed to it."""

    train: Images | Streamed
    """Those that were trained on."""
    test: Images | Streamed
    changes: list[str]
    """What has changed since the run began, a line each."""
    validation: Images | Streamed | None = None
    """Those that were held out of the training images; None where none were."""


@dataclass(frozen=True)
class Run:
    """A finished run, ready to use. Its data set's files are looked for when `data` or `images` is asked for."""

    folder: RunFolder
    recipe: Recipe
    description: DatasetDescription
    """Classes, image size, normalisation: what the networks were trained on."""
    device: torch.device
    student: Student = field(repr=False)
    part: str = ""
    """Of a student that ships, the part of its data set that ships too, whose images are at hand."""

    @property
    def images_recipe(self) -> Recipe:
        """The recipe of the images that are at hand: the run's, but of `part`."""
        if not self.part:
            return self.recipe
        data = self.recipe.data.model_copy(update={"name": self.part})
        return self.recipe.model_copy(update={"data": data})

    @property
    def summary(self) -> dict[str, Any]:
        """What `summary.json` says."""
        return self.folder.read_json("summary.json")

    def __rich__(self) -> Table:
        return self.folder.__rich__()

    def _repr_html_(self) -> str:
        return self.folder._repr_html_()

    @cached_property
    def data(self) -> Dataset:
        """The data set of the recipe as it is today; no image is read yet.

        Raises:
            UserError: its folder is not there, or broken.
        """
        with self._naming_the_place():
            return make_data(self.images_recipe)

    @cached_property
    def images(self) -> RunImages:
        """The images, read once, compared with those that the run is bound to.

        Raises:
            UserError: they are not there or broken, or no test of this run any more (see `lasnn.bound_data`).
        """
        if self.part:
            train, test, _ = load_data(self.images_recipe, self.data, self.device)
            return RunImages(train, test, [])
        # What is found without decoding anything comes first: classes, and where each file has gone.
        data_changes(self.description, self.data)
        with self._naming_the_place():
            whole, test, _ = load_data(self.recipe, self.data, self.device)
            check_validation(self.recipe, self.data)
        changes = data_changes(self.description, self.data, (whole, test))
        train, validation = hold_out(whole, self.recipe.data.validation)
        return RunImages(train, test, changes, validation)

    @cached_property
    def teacher(self) -> Teacher | None:
        """The teacher in eval mode, None where the run has none."""
        path = self.folder / "teacher.safetensors"
        if self.recipe.teacher is None or not path.is_file():
            return None
        teacher = make_teacher(self.recipe, self.description, weights=False)
        load_into(teacher.network, path, describe_teacher(self.recipe, self.description, teacher.network))
        return teacher.to(self.device).eval()

    @contextmanager
    def _naming_the_place(self) -> Iterator[None]:
        """Add to what is wrong with the images where they were looked for, and how another place is named."""
        try:
            yield
        except UserError as error:
            where = self.recipe.data_root.absolute()
            line = f"the images of {self.folder} are looked for in {where}; --data names another folder"
            raise UserError(*error.problems, line) from error


def load_run(run: str | Path | None = None, device: str = "cpu", *, data_root: str | Path | None = None) -> Run:
    """Read a run folder; the images that it was trained on need not be there.

    Args:
        run: the folder; or a student's .safetensors file, whose metadata has the recipe (the run's own, or an export),
            the recipe's plugins beside it; or "model:NAME", a student that ships. None is the newest under `runs/`.
        device: where the networks go; "auto" takes CUDA if present, "recipe" what the run's recipe says, and "auto"
            where that is not here.
        data_root: the folder of the images; None is the recipe's `data.root`, where the run found them; for a file on
            its own `data` in the working directory; for a shipped student the part of its data set that ships too.

    Returns:
        The run; `.student` is an `nn.Module` in eval mode, images [B, C, H, W] in [0, 1] -> logits [B, K].

    Raises:
        UserError: it is no run, has no trained student, or `data_root` is no folder.
    """
    folder = find_run(run)
    if folder.path.is_file():
        recipe, weights = _recipe_in(folder.path, folder.path.parent), folder.path
    else:
        recipe, weights = Recipe.load(folder / "recipe.toml"), folder / "student.safetensors"
    if not weights.is_file() or unfinished(folder.path):
        before = f", or give {weights}, what it had when it was finished before" if weights.is_file() else ""
        what = "is not finished" if before else "has no student yet"
        raise UserError(f"{folder} {what}; finish it with `{resume_command(folder.path)}`{before}")
    if data_root is not None:
        root = str(expanded(data_root, "--data").absolute())
        if not datasets[recipe.data.name].function.reads_root:
            raise UserError(f"--data: the images of {recipe.data.name} ship with lasnn; leave it out")
        if not Path(root).is_dir():
            raise UserError(f"--data: no folder {data_root}; name the one of the run's images")
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": root})})
    part = datasets[recipe.data.name].function.shipped_part if folder.model and data_root is None else ""
    return _loaded(folder, recipe, weights, own_device(recipe) if device == "recipe" else pick_device(device), part)


def load_student_file(path: Path, plugins: Path) -> Run:
    """Read a student's .safetensors file whose recipe's plugins are in another folder; the same as `load_run` else."""
    return _loaded(RunFolder(path), _recipe_in(path, plugins), path, pick_device("cpu"))


def _loaded(folder: RunFolder, recipe: Recipe, weights: Path, where: torch.device, part: str = "") -> Run:
    description = _description(weights, recipe)
    student = make_student(recipe, description)
    load_into(student.network, weights, describe_student(recipe, description))
    return Run(folder, recipe, description, where, student.to(where).eval(), part)


def own_device(recipe: Recipe) -> torch.device:
    """The recipe's own device, and what there is where that is not here: a run may come from another machine."""
    try:
        return pick_device(recipe.device)
    except UserError:
        return pick_device("auto")


def _description(weights: Path, recipe: Recipe) -> DatasetDescription:
    """The data set that a student was trained on, from the `data.json` beside its file or from the file itself.

    A student of an earlier lasnn has neither; it is taken to be of what its data set is today.
    """
    known = data_described(read_description(weights), str(weights))
    beside = RunFolder(weights.parent)
    found = beside.read_json(DATA)
    if found:
        whole = DatasetDescription.from_json(found, str(beside / DATA))
        # Beside an export may lie another run's.
        if known is None or replace(whole, keys=()) == known:
            return whole
    return known or make_data(recipe).describe(recipe.data.name)


def _recipe_in(path: Path, plugins: Path) -> Recipe:
    """The recipe in the metadata of a student's file; plugins that are files are looked for in the folder given."""
    text = read_description(path).get("recipe")
    if not isinstance(text, str):
        raise UserError(
            f"{path} has no recipe in its metadata; give a run folder, or what `lasnn export --format safetensors` "
            "wrote"
        )
    return Recipe.from_tables(
        parse(text.encode(), f"{path}, the recipe in its metadata"), source=str(plugins / path.name)
    )
