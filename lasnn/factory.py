"""From a recipe to its parts: data, networks, device. The only place where they are made.

What a network has to know of its images a `Dataset` says, or the `DatasetDescription` that a run keeps of it.
"""

import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lasnn.data import Augmentation, Dataset, Images, Streamed
from lasnn.data.description import DatasetDescription
from lasnn.data.stream import check_labels, place
from lasnn.encoder import Encoder
from lasnn.errors import UserError
from lasnn.kernels.ops import require_triton
from lasnn.network.staged import Staged, StagedView, build
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import Act, ann_units, snn_units
from lasnn.network.whole import HookedView, WholeView, children_of
from lasnn.recipe.paths import unfinished
from lasnn.recipe.schema import Recipe, StudentTable, TeacherTable
from lasnn.registry import Entry, architectures, datasets, encoders, teachers, translate_errors

TEACHER, STUDENT = "teacher.safetensors", "student.safetensors"
# What a data set says of itself.
FACTS = ("channels", "height", "width", "classes", "mean", "std", "train_size", "test_size")


def make_data(recipe: Recipe) -> Dataset:
    """The recipe's data set; no image is read yet."""
    recipe.use_plugins()
    data = datasets.build(recipe.data.name, recipe.data_root, **recipe.data.options)
    if not isinstance(data, Dataset):
        where = datasets[recipe.data.name].where
        raise UserError(f"data set {recipe.data.name!r} ({where}) must be a lasnn.data.Dataset")
    _check_facts(data, datasets[recipe.data.name])
    return data


def _check_facts(data: Dataset, entry: Entry) -> None:
    """Check what a data set says of itself; one that has to look at its folders for it finds their faults now.

    Raises:
        UserError: it leaves something out, or contradicts itself.
    """
    with translate_errors(entry):
        facts = {name: getattr(data, name, None) for name in FACTS}
        missing = [name for name, value in facts.items() if value is None]
        if missing:
            raise UserError(f"{entry.said} does not say its {', '.join(missing)}; it must say {', '.join(FACTS)}")
        for name in ("mean", "std"):
            if len(facts[name]) != data.channels:
                raise UserError(
                    f"{entry.said}: its {name} has {len(facts[name])} values; it has {data.channels} channels"
                )


def load_data(recipe: Recipe, data: Dataset, device: torch.device) -> tuple[Images | Streamed, Images | Streamed, str]:
    """Read a data set's training and test images, check them against what it says of itself, and place them.

    Returns:
        Training and test images, on the device or streamed to it, and a line that says which and why.

    Raises:
        UserError: a file is missing or broken, or the images are not what was announced.
    """
    entry = datasets[recipe.data.name]
    with translate_errors(entry):
        splits = data.load()
        sizes = (data.train_size, data.test_size)
    if not isinstance(splits, Sequence) or [hasattr(split, "labels") for split in splits] != [True, True]:
        what = "nothing" if splits is None else f"a {type(splits).__name__}"
        raise UserError(f"{entry.said}: load() returned {what}; it returns two lasnn.data.Images, training and test")
    for what, images, size in zip(("training", "test"), splits, sizes, strict=True):
        found, wanted = tuple(images.shape), (size, data.channels, data.height, data.width)
        if found != wanted or size < 1:
            raise UserError(
                f"data set {entry.name!r}: its {what} images are {list(found)}; it announced {list(wanted)}"
            )
        check_labels(images.labels, len(data.classes), f"data set {entry.name!r}: {what}")
    # Those that are held out, and the others, are copies beside the whole.
    copies = sizes[0] if recipe.data.validation else 0
    (train, test), said = place(
        splits, device, residence=recipe.data.residence, workers=recipe.data.workers, copies=copies
    )
    return train, test, said


def make_augmentation(recipe: Recipe, data: Dataset) -> Augmentation:
    """The recipe's augmentations, for the data's images."""
    recipe.use_plugins()
    chosen = data.augment if recipe.data.augment is None else recipe.data.augment
    steps = [step if isinstance(step, str) else step.model_dump() for step in chosen]
    return Augmentation(steps, data.mean, len(data.classes))


def make_encoder(recipe: Recipe, data: Dataset | DatasetDescription) -> Encoder:
    """The student's encoder."""
    recipe.use_plugins()
    table = recipe.student.encoder_table
    encoder = encoders.build(table.name, data.mean, data.std, **table.options)
    if not isinstance(encoder, Encoder):
        raise UserError(f"encoder {table.name!r} ({encoders[table.name].where}) must be a lasnn.encoder.Encoder")
    return encoder


def make_student(recipe: Recipe, data: Dataset | DatasetDescription) -> Student:
    """The student on the current default device, with the layers' own initialisation."""
    recipe.use_plugins()
    table = recipe.student
    act = snn_units(table.neuron.name, **table.neuron.options)
    return Student(make_network(table, act, data), make_encoder(recipe, data), table.timesteps)


