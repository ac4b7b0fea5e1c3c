"""What a recipe will do, found out on the meta device: no data, no memory, no training.

Every distillation starts here, so a tap that does not exist or an image that is too small for the network is
reported before the first batch, together with whatever else is wrong.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lasnn.data import Dataset
from lasnn.errors import UserError, unknown
from lasnn.network import Staged, Student, Teacher, ann_units, build, probe, snn_units
from lasnn.recipe import Recipe
from lasnn.registry import datasets, encoders, losses

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """A stage of the student and the stage of the teacher that it learns from; shapes are (C, H, W)."""

    student: str
    teacher: str
    student_shape: Shape
    teacher_shape: Shape


@dataclass(frozen=True)
class Plan:
    """A checked recipe with what follows from it."""

    recipe: Recipe
    data: Dataset
    device: torch.device
    pairs: tuple[Pair, ...]
    student_parameters: int
    teacher_parameters: int | None
    teacher_checkpoint: Path | None
    steps_per_epoch: int
    memory_bytes: int

    def summary(self) -> dict:
        """The plan as plain values, as `lasnn distill --dry-run --json` prints it."""
        recipe = self.recipe
        epochs = recipe.distill.epochs
        return {
            "recipe": recipe.name,
            "data": recipe.data.name,
            "images": {"train": self.data.train_size, "test": self.data.test_size},
            "image": [self.data.channels, self.data.height, self.data.width],
            "classes": len(self.data.classes),
            "device": str(self.device),
            "precision": recipe.precision,
            "teacher": recipe.teacher.architecture if recipe.teacher else None,
            "teacher_parameters": self.teacher_parameters,
            "teacher_checkpoint": str(self.teacher_checkpoint) if self.teacher_checkpoint else None,
            "student": recipe.student.architecture,
            "student_parameters": self.student_parameters,
            "timesteps": recipe.student.timesteps,
            "encoder": recipe.student.encoder_table.name,
            "neuron": recipe.student.neuron.name,
            "pairs": [
                {
                    "student": pair.student,
                    "teacher": pair.teacher,
                    "student_shape": list(pair.student_shape),
                    "teacher_shape": list(pair.teacher_shape),
                }
                for pair in self.pairs
            ],
            "losses": {loss.name: loss.weight for loss in recipe.losses},
            "steps_per_epoch": self.steps_per_epoch,
            "teacher_steps": self._teacher_steps,
            "student_steps": epochs * self.steps_per_epoch,
            "memory_bytes": self.memory_bytes,
        }

    @property
    def _teacher_steps(self) -> int:
        teacher = self.recipe.teacher
        return 0 if teacher is None or self.teacher_checkpoint else teacher.epochs * self.steps_per_epoch


def make_plan(recipe: Recipe) -> Plan:
    """Build everything that the recipe names on the meta device and check that it fits together.

    Raises:
        UserError: everything that does not, a line each.
    """
    problems: list[str] = []

    def attempt(key: str, make: Callable, default=None):
        try:
            return make()
        except UserError as error:
            problems.extend(recipe.line(key, problem) for problem in error.problems)
            return default

    device = attempt("device", lambda: pick_device(recipe.device))
    if recipe.precision == "fp16" and device is not None and device.type == "cpu":
        problems.append(recipe.line("precision", '"fp16" needs a GPU; on the CPU choose "fp32" or "bf16"'))
    data = make_data(recipe)
    image = (data.channels, data.height, data.width)
    with torch.device("meta"):
        student = attempt("student", lambda: make_student(recipe, data))
        shapes = student and attempt(
            "student", lambda: probe(student.network, image, recipe.student.timesteps), default={}
        )
        teacher = recipe.teacher and attempt("teacher", lambda: make_teacher(recipe, data))
        teacher_shapes = teacher and attempt("teacher", lambda: probe(teacher.network, image), default={})
    checkpoint = None
    if teacher and recipe.teacher.checkpoint is not None:
        checkpoint = attempt("teacher.checkpoint", lambda: find_checkpoint(recipe.teacher.checkpoint))
        if checkpoint:
            attempt("teacher.checkpoint", lambda: check_weights(checkpoint, teacher.network, len(data.classes)))
    pairs: list[Pair] = []
    if student and teacher:
        # By name, so that a wrong tap is reported even where the shapes could not be found.
        stages = [dict.fromkeys(network.stage_names, ()) for network in (student.network, teacher.network)]
        pairs, wrong = _pair(recipe, stages[0] | shapes, stages[1] | teacher_shapes)
        problems += [recipe.line("distill.pairs", problem) for problem in wrong]
        problems += [recipe.line(key, problem) for key, problem in _check_pairs(recipe, pairs, wrong)]
        if recipe.student.init == "teacher":
            attempt("student.init", lambda: check_same_weights(student.network, teacher.network))
    elif recipe.distill.pairs and recipe.teacher is None:
        problems.append(recipe.line("distill.pairs", "there is no [teacher] to pair with"))
    if problems:
        raise UserError(*problems)
    return Plan(
        recipe=recipe,
        data=data,
        device=device,
        pairs=tuple(pairs),
        student_parameters=count_parameters(student.network),
        teacher_parameters=count_parameters(teacher.network) if teacher else None,
        teacher_checkpoint=checkpoint,
        steps_per_epoch=math.ceil(data.train_size / recipe.data.batch_size),
        memory_bytes=_memory(recipe, data, student, teacher),
    )


def make_data(recipe: Recipe) -> Dataset:
    """The recipe's data set; nothing is read yet."""
    return datasets.build(recipe.data.name, Path(recipe.data.root), **recipe.data.options)


