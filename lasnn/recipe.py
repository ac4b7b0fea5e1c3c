"""The recipe: an experiment as one strict, typed TOML file.

Every mistake in a recipe is found before the first batch and all of them are reported together. A key that is not
listed here, in `[data]`, `[teacher]`, `[student]`, `[student.neuron]`, the encoder's table or a `[[losses]]` entry, is
an option of the registered part that the table names, and is checked against that part's signature.
"""

import copy
import hashlib
import importlib
import importlib.util
import json
import logging
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from lasnn.errors import UserError, printable, unknown
from lasnn.registry import (
    Registry,
    architectures,
    augmentations,
    datasets,
    describe_limits,
    describe_type,
    encoders,
    losses,
    neurons,
    teachers,
)

# Bytes of a recipe's file, and levels of its tables and lists: what is beyond is no recipe.
LARGEST, DEEPEST = 2**20, 16
LARGEST_INTEGER, LARGEST_SEED = 2**31 - 1, 2**63 - 1

# Nothing runs a recipe's code unseen: each plugin is named before it is loaded.
log = logging.getLogger("lasnn")

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
            images = datasets.build(data.name, Path(data.root), **data.options)
            data = data.model_copy(update={"augment": list(images.augment)})
        filled = self.model_copy(update={"losses": terms, "data": data})
        filled._source, filled._folder, filled._overridden = self._source, self._folder, self._overridden
        return filled

    def line(self, key: str, message: str) -> str:
        """An error line about a key of this recipe."""
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


def parse(content: bytes, source: str) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UserError: it is no TOML; one line that names the line of the file.
    """
    if len(content) > LARGEST:
        lines = content.count(b"\n")
        raise UserError(f"{source}: line {lines}: it goes on after {LARGEST:,} bytes; that is no recipe")
    try:
        text = content.decode()
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        at = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}: line {at}: not valid TOML: it is not UTF-8 ({error.reason})") from error
    except RecursionError as error:
        at = max(enumerate(text.splitlines(), 1), key=lambda line: line[1].count("[") + line[1].count("{"))[0]
        raise UserError(f"{source}: line {at}: not valid TOML: nested too deeply") from error
    except ValueError as error:
        # TOML's own errors name their line; Python's limit on the digits of a number does not.
        long = re.search(r"\d[\d_]{4000}", text) if not isinstance(error, tomllib.TOMLDecodeError) else None
        where = f"line {text.count(chr(10), 0, long.start()) + 1}: " if long else ""
        raise UserError(f"{source}: {where}not valid TOML: {str(error).partition(';')[0]}") from error


def _beyond(tables: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, message) of values that no recipe has: tables in tables without end, numbers that no size can be."""
    inner = [("", 0, tables)]
    while inner:
        key, depth, value = inner.pop()
        if depth > DEEPEST:
            yield key, "is nested deeper than any key of a recipe"
            continue
        largest = LARGEST_SEED if key == "seed" else LARGEST_INTEGER
        if isinstance(value, int) and abs(value) > largest:
            yield key, f"{value if abs(value) < 1e40 else 'a number of very many digits'} is too large"
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        inner += [(f"{key}.{name}" if key else str(name), depth + 1, item) for name, item in pairs]


def find(recipe: str | Path) -> Path:
    """The file of a recipe given as a path or as a shipped recipe's name.

    Raises:
        UserError: there is neither.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    known = shipped()
    if str(recipe) in known:
        return known[str(recipe)]
    if path.is_dir() and (path / "recipe.toml").is_file():
        return path / "recipe.toml"
    raise UserError(f"no such file, and {unknown('recipe', path.stem, known)}")


def shipped() -> dict[str, Path]:
    """The recipes that come with lasnn, name -> file."""
    import lasnn.recipes

    folder = Path(lasnn.recipes.__file__).parent
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def summary(path: Path) -> str:
    """What a recipe file says of itself: the first line of its header comment."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def fields(model: type[BaseModel]) -> list[tuple[str, str, Any, str]]:
    """(key, type, default, what it means) of each key of a table; `None` is the default of what may be left out."""
    return [
        (
            name,
            describe_type(info.annotation) + describe_limits(info.metadata),
            "required" if info.is_required() else info.get_default(call_default_factory=True),
            info.description or "",
        )
        for name, info in model.model_fields.items()
    ]


