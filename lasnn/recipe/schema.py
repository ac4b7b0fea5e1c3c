"""The recipe: an experiment as one strict, typed TOML file.

Every mistake in a recipe is found before the first batch and all of them are reported together. A key that is not
listed here, in `[data]`, `[teacher]`, `[student]`, `[student.neuron]`, the encoder's table or a `[[losses]]` entry, is
an option of the registered part that the table names, and is checked against that part's signature.
"""

import math
import re
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from lasnn.recipe import check, load, messages
from lasnn.recipe.paths import expanded, located
from lasnn.recipe.plugins import is_file, module_file, module_version, use_version, version_of
from lasnn.registry import architectures

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


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
    """SGD with momentum, or AdamW."""
    lr: Positive = 0.1
    """Learning rate at the end of the warm-up."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the schedule; with schedule = "step" a lower bound."""
    warmup_epochs: NonNegative = 0.0
    """Epochs of linear warm-up from 0; fractions are allowed."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD; AdamW's first beta."""
    weight_decay: NonNegative = 5e-4
    """L2 penalty of SGD, decoupled decay of AdamW."""
    clip_norm: NonNegative = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""
    schedule: Literal["cosine", "step", "warmup-stable-decay"] = "cosine"
    """How `lr` goes on after the warm-up: half a cosine; a factor at milestones; constant, then linearly down."""
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] | None = None
    """For schedule = "step": shares of the training at which `lr` is multiplied by `gamma`, none in []; left out,
    [0.5, 0.75]."""
    gamma: Annotated[float, Field(gt=0, lt=1)] | None = None
    """For schedule = "step": the factor; left out, 0.1."""
    decay_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """For "warmup-stable-decay": the last share of the training, in which `lr` falls to `min_lr`; left out, 0.2."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights, as 0.999; the average is then measured and saved. 0 turns it off."""


class AugmentTable(Part):
    """An augmentation as a table, where it has options."""

    name: str
    """A registered augmentation."""


class DataTable(Part):
    """`[data]`: which images, from where, in what batches."""

    name: str = "fashion-mnist-mini"
    """A registered data set."""
    root: str = "data"
    """Folder of the data set's files, from the working directory; `~` is the home."""
    batch_size: Count = 128
    """Images a step, over all processes."""
    accumulate: Count = 1
    """Gradient accumulation: parts that a batch is computed in, to need less memory; batch norm sees each alone."""
    residence: Literal["auto", "device", "stream"] = "auto"
    """Images on the device, or streamed to it; "auto" streams what takes more than half of its free memory."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that read ahead where images are streamed."""
    validation: Annotated[int, Field(ge=0)] = 0
    """Training images that are held out: never trained on, measured after every epoch."""
    augment: list[str | AugmentTable] | None = None
    """Augmentations in order, by name or as tables with their options; left out, those of the data set."""


class TeacherTable(Training, Part):
    """`[teacher]`: the ANN, trained first and cached, or read from a checkpoint."""

    architecture: str
    """A registered architecture, or a network that only teaches (`lasnn list teachers`)."""
    checkpoint: str | None = None
    """A file of weights, or a run folder whose teacher is taken (docs/teachers.md); nothing is trained then."""
    stages: dict[str, str] | None = None
    """Of a plugin's whole network: the modules that are stages, as { stage1 = "layer1", stage2 = "blocks.5" }."""
    activation: Literal["relu", "qcfs"] = "relu"
    """Activation function; "qcfs" (Bu et al., ICLR 2022) prepares the network for conversion: `--converted qcfs`."""
    levels: Count = 4
    """Levels of the "qcfs" activation above 0; its authors' code has 4 for CIFAR-10, 8 for CIFAR-100."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of the teacher's cross-entropy."""
    min_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Accuracy on the test images, 0 to 1, below which the teacher is refused before the student is trained."""

    training_keys: ClassVar[frozenset[str]] = frozenset({*Training.model_fields, "label_smoothing"})


class StartTable(TeacherTable):
    """`[start]`: the ANN twin of the student, whose weights it starts from; trained and cached as a teacher is."""


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
    init: Annotated[
        str, Field(json_schema_extra={"anyOf": [{"enum": list(check.INITS)}, {"type": "string", "pattern": r"[/\\]"}]})
    ] = "auto"
    """Where the student's weights start: "random"; "teacher", a copy of its teacher's; "copied" or "converted", those
    of `[start]`, or of the teacher where there is none, as they are or balanced for T; "auto", converted where the
    weights fit, copied where they cannot be converted, otherwise random; or a path with a slash, a run folder (its
    student) or a file of weights."""

    @property
    def encoder_table(self) -> EncoderTable:
        """The encoder, always as a table."""
        return EncoderTable(name=self.encoder) if isinstance(self.encoder, str) else self.encoder

    calibration: Literal["images", "none"] = "images"
    """Where a converted start takes its currents from: "images" measures some training images; "none" takes the batch
    norms' own scales and shifts."""

    @property
    def init_is_path(self) -> bool:
        """Whether `init` names a run folder or a file."""
        return self.init not in check.INITS