def make_teacher(
    recipe: Recipe, data: Dataset | DatasetDescription, name: str = "teacher", *, weights: bool = True
) -> Teacher:
    """The teacher on the current default device, with the layers' own initialisation, or the weights that it brings.

    Args:
        name: "teacher", or "start" for the student's ANN twin.
        weights: False where the caller loads them: what has the option `pretrained` then need not fetch any.

    Raises:
        UserError: it cannot be built, or its `stages` do not suit it.
    """
    recipe.use_plugins()
    table = recipe.start if name == "start" else recipe.teacher
    act = ann_units("qcfs", levels=table.levels) if table.activation == "qcfs" else ann_units(table.activation)
    if table.architecture in architectures:
        _check_no_stages(table, name)
        return Teacher(make_network(table, act, data), data.mean, data.std)
    shape = {"in_channels": data.channels, "num_classes": len(data.classes)}
    entry = teachers[table.architecture]
    options = table.options
    if not weights and "pretrained" in entry.options:
        options["pretrained"] = False
    network = teachers.build(table.architecture, **shape, **options)
    if isinstance(network, (StagedView, WholeView)):
        _check_no_stages(table, name)
    elif isinstance(network, nn.Module) and not isinstance(network, Staged):
        if table.stages is None:
            what = f"stages: {entry.said} returns a {type(network).__name__}, whose stages are not known"
            fix = 'name its modules, as stages = { stage1 = "..." }'
            raise UserError(f"{what}: {fix}; {children_of(network, '')}")
        network = HookedView(network, table.stages)
    else:
        raise UserError(f"{entry.said} returned a {type(network).__name__}; it returns an nn.Module or a StagedView")
    return Teacher(network, *(network.normalisation or (data.mean, data.std)))


def _check_no_stages(table: TeacherTable, name: str) -> None:
    if table.stages is not None:
        raise UserError(f"stages: {table.architecture!r} has stages of its own; leave {name}.stages out")


def make_network(table: StudentTable | TeacherTable, act: Act, data: Dataset | DatasetDescription) -> Staged:
    """The network that a table names, for the data's images."""
    shape = {"in_channels": data.channels, "num_classes": len(data.classes)}
    return build(table.architecture, act, **shape, **table.options)


def pick_device(name: str) -> torch.device:
    """The device that a recipe names.

    Raises:
        UserError: there is no such device here, or what the kernels need on it is not installed.
    """
    device = _named_device(name)
    if device.type == "cuda":
        try:
            require_triton()
        except ImportError as error:
            raise UserError(str(error)) from error
    return device


def pick_precision(recipe: Recipe, device: torch.device) -> str:
    """The recipe's precision, "auto" decided by the device: "fp32", "bf16" or "fp16"."""
    if recipe.precision != "auto":
        return recipe.precision
    return "bf16" if device.type == "cuda" and not emulates_bfloat16(device) else "fp32"


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether the device is known to lack bfloat16's instructions, so that it is several times slower than fp32."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    # Convolutions have it from AVX-512 on; what other processors have is not known here.
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX"))


def _named_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise UserError(f'{name!r} is not a device; it is "auto", "cpu", "cuda" or "cuda:N"')
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f'{name!r} is not here ({torch.cuda.device_count()} CUDA devices found); "auto" takes what is')
    return torch.device(name)


def find_checkpoint(recipe: Recipe, name: str = "teacher") -> Path:
    """The weights file that a path of the recipe means: itself, of any ending, or a run folder's network.

    Args:
        name: "teacher" or "start", whose `checkpoint` it is, a teacher's; or "student", whose `init`.

    Raises:
        UserError: there is none.
    """
    written, path = {
        "teacher": lambda: (recipe.teacher.checkpoint, recipe.teacher_checkpoint),
        "start": lambda: (recipe.start.checkpoint, recipe.start_checkpoint),
        "student": lambda: (recipe.student.init, recipe.init_path),
    }[name]()
    if "://" in written:
        raise UserError(f"{written!r} is an address, and nothing is downloaded; fetch the file, and give its path")
    kept = STUDENT if name == "student" else TEACHER
    fix = f"give a file of torch.save or safetensors, or a run folder that has a {kept}"
    if path.is_dir() and not (path / kept).is_file():
        inside = [file.name for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
        holds = f" (it has {', '.join(inside[:5])}{', ...' * (len(inside) > 5)})" if inside else ""
        raise UserError(f"no file {path / kept}{holds}; {fix}")
    if name == "student" and path.is_dir() and unfinished(path):
        raise UserError(f"the run {path} is not finished; finish it, or give {path / kept}, what it had before")
    path = path / kept if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no file {path}; {fix}")
    return path