def _line(source: str, overridden: Iterable[str], key: str, message: str) -> str:
    """One line about a key; what `--set` brought is blamed on it, not on the file."""
    blamed = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in overridden)
    return f"{'--set' if blamed else source}: {printable(key, 100)}: {printable(message)}"


def _check_parts(recipe: Recipe) -> list[tuple[str, str]]:
    """(key, message) for what is wrong beyond the types of the keys."""
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


_loaded_plugins: dict[str, str] = {}


def _is_file(plugin: str) -> bool:
    return plugin.endswith(".py") or "/" in plugin


def _load_plugins(recipe: Recipe):
    """Import the plugins; yields (key, message) for those that fail."""
    for index, plugin in enumerate(recipe.plugins):
        key = f"plugins.{index}"
        try:
            if not _is_file(plugin):
                _import_module(plugin)
                continue
            path = recipe._folder / plugin
            if Path(plugin).name != plugin:
                yield key, f"{plugin!r} must lie beside the recipe, in {recipe._folder.resolve()}"
            elif not path.is_file():
                yield key, f"no file {path}; a plugin is a Python file beside the recipe, or a module's name"
            else:
                _import_once(path)
        except UserError as error:
            yield key, f"{plugin}: {error}"
        except Exception as error:
            # Whatever the user's code raises is the user's to mend; the line says where it was raised.
            if isinstance(error, ModuleNotFoundError) and not _is_file(plugin) and plugin.startswith(error.name or "-"):
                yield key, f"no module {error.name!r}; install it, or name its folder in PYTHONPATH"
                continue
            line = f"{plugin} cannot be imported: {type(error).__name__}: {error}{_place_in(plugin, error)}"
            yield key, line


def _place_in(plugin: str, error: BaseException) -> str:
    place, traceback = "", error.__traceback__
    while traceback:
        if Path(traceback.tb_frame.f_code.co_filename).name == Path(plugin).name:
            place = f" (line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return place


def _import_module(name: str) -> None:
    """Import a module, and say where it lies the first time."""
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        log.info("plugin: %s", spec.origin or name if spec else name)
    importlib.import_module(name)


def _import_once(path: Path) -> None:
    """Import a file; the copy of a file that is already loaded (a run folder's) registers nothing twice."""
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    if content in _loaded_plugins:
        return
    log.info("plugin: %s", path.resolve())
    name = f"lasnn_plugin_{path.stem}_{content[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _loaded_plugins[content] = name


def _override(tables: dict[str, Any], setting: str) -> str:
    """Apply `a.b=c` to the tables; returns the key. `losses.attention.weight` finds a list's entry by its name, and is
    returned with the entry's number.
    """
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError("write it as key=value, for example student.timesteps=2")
    if not setting.isprintable() and any("\ud800" <= character <= "\udfff" for character in setting):
        raise ValueError("it is not UTF-8")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    steps: list[str | int] = []
    here: Any = tables
    for step in key.split("."):
        if steps:
            where = ".".join(map(str, steps))
            if isinstance(here, dict):
                here = here.setdefault(steps[-1], {})
            else:
                here = here[steps[-1]]
            if not isinstance(here, (dict, list)):
                raise ValueError(f"{where} is a value, not a table")
        steps.append(_entry(here, step, ".".join(map(str, steps))) if isinstance(here, list) else step)
    if text.strip():
        here[steps[-1]] = value
    elif isinstance(here, list) or steps[-1] in here:
        del here[steps[-1]]
    else:
        raise ValueError("the recipe has no such key to remove")
    return ".".join(map(str, steps))


