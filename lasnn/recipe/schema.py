"""The recipe: an experiment as one strict, typed TOML file.

Every mistake in a recipe is found before the first batch and all of them are reported together. A key that is not
listed here, in `[data]`, `[teacher]`, `[student]`, `[student.neuron]`, the encoder's table or a `[[losses]]` entry, is
an option of the registered part that the table names, and is checked against that part's signature.
"""

import copy
import json
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from lasnn.errors import UserError, printable, unknown
from lasnn.recipe.load import LARGEST, _beyond, _override, _place, _remove, dump_toml, find, parse
from lasnn.recipe.paths import located
from lasnn.recipe.plugins import _is_file, _load_plugins
from lasnn.registry import (
    Registry,
    architectures,
    augmentations,
    datasets,
    encoders,
    losses,
    neurons,
    teachers,
)

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RecipeError(UserError):
    """Everything that is wrong with a recipe; `recipe` is what could be read of it, `keys` are the faulty ones."""

    def __init__(self, problems: Iterable[str], recipe: "Recipe | None", keys: Iterable[str]):
        super().__init__(*dict.fromkeys(problems))
        self.recipe = recipe
        self.keys = frozenset(keys)


class Section(BaseModel):
    """A table of the recipe: immutable, and nothing in it goes unread."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Part(Section):
    """A table that names a registered part; its further keys are that part's options."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, use_attribute_docstrings=True)

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the registered part."""
        return dict(self.model_extra or {})


class Training(BaseModel):
    """How a network is trained. The defaults are those of ELKD's code for CIFAR (ResNet-18/19)."""

    model_config = ConfigDict(frozen=True, strict=True, use_attribute_docstrings=True)

    epochs: Count = 300
    """Passes over the training images."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW; both with a cosine schedule."""
    lr: Positive = 0.1
    """Learning rate at the end of the warm-up."""
    min_lr: NonNegative = 0.0
    """Learning rate that the cosine ends at."""
    warmup_epochs: NonNegative = 0.0
    """Epochs of linear warm-up from 0; fractions are allowed."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD; AdamW's first beta."""
    weight_decay: NonNegative = 5e-4
    """L2 penalty of SGD, decoupled decay of AdamW."""
    clip_norm: NonNegative = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""


class AugmentTable(Part):
    """An augmentation as a table, where it has options."""

    name: str
    """A registered augmentation."""


class DataTable(Part):
    """`[data]`: which images, from where, in what batches."""

    name: str = "fashion-mnist-mini"
    """A registered data set."""
    root: str = "data"
    """Folder of the data set's files, relative to the working directory."""
    batch_size: Count = 128
    """Images a step, over all processes."""
    accumulate: Count = 1
    """Parts that a batch is computed in, one after the other, to need less memory; batch statistics are each part's."""
    residence: Literal["auto", "device", "stream"] = "auto"
    """Images on the device, or streamed to it; "auto" streams what takes more than half of its free memory."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that read ahead where images are streamed."""
    augment: list[str | AugmentTable] | None = None
    """Augmentations in order, by name or as tables with their options; left out, those of the data set."""


class TeacherTable(Training, Part):
    """`[teacher]`: the ANN, trained first and cached, or read from a checkpoint."""

    architecture: str
    """A registered architecture, or a network that only teaches (`lasnn list teachers`)."""
    checkpoint: str | None = None
    """A `.safetensors` or `.pth` file, or a run folder whose teacher is taken; nothing is trained then."""
    activation: Literal["relu", "qcfs"] = "relu"
    """What its units end in; "qcfs" (Bu et al., ICLR 2022) makes it one to convert: `--converted qcfs`."""
    levels: Count = 4
    """Levels of the "qcfs" activation above 0; its authors' code has 4 for CIFAR-10, 8 for CIFAR-100."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of the teacher's cross-entropy."""


_TEACHER_TRAINING = {*Training.model_fields, "label_smoothing"}


class NeuronTable(Part):
    """`[student.neuron]`: the spiking neuron."""

    name: str = "lif"
    """A registered neuron."""


class EncoderTable(Part):
    """The encoder as a table, where it has options."""

    name: str
    """A registered encoder."""


class StudentTable(Part):
    """`[student]`: the spiking network."""

    architecture: str
    """A registered architecture."""
    timesteps: Count = 4
    """T, in training; a trained student evaluates at any T."""
    encoder: str | EncoderTable = "direct"
    """A registered encoder, by name or as a table with its options."""
    neuron: NeuronTable = NeuronTable()
    """The neuron and its options."""
    init: Literal["random", "teacher"] = "random"
    """Where the student's weights start: at random, or as a copy of its teacher's (same architecture)."""

    @property
    def encoder_table(self) -> EncoderTable:
        """The encoder, always as a table."""
        return EncoderTable(name=self.encoder) if isinstance(self.encoder, str) else self.encoder