def make_student(recipe: Recipe, data: Dataset) -> Student:
    """The student on the current default device, with the layers' own initialisation."""
    table = recipe.student
    act = snn_units(table.neuron.name, **table.neuron.options)
    shape = {"in_channels": data.channels, "num_classes": len(data.classes)}
    network = build(table.architecture, act, **shape, **table.options)
    encoder = encoders.build(table.encoder_table.name, data.mean, data.std, **table.encoder_table.options)
    return Student(network, encoder, table.timesteps)


def make_teacher(recipe: Recipe, data: Dataset) -> Teacher:
    """The teacher on the current default device, with the layers' own initialisation."""
    table = recipe.teacher
    shape = {"in_channels": data.channels, "num_classes": len(data.classes)}
    network = build(table.architecture, ann_units(), **shape, **table.options)
    return Teacher(network, data.mean, data.std)


def pick_device(name: str) -> torch.device:
    """The device that a recipe names.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise UserError(f'{name!r} is not a device; it is "auto", "cpu", "cuda" or "cuda:N"')
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f'{name!r} is not here ({torch.cuda.device_count()} CUDA devices found); "auto" takes what is')
    return torch.device(name)


def count_parameters(network: nn.Module) -> int:
    """Learnable numbers in the network."""
    return sum(parameter.numel() for parameter in network.parameters())


def find_checkpoint(name: str) -> Path:
    """The weights file that `teacher.checkpoint` means: a `.safetensors` file, or a run folder's teacher.

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "teacher.safetensors"
    if not path.is_file():
        raise UserError(f"no file {path}; give a .safetensors file or a run folder that has a teacher.safetensors")
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file; save a state_dict with safetensors.torch.save_file")
    return path