def _entry(entries: list, step: str, where: str) -> int:
    """The number of the list's entry that is named `step`, or has that number."""
    for number, entry in enumerate(entries):
        if isinstance(entry, dict) and entry.get("name") == step:
            return number
    if step.isdecimal() and int(step) < len(entries):
        return int(step)
    names = [str(entry["name"]) for entry in entries if isinstance(entry, dict) and "name" in entry]
    raise ValueError(unknown(f"entry of {where}", step, names))


def _faults(error: ValidationError):
    """(place, message) of each of pydantic's errors, in lasnn's words."""
    seen = set()
    for fault in error.errors(include_url=False):
        if fault["loc"][-1] == "str" and isinstance(fault["input"], dict):
            continue  # "or text" is no advice for what is written as a table
        place = tuple(part for part in fault["loc"] if part not in ("str", "EncoderTable", "AugmentTable"))
        if place in seen:
            continue
        seen.add(place)
        model, info = _field(place)
        if fault["type"] == "extra_forbidden":
            message = unknown(f"key of {_title(place[:-1])}", place[-1], model.model_fields if model else ())
        elif fault["type"] == "missing":
            message = f"missing; {_title(place[:-1])} needs it"
        elif info is not None:
            kind = describe_type(info.annotation)
            message = f"{fault['input']!r} is not valid; it takes {kind}{describe_limits(info.metadata)}"
        else:
            message = f"{fault['input']!r} is not valid: {fault['msg'].lower()}"
        yield place, message


def _title(place: tuple) -> str:
    if not place:
        return "the recipe"
    return f"[[{place[0]}]]" if place[0] == "losses" else f"[{'.'.join(map(str, place))}]"


def _field(place: tuple):
    """The model that holds the last part of `place` and its field, where there is one."""
    tables = {
        "data": DataTable,
        "teacher": TeacherTable,
        "student": StudentTable,
        "distill": DistillTable,
        "losses": LossTable,
        "neuron": NeuronTable,
        "encoder": EncoderTable,
        "augment": AugmentTable,
    }
    model: type[BaseModel] = Recipe
    for part in place[:-1]:
        if isinstance(part, str):
            model = tables.get(part, model)
    return model, model.model_fields.get(place[-1]) if isinstance(place[-1], str) else None


def _place(here: Any, key: str) -> tuple:
    """Where a dotted key leads in nested tables; the names on the way may have dots themselves."""
    if isinstance(here, list):
        number, _, rest = key.partition(".")
        return (int(number), *(_place(here[int(number)], rest) if rest else ()))
    if isinstance(here, dict) and key not in here:
        for name in here:
            if key.startswith(f"{name}."):
                return (name, *_place(here[name], key.removeprefix(f"{name}.")))
    return (key,)


def _remove(tables: dict[str, Any], place: tuple) -> bool:
    """Delete the value at `place`; False if there is nothing to delete (a missing key)."""
    here: Any = tables
    try:
        for part in place[:-1]:
            here = here[part]
        del here[place[-1]]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def dump_toml(tables: dict[str, Any], prefix: str = "") -> str:
    """Nested dicts as TOML: values first, then tables, then lists of tables."""
    values, nested = [], []
    for key, value in tables.items():
        if isinstance(value, dict):
            nested.append(f"\n[{prefix}{key}]\n{dump_toml(value, f'{prefix}{key}.')}")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            nested += [f"\n[[{prefix}{key}]]\n{dump_toml(item, f'{prefix}{key}.')}" for item in value]
        else:
            values.append(f"{key} = {toml_value(value)}\n")
    return "".join(values + nested)


def toml_value(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml_value(item)}' for key, item in value.items())} }}"
    # JSON's text, true, false and finite numbers are TOML's as well; its NaN and Infinity are not, nor a bare DEL.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(text, text)