class DistillTable(Training, Section):
    """`[distill]`: how the student is trained."""

    pairs: list[str] | None = None
    """Stages to match, "stage2" or "student-stage:teacher-stage"; left out, all stages of the same name."""
    time_chunk: Annotated[int, Field(ge=0)] = 0
    """Most time steps computed at once, the rest in turn and again backward, for a long T; 0 is all."""


class LossTable(Part):
    """One `[[losses]]` entry: a term of the objective."""

    name: str
    """A registered loss."""
    weight: NonNegative = 1.0
    """Its factor in the sum."""


class Recipe(Section):
    """A whole experiment. `Recipe.load` reads one from a file or by a shipped recipe's name."""

    seed: Annotated[int, Field(ge=0)] = 0
    """All random numbers are keyed by it."""
    device: str = "auto"
    """"auto" (CUDA if present), "cpu", "cuda" or "cuda:N"."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of convolutions and matrix products (autocast); fp16 uses a gradient scaler."""
    deterministic: bool = False
    """Only operations that repeat to the last bit, on CUDA too; one that cannot is an error (docs/reliability.md)."""
    save_minutes: NonNegative = 10.0
    """Minutes between saves of the full state, besides one after each epoch; 0 saves after every step."""
    plugins: list[str] = []
    """Python files beside the recipe, or modules, that register parts of your own."""
    data: DataTable = DataTable()
    """The images."""
    teacher: TeacherTable | None = None
    """The ANN; left out, the student trains alone."""
    student: StudentTable
    """The spiking network."""
    distill: DistillTable = DistillTable()
    """The student's training."""
    losses: list[LossTable] = []
    """The complete objective; left out, cross-entropy (weight 1) and, with a teacher, attention (weight 1000)."""

    _source: str = PrivateAttr("recipe")
    _folder: Path = PrivateAttr(Path())
    _overridden: frozenset[str] = PrivateAttr(frozenset())

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return Path(self._source).stem

    @property
    def plugin_files(self) -> list[Path]:
        """Those plugins that are files."""
        return [self._folder / plugin for plugin in self.plugins if _is_file(plugin)]

    @property
    def data_root(self) -> Path:
        """Where the data set's files lie (see `lasnn.recipe.paths.located`)."""
        return located(self.data.root, "data.root", self._folder, "root" in self.data.model_fields_set)

    @property
    def teacher_checkpoint(self) -> Path | None:
        """Where the teacher's weights lie; None where they are trained, or there is no teacher."""
        checkpoint = self.teacher.checkpoint if self.teacher else None
        return None if checkpoint is None else located(checkpoint, "teacher.checkpoint", self._folder)

    @property
    def time_chunk(self) -> int:
        """Time steps that training computes at once where that is fewer than T, else 0."""
        return self.distill.time_chunk if self.distill.time_chunk < self.student.timesteps else 0

    def plugin_sources(self) -> list[Path]:
        """The file of every plugin, those of modules too."""
        modules = [sys.modules[plugin].__file__ for plugin in self.plugins if not _is_file(plugin)]
        return self.plugin_files + [Path(file) for file in modules if file]

    @classmethod
    def load(cls, recipe: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> "Recipe":
        """Read and check a recipe.

        Args:
            recipe: path of a TOML file, or the name of a shipped recipe.
            overrides: `key.path=value` settings, applied in order; values are TOML, bare words are text, and nothing
                after the equals sign removes the key.

        Raises:
            UserError: everything that is wrong, a line each.
        """
        path = find(recipe)
        try:
            with path.open("rb") as file:
                content = file.read(LARGEST + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        tables = parse(content, str(path))
        problems, overridden = [], set()
        for setting in overrides:
            try:
                overridden.add(_override(tables, setting))
            except ValueError as error:
                problems.append(f"--set {printable(setting)}: {error}")
        if "teacher.checkpoint" in overridden and isinstance(tables.get("teacher"), dict):
            # The file says how its teacher is trained; with another teacher named instead, that is beside the point.
            for key in _TEACHER_TRAINING:
                if f"teacher.{key}" not in overridden:
                    tables["teacher"].pop(key, None)
        return cls.from_tables(tables, source=str(path), overridden=overridden, problems=problems)

    @classmethod
    def from_tables(
        cls,
        tables: dict[str, Any],
        source: str = "recipe",
        overridden: set[str] = frozenset(),
        problems: list[str] = (),
    ) -> "Recipe":
        """Check a recipe given as nested dicts, as `tomllib` returns them.

        Args:
            source: what messages call the recipe; plugins are looked for in its folder.
            overridden: keys whose mistakes are blamed on `--set`.
            problems: lines found so far, reported with the rest.

        Raises:
            UserError: everything that is wrong, a line each.
        """

        from lasnn.recipe.messages import _faults, _line

        def line(key: str, message: str) -> str:
            return _line(source, overridden, key, message)

        found, keys = list(problems), set()
        if beyond := dict(_beyond(tables)):
            raise RecipeError([*found, *(line(key, message) for key, message in beyond.items())], None, beyond)
        tables = copy.deepcopy(tables)
        recipe = None
        # A second look without the faulty keys finds what is wrong with the rest of the recipe.
        for _ in range(8):
            try:
                recipe = cls.model_validate_json(json.dumps(tables, default=str), strict=True)
                break
            except ValidationError as error:
                faults = list(_faults(error))
                found += [line(".".join(map(str, place)), message) for place, message in faults]
                keys.update(".".join(map(str, place)) for place, _ in faults)
                removed = [_remove(tables, place) for place, _ in faults]
                if not all(removed):
                    break
        if recipe is not None:
            recipe._source, recipe._folder, recipe._overridden = source, Path(source).parent, frozenset(overridden)
            wrong = _check_parts(recipe)
            found += [line(key, message) for key, message in wrong]
            keys.update(key for key, _ in wrong)
            recipe = recipe._without(tables, [key for key, _ in wrong])
        if found or recipe is None:
            raise RecipeError(found, recipe, keys or {""})
        return recipe._filled_in()

    def _without(self, tables: dict[str, Any], keys: list[str]) -> "Recipe | None":
        """The recipe without its faulty options, None where they are needed; names that are not known stay."""
        for key in keys:
            place = _place(tables, key)
            if place[-1] not in ("name", "architecture", "encoder"):
                _remove(tables, place)
        try:
            rest = Recipe.model_validate_json(json.dumps(tables, default=str), strict=True)
        except ValidationError:
            return None
        rest._source, rest._folder, rest._overridden = self._source, self._folder, self._overridden
        return rest

    def _filled_in(self) -> "Recipe":
        """The same recipe with everything that was left out written down."""
        terms = self.losses or [LossTable(name="cross-entropy", weight=1.0)]
        if not self.losses and self.teacher:
            terms = [*terms, LossTable(name="attention", weight=1000.0)]
        data = self.data
        if data.augment is None:
            images = datasets.build(data.name, self.data_root, **data.options)
            data = data.model_copy(update={"augment": list(images.augment)})
        filled = self.model_copy(update={"losses": terms, "data": data})
        filled._source, filled._folder, filled._overridden = self._source, self._folder, self._overridden
        return filled

    def line(self, key: str, message: str) -> str:
        """An error line about a key of this recipe."""
        from lasnn.recipe.messages import _line

        return _line(self._source, self._overridden, key, message)

    def to_toml(self) -> str:
        """The recipe as TOML; reading it gives an equal recipe."""
        tables = self.model_dump(exclude_none=True)
        if self.teacher and self.teacher.checkpoint is not None:
            # A teacher that is read from a file has no training settings, and may not be given any.
            for key in _TEACHER_TRAINING:
                del tables["teacher"][key]
        if self.teacher and self.teacher.activation != "qcfs":
            del tables["teacher"]["levels"]
        return dump_toml(tables)


def _check_parts(recipe: Recipe) -> list[tuple[str, str]]:
    """(key, message) for what is wrong beyond the types of the keys."""
    from lasnn.recipe.messages import _title

    found = list(_load_plugins(recipe))
    supplied = ("in_channels", "num_classes")
    named = [
        ("data", "name", datasets, recipe.data.name, recipe.data.options, ()),
        (
            "student",
            "architecture",
            architectures,
            recipe.student.architecture,
            recipe.student.options,
            supplied,
        ),
        ("student.neuron", "name", neurons, recipe.student.neuron.name, recipe.student.neuron.options, ()),
    ]
    if recipe.teacher:
        teacher = recipe.teacher
        known = teacher_registry(teacher.architecture)
        named.append(("teacher", "architecture", known, teacher.architecture, teacher.options, supplied))
    encoder = recipe.student.encoder_table
    if isinstance(recipe.student.encoder, str):
        named.append(("student", "encoder", encoders, encoder.name, {}, ()))
    else:
        named.append(("student.encoder", "name", encoders, encoder.name, encoder.options, ()))
    for index, loss in enumerate(recipe.losses):
        named.append((f"losses.{index}", "name", losses, loss.name, loss.options, ()))
    for index, step in enumerate(recipe.data.augment or []):
        if isinstance(step, str):
            named.append(("data", "augment", augmentations, step, {}, ()))
        else:
            named.append((f"data.augment.{index}", "name", augmentations, step.name, step.options, ()))
    for table, key, registry, name, options, given in named:
        model = _model_of(table)
        if name not in registry:
            known = {*architectures, *teachers} if table == "teacher" else registry
            found.append((f"{table}.{key}", unknown(registry.kind, name, known)))
            # Its options are not known either, but a key that is nearly one of the table's is a slip all the same.
            for option in options:
                if model and get_close_matches(option, model.model_fields, cutoff=0.8):
                    title = _title(tuple(table.split(".")))
                    found.append((f"{table}.{option}", unknown(f"key of {title}", option, model.model_fields)))
            continue
        for option, message in registry[name].problems(options, given):
            if model and option in options and option not in set(registry[name].options) - set(given):
                # The key may be a misspelt key of the table just as well as of the part's options.
                known = {*model.model_fields, *registry[name].options} - set(given)
                message = unknown(f"key of {_title(tuple(table.split('.')))} with {name!r}", option, known)
            found.append((f"{table}.{option}", message))
    return found + _check_objective(recipe)


def teacher_registry(name: str) -> Registry:
    """The registry of a teacher's architecture: those that are built as students too, or those that only teach."""
    # The second reads torchvision, which takes a second: not without need.
    only_teaches = name not in architectures and (name.startswith("torchvision") or name in teachers)
    return teachers if only_teaches else architectures


def _model_of(table: str) -> type[Part]:
    """The model of a table given as `student.neuron` or `losses.1`."""
    from lasnn.recipe.messages import _field

    return _field((*table.split("."), ""))[0]


def _check_objective(recipe: Recipe) -> list[tuple[str, str]]:
    found = []
    needs = {loss.name: losses[loss.name].inputs for loss in recipe.losses if loss.name in losses}
    felt = [needs[loss.name] for loss in recipe.losses if loss.name in needs and loss.weight > 0]
    if needs and not any("logits" in inputs for inputs in felt):
        with_logits = [name for name in losses if "logits" in losses[name].inputs]
        found.append(
            ("losses", f"no loss on the student's logits (with a weight above 0); add one of: {', '.join(with_logits)}")
        )
    for index, loss in enumerate(recipe.losses):
        if recipe.teacher is None and any("teacher" in name for name in needs.get(loss.name, ())):
            found.append((f"losses.{index}.name", f"{loss.name!r} needs a teacher; add a [teacher] section"))
    names = [loss.name for loss in recipe.losses]
    for name in sorted({name for name in names if names.count(name) > 1}):
        found.append(("losses", f"{name!r} stands there {names.count(name)} times; each term is logged by its name"))
    teacher = recipe.teacher
    if teacher is not None and teacher.checkpoint is not None:
        for key in sorted(teacher.model_fields_set & _TEACHER_TRAINING):
            found.append((f"teacher.{key}", "has no effect with teacher.checkpoint; leave one of the two out"))
    if teacher is not None and teacher.activation != "qcfs" and "levels" in teacher.model_fields_set:
        message = f'has no effect with activation = "{teacher.activation}"; leave it out, or set activation = "qcfs"'
        found.append(("teacher.levels", message))
    if teacher is not None and teacher.activation != "relu" and teacher_registry(teacher.architecture) is teachers:
        message = f"{teacher.architecture!r} brings activations of its own; leave it out, or name an architecture"
        found.append(("teacher.activation", message))
    for key, training in (("teacher", teacher), ("distill", recipe.distill)):
        if training is not None and training.warmup_epochs > training.epochs:
            found.append(
                (f"{key}.warmup_epochs", f"{training.warmup_epochs:g} is longer than the {training.epochs} epochs")
            )
        if training is not None and training.min_lr > training.lr:
            found.append((f"{key}.min_lr", f"{training.min_lr:g} is above lr = {training.lr:g}"))
    if recipe.student.init == "teacher" and teacher is None:
        found.append(("student.init", "there is no [teacher] to start from"))
    return found