def check_weights(path: Path, network: Staged, num_classes: int) -> None:
    """Check that a weights file fits a network, from the file's header alone.

    Raises:
        UserError: it is not a whole safetensors file, or its first misfit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    classes = json.loads(metadata.get("lasnn", "{}")).get("num_classes", num_classes)
    if classes != num_classes:
        raise UserError(f"{path} was trained for {classes} classes; the data set has {num_classes}")
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    _compare(str(path), found, wanted)


def check_same_weights(student: Staged, teacher: Staged) -> None:
    """Check that a teacher's weights can start its student.

    Raises:
        UserError: the first weight that does not fit.
    """
    wanted = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    learnt = {name for name, _ in student.named_parameters() if ".neuron." in name}
    found = {name: tuple(value.shape) for name, value in teacher.state_dict().items()}
    _compare('"teacher" needs the same architecture and options: the teacher', found, wanted, learnt)


def _compare(what: str, found: dict[str, Shape], wanted: dict[str, Shape], extra: set[str] = frozenset()) -> None:
    for name in sorted(set(wanted) - extra - set(found)):
        raise UserError(f"{what} has no {name!r}; is it another architecture?")
    for name in sorted(set(found) - set(wanted)):
        raise UserError(f"{what} has {name!r}, which the network has not; is it another architecture?")
    for name, shape in found.items():
        if shape != wanted[name]:
            raise UserError(f"{what} has {name!r} of shape {list(shape)}; the network has {list(wanted[name])}")


def _pair(recipe: Recipe, student: dict[str, Shape], teacher: dict[str, Shape]) -> tuple[list[Pair], list[str]]:
    """The recipe's pairs with their shapes, and a line for each that names a stage which does not exist."""
    names = recipe.distill.pairs
    if names is None:
        names = [name for name in student if name in teacher]
    pairs, wrong = [], []
    for text in names:
        ours, _, theirs = text.partition(":")
        theirs = theirs or ours
        if ours not in student:
            wrong.append(f"{text!r}: {unknown('stage of the student', ours, student)}")
        if theirs not in teacher:
            wrong.append(f"{text!r}: {unknown('stage of the teacher', theirs, teacher)}")
        if ours in student and theirs in teacher:
            pairs.append(Pair(ours, theirs, student[ours], teacher[theirs]))
    return pairs, wrong


def _check_pairs(recipe: Recipe, pairs: list[Pair], wrong: list[str]):
    """(key, message) for each loss that cannot work on the pairs; `wrong` pairs are reported already."""
    for index, loss in enumerate(recipe.losses):
        if "student_features" not in losses[loss.name].inputs:
            continue
        if not pairs and not wrong:
            yield f"losses.{index}.name", f"{loss.name!r} needs pairs of stages; name some in distill.pairs"
        weights = loss.options.get("pair_weights")
        if weights is not None and len(weights) != len(pairs):
            yield (
                f"losses.{index}.pair_weights",
                f"{len(weights)} weights for {len(pairs)} pairs; give one a pair",
            )
        for pair in pairs if loss.name == "feature-mse" else ():
            if pair.student_shape and pair.teacher_shape and pair.student_shape[0] != pair.teacher_shape[0]:
                message = (
                    f"'feature-mse' needs equal channels; {pair.student!r} has {pair.student_shape[0]}, "
                    f"the teacher's {pair.teacher!r} {pair.teacher_shape[0]}"
                )
                yield f"losses.{index}.name", message


def _memory(recipe: Recipe, data: Dataset, student: Student, teacher: Teacher | None) -> int:
    """Bytes of a training step: weights, gradients, optimiser state and what the student keeps for its backward pass.

    The activations are the tensors that autograd saves in a forward pass on the meta device; half precision is
    counted as half of them. Workspaces of the convolutions are not in it.
    """
    saved: dict[int, int] = {}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in saved and not isinstance(tensor, nn.Parameter):
            kept.append(storage)
            saved[id(storage)] = storage.nbytes()
        return tensor

    images = torch.empty(recipe.data.batch_size, data.channels, data.height, data.width, device="meta")
    student.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student.steps(images)
    activations = sum(saved.values()) // (1 if recipe.precision == "fp32" else 2)
    states = {"sgd": 1, "adamw": 2}[recipe.distill.optimizer]
    learnt = 4 * count_parameters(student.network) * (2 + states)
    frozen = 4 * count_parameters(teacher.network) if teacher else 0
    return activations + learnt + frozen