class DistillTable(Training, Section):
    """`[distill]`: how the student is trained."""

    pairs: list[str] | None = None
    """Stages to match, "stage2" or "student-stage:teacher-stage"; left out, all stages of the same name."""
    time_chunk: Annotated[int, Field(ge=0)] = 0
    """Time steps computed at once; chunks are computed again in the backward pass, which saves memory at a long T;
    0 is all of them."""
    diagnostics: bool = True
    """Measure after each epoch what each loss does to the student, and how its stages spike."""


class LossTable(Part):
    """One `[[losses]]` entry: a term of the objective."""

    name: str
    """A registered loss."""
    weight: NonNegative = 1.0
    """Its factor in the sum."""
    schedule: Literal["constant", "cosine", "until"] = "constant"
    """How the weight changes: "constant"; "cosine", down to 0 over the training; "until", 0 after the share `until`."""
    until: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share of the training after which the weight is 0; for schedule = "until"."""

    def weight_at(self, done: float) -> float:
        """The weight after a share of the training, from 0 at its first step to below 1 at its last."""
        if self.schedule == "cosine":
            return self.weight * (1 + math.cos(math.pi * done)) / 2
        return 0.0 if self.until is not None and done >= self.until else self.weight

    def weight_in(self, epoch: int, epochs: int) -> float:
        """The mean weight over an epoch, which counts from 1."""
        first, last = (epoch - 1) / epochs, epoch / epochs
        if self.schedule == "cosine":
            return self.weight * (1 + epochs * (math.sin(math.pi * last) - math.sin(math.pi * first)) / math.pi) / 2
        done = 1.0 if self.until is None else min(max((self.until - first) / (last - first), 0.0), 1.0)
        return self.weight * done


class Recipe(Section):
    """A whole experiment. `Recipe.load` reads one from a file or by a shipped recipe's name."""

    seed: Annotated[int, Field(ge=0)] = 0
    """All random numbers are keyed by it."""
    device: Annotated[
        str, Field(json_schema_extra={"anyOf": [{"enum": ["auto", "cpu", "cuda"]}, {"type": "string"}]})
    ] = "auto"
    """"auto" (CUDA if present), "cpu", "cuda" or "cuda:N"."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of convolutions and matrix products (autocast). "auto" is bf16 on a GPU that has it, else fp32; fp16
    uses a gradient scaler."""
    deterministic: bool = False
    """Only operations that repeat to the last bit, on CUDA too; one that cannot is an error (docs/reliability.md)."""
    compile: bool = False
    """Compile the student's training pass (torch.compile, one graph); no gain on a CPU (docs/benchmarks.md)."""
    save_minutes: NonNegative = 10.0
    """Minutes between saves of the full state, besides one after each epoch; 0 saves after every step."""
    plugins: list[str] = []
    """Python files beside the recipe, or modules, that register parts of your own."""
    data: DataTable = DataTable()
    """The images."""
    teacher: TeacherTable | None = None
    """The ANN; left out, the student trains alone."""
    start: StartTable | None = None
    """The ANN twin of the student that it starts from; left out, this is the teacher where it can be."""
    student: StudentTable
    """The spiking network."""
    distill: DistillTable = DistillTable()
    """The student's training."""
    losses: list[LossTable] = []
    """The complete objective; left out, cross-entropy (weight 1) alone: what is safe on unknown data."""

    _source: str = PrivateAttr("recipe")
    _folder: Path = PrivateAttr(Path())
    _overridden: frozenset[str] = PrivateAttr(frozenset())
    # Of the plugins, as they were when the recipe was read.
    _versions: tuple[str, ...] = PrivateAttr(())

    @property
    def name(self) -> str:
        """The file's name without its ending; of a run's recipe the name that its folder has, without its number."""
        return Path(self._source).stem if self.run_folder is None else re.sub(r"-\d+$", "", self.run_folder.name)

    @property
    def folder(self) -> Path:
        """Where its plugins lie."""
        return self._folder

    @property
    def run_folder(self) -> Path | None:
        """The run folder whose recipe this is; None where it is a file of its own."""
        folder = self._folder.absolute()
        return folder if Path(self._source).name == "recipe.toml" and (folder / "env.json").is_file() else None

    @property
    def plugin_files(self) -> list[Path]:
        """Those plugins that are files."""
        return [self._folder / plugin for plugin in self.plugins if is_file(plugin)]

    @property
    def data_root(self) -> Path:
        """Where the data set's files lie (see `lasnn.recipe.paths.located`)."""
        return self._located("data.root", self.data.root, left_out="root" not in self.data.model_fields_set)

    @property
    def teacher_checkpoint(self) -> Path | None:
        """Where the teacher's weights lie; None where they are trained, or there is no teacher."""
        checkpoint = self.teacher.checkpoint if self.teacher else None
        return None if checkpoint is None else self._located("teacher.checkpoint", checkpoint)

    @property
    def start_checkpoint(self) -> Path | None:
        """Where the weights of `[start]` lie; None where they are trained, or there is no such table."""
        checkpoint = self.start.checkpoint if self.start else None
        return None if checkpoint is None else self._located("start.checkpoint", checkpoint)

    @property
    def init_path(self) -> Path | None:
        """The run folder or file whose weights the student starts from; None where `student.init` is no path."""
        return self._located("student.init", self.student.init) if self.student.init_is_path else None

    @property
    def twins(self) -> bool:
        """Whether teacher and student are of one architecture with the same options, those left out too."""
        same = self.teacher is not None and self.teacher.architecture == self.student.architecture
        return same and not self.other_options(self.teacher)

    def other_options(self, ann: TeacherTable) -> dict[str, tuple[Any, Any]]:
        """Which options of the student's architecture an ANN of it has otherwise: its value and the student's, those
        left out too.
        """
        options = architectures[self.student.architecture].options
        pairs = {
            name: tuple(table.options.get(name, option.default) for table in (ann, self.student))
            for name, option in options.items()
        }
        return {name: values for name, values in pairs.items() if values[0] != values[1]}

    def _located(self, key: str, written: str, left_out: bool = False) -> Path:
        if key in self._overridden:
            # It was typed just now, in this working directory.
            return expanded(written, key)
        return located(written, key, self._folder, left_out)

    @property
    def time_chunk(self) -> int:
        """Time steps that training computes at once where that is fewer than T, else 0."""
        return self.distill.time_chunk if self.distill.time_chunk < self.student.timesteps else 0

    def plugin_sources(self) -> list[Path]:
        """The file of every plugin, those of modules too."""
        modules = [module_file(plugin) for plugin in self.plugins if not is_file(plugin)]
        return self.plugin_files + [file for file in modules if file]

    def plugin_versions(self) -> list[str]:
        """What tells each plugin, as it is now, from others of its name."""
        files = len(self.plugin_files)
        sources = self.plugin_sources()
        return [*map(version_of, sources[:files]), *map(module_version, sources[files:])]

    def use_plugins(self) -> None:
        """Let the parts that this recipe's plugins registered count, where other versions of them were loaded since."""
        for version in self._versions:
            use_version(version)

    def changed_plugins(self) -> list[Path]:
        """The files of the plugins that were edited, or removed, since the recipe was read."""
        if gone := [file for file in self.plugin_sources() if not file.is_file()]:
            return gone
        versions = zip(self.plugin_sources(), self._versions, self.plugin_versions(), strict=True)
        return [file for file, version, now in versions if now != version]

    @classmethod
    def load(cls, recipe: str | Path, overrides: Iterable[str] = ()) -> "Recipe":
        """Read and check a recipe.

        Args:
            recipe: path of a TOML file, or the name of a shipped recipe.
            overrides: `key.path=value` settings, applied in order, or one alone; values are TOML, bare words are
                text, and nothing after the equals sign removes the key.

        Raises:
            UserError: everything that is wrong with its form (keys, types, names, options), a line each.
        """
        found = load.read(recipe, overrides)
        for name in ("teacher", "start"):
            table = found.tables.get(name)
            if f"{name}.checkpoint" in found.overridden and isinstance(table, dict) and "checkpoint" in table:
                # The file says how its teacher is trained; with another named instead, that is beside the point.
                for key in TeacherTable.training_keys & table.keys():
                    if f"{name}.{key}" not in found.overridden:
                        del table[key]
        return cls.from_tables(found.tables, found.source, found.overridden, found.problems)

    @classmethod
    def from_tables(
        cls,
        tables: dict[str, Any],
        source: str = "recipe",
        overridden: Set[str] = frozenset(),
        problems: Iterable[str] = (),
    ) -> "Recipe":
        """Check a recipe given as nested dicts, as `tomllib` returns them.

        Args:
            source: what messages call the recipe; plugins are looked for in its folder.
            overridden: keys whose mistakes are blamed on `--set`.
            problems: lines found so far, reported with the rest.

        Raises:
            UserError: everything that is wrong with its form (keys, types, names, options), a line each.
        """
        recipe = check.checked(cls, tables, source, overridden, problems)
        recipe._source, recipe._folder, recipe._overridden = source, Path(source).parent, frozenset(overridden)
        recipe._versions = tuple(recipe.plugin_versions())
        return recipe

    def line(self, key: str, message: str) -> str:
        """An error line about a key of this recipe."""
        return messages.line(self._source, self._overridden, key, message)

    def to_toml(self) -> str:
        """The recipe as TOML; reading it gives an equal recipe."""
        tables = self.model_dump(exclude_none=True)
        for name, table in (("teacher", self.teacher), ("start", self.start)):
            if table and (table.checkpoint is not None or table.stages is not None):
                # What is not trained here has no training settings, and may not be given any.
                for key in TeacherTable.training_keys:
                    tables[name].pop(key, None)
            if table and table.activation != "qcfs":
                del tables[name]["levels"]
        if self.student.init not in check.BALANCED:
            del tables["student"]["calibration"]
        return load.dump_toml(tables)
