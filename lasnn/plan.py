"""What a recipe will do, found out on the meta device: no data, no memory, no training.

Every distillation starts here, so a tap that does not exist or an image that is too small for the network is
reported before the first batch, together with whatever else is wrong.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lasnn.compatibility import Shape, check_same_weights, check_weights
from lasnn.data import Augmentation, Dataset
from lasnn.errors import UserError, unknown
from lasnn.factory import (
    find_checkpoint,
    make_augmentation,
    make_data,
    make_encoder,
    make_network,
    make_student,
    make_teacher,
    pick_device,
)
from lasnn.loss import reading_of
from lasnn.memory import _memory, _voltages, count_parameters
from lasnn.network.staged import probe
from lasnn.network.units import ann_units
from lasnn.random import generator
from lasnn.recipe.schema import LossTable, Recipe, RecipeError
from lasnn.registry import losses, neurons, translate_errors


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
    def steps_per_epoch(self) -> int:
        """Of the images that are there; once they are loaded, of those that could be read."""
        return math.ceil(self.data.train_size / self.recipe.data.batch_size)

    @property
    def _teacher_steps(self) -> int:
        teacher = self.recipe.teacher
        return 0 if teacher is None or self.teacher_checkpoint else teacher.epochs * self.steps_per_epoch


def micro_batches(images: int, recipe: Recipe) -> int:
    """How many parts, of even sizes, `data.accumulate` makes of a batch of so many images."""
    return math.ceil(images / math.ceil(recipe.data.batch_size / recipe.data.accumulate))


def read_plan(recipe: str | Path | Recipe, overrides: Sequence[str] = ()) -> Plan:
    """Read a recipe and make its plan; mistakes of both kinds come together.

    Raises:
        UserError: everything that is wrong, a line each.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise UserError("overrides go with a recipe's file or name; this Recipe is already checked")
        return make_plan(recipe)
    try:
        return make_plan(Recipe.load(recipe, overrides))
    except RecipeError as error:
        if error.recipe is None:
            raise
        try:
            make_plan(error.recipe, reported=error.keys)
        except UserError as more:
            raise UserError(*error.problems, *more.problems) from None
        raise


def make_plan(recipe: Recipe, reported: Iterable[str] = ()) -> Plan:
    """Build everything that the recipe names on the meta device and check that it fits together.

    Args:
        reported: keys that are known to be wrong; what is wrong because of them is not reported again.

    Raises:
        UserError: everything that does not fit, a line each.
    """
    problems: list[str] = []
    reported = set(reported)

    def report(key: str, message: str) -> None:
        if not any(f"{key}.".startswith(f"{known}.") or known.startswith(f"{key}.") for known in reported):
            problems.append(recipe.line(key, message))

    def attempt(key: str, make: Callable, default=None):
        """What `make` returns; a failure is reported under the key, and `default` returned."""
        try:
            with _sizes_named():
                return make()
        except UserError as error:
            for problem in error.problems:
                report(key, problem)
            return default

    device = attempt("device", lambda: pick_device(recipe.device))
    if recipe.precision == "fp16" and device is not None and device.type == "cpu":
        report("precision", '"fp16" needs a GPU; on the CPU choose "fp32" or "bf16"')
    checkpoint = None
    if recipe.teacher and recipe.teacher.checkpoint is not None:
        checkpoint = attempt("teacher.checkpoint", lambda: find_checkpoint(recipe.teacher_checkpoint))
    data = attempt("data", lambda: make_data(recipe))
    if data is None:
        raise UserError(*problems)
    image = (data.channels, data.height, data.width)
    mixed = False
    if not any(key.startswith("data") for key in reported):
        augmentation = make_augmentation(recipe, data)
        mixed = augmentation.mixes
        attempt("data.augment", lambda: _try_augmentation(augmentation, data))
    table = recipe.student
    with torch.device("meta"):
        neuron = attempt("student.neuron", lambda: neurons.build(table.neuron.name, **table.neuron.options))
        encoder = attempt("student.encoder", lambda: make_encoder(recipe, data))
        student = teacher = None
        if neuron is not None and encoder is not None:
            student = attempt("student", lambda: make_student(recipe, data))
        shapes = {}
        if student:
            shapes = attempt("student", lambda: probe(student.network, image, table.timesteps), default={})
        if recipe.teacher:
            teacher = attempt("teacher", lambda: make_teacher(recipe, data))
        teacher_shapes = {}
        if teacher:
            teacher_shapes = attempt("teacher", lambda: probe(teacher.network, image), default={})
    if checkpoint and teacher:
        attempt("teacher.checkpoint", lambda: check_weights(checkpoint, teacher.network, len(data.classes)))
    pairs: list[Pair] = []
    with torch.device("meta"):
        # The stages are the same whatever the neuron, so that a wrong tap is reported beside a wrong neuron.
        staged = student.network if student else attempt("student", lambda: make_network(table, ann_units(), data))
    if staged and teacher:
        stages = [dict.fromkeys(network.stage_names, ()) for network in (staged, teacher.network)]
        pairs, wrong = pair_stages(recipe, stages[0] | shapes, stages[1] | teacher_shapes)
        for problem in wrong:
            report("distill.pairs", problem)
        for key, problem in _check_pairs(recipe, pairs, wrong):
            report(key, problem)
        if student and table.init == "teacher" and not reported:
            attempt("student.init", lambda: check_same_weights(student.network, teacher.network))
    elif recipe.distill.pairs and recipe.teacher is None:
        report("distill.pairs", "there is no [teacher] to pair with")
    if recipe.data.accumulate > recipe.data.batch_size:
        parts, images = recipe.data.accumulate, recipe.data.batch_size
        report("data.accumulate", f"{parts} parts of a batch of {images} images; it is at most data.batch_size")
    full = min(recipe.data.batch_size, data.train_size)
    last = data.train_size % full or full
    if 1 in (images // micro_batches(images, recipe) for images in (full, last)):
        single = [shape for shape in teacher_shapes.values() if not checkpoint and shape[1:] == (1, 1)]
        single += [shape for shape in shapes.values() if table.timesteps == 1 and shape[1:] == (1, 1)]
        if single:
            what, key = ("the last batch", "batch_size") if last == 1 else ("a micro-batch", "accumulate")
            message = f"{what} has one image, and a stage one pixel: batch norm has nothing to average over"
            report(f"data.{key}", message)
    if recipe.time_chunk:
        for key, problem in _check_chunks(recipe):
            report(key, problem)
        if student and not problems and not reported:
            attempt("student.neuron", lambda: _voltages(recipe, data, student))
    if not problems and not reported:
        for index, loss in enumerate(recipe.losses):
            attempt(f"losses.{index}", lambda loss=loss: _try_loss(loss, data, pairs, table.timesteps, mixed))
    memory = 0
    if not problems and not reported:
        memory = attempt("student", lambda: _memory(recipe, data, student, teacher))
    if problems or reported:
        raise UserError(*problems)
    return Plan(
        recipe=recipe,
        data=data,
        device=device,
        pairs=tuple(pairs),
        student_parameters=count_parameters(student.network),
        teacher_parameters=count_parameters(teacher.network) if teacher else None,
        teacher_checkpoint=checkpoint,
        memory_bytes=memory,
    )


@contextmanager
def _sizes_named():
    """Turn what PyTorch says of sizes that it cannot count, or that fit in no memory, into an error of the recipe's."""
    try:
        yield
    except MemoryError as error:
        raise UserError("its sizes fit in no memory") from error
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        if not re.search("overflow|too large|too big|can't allocate|invalid size|out of range", reason, re.IGNORECASE):
            raise
        raise UserError(f"its sizes are too large: {reason}") from error


def _try_loss(loss: LossTable, data: Dataset, pairs: list[Pair], timesteps: int, mixed: bool) -> None:
    """Call a loss once on random tensors of the run's shapes, two images.

    Raises:
        UserError: it fails, or does not return one number.
    """
    entry, draws = losses[loss.name], generator("try", loss.name)
    classes = len(data.classes)
    given = {
        "logits": torch.randn(timesteps, 2, classes, generator=draws),
        "targets": torch.full((2, classes), 1 / classes) if mixed else torch.arange(2) % classes,
        "teacher_logits": torch.randn(2, classes, generator=draws),
        "student_features": [torch.rand(timesteps, 2, *pair.student_shape, generator=draws) for pair in pairs],
        "teacher_features": [torch.rand(2, *pair.teacher_shape, generator=draws) for pair in pairs],
    }
    with translate_errors(entry):
        value = entry.function(*(given[name] for name in entry.inputs), **loss.options)
    if not isinstance(value, torch.Tensor) or value.ndim != 0:
        what = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise UserError(f"loss {loss.name!r} ({entry.where}) must return one number, a tensor []; it returned {what}")


def _try_augmentation(augmentation: Augmentation, data: Dataset) -> None:
    """Augment two random images of the data's shape.

    Raises:
        UserError: it fails, or returns something of another shape or type.
    """
    draws = generator("try", "augment")
    images = torch.rand(2, data.channels, data.height, data.width, generator=draws)
    found, targets = augmentation(images, torch.arange(2) % len(data.classes), draws)
    for what, tensor, shape in (("images", found, images.shape), ("targets", targets, (2, len(data.classes)))):
        wanted = [torch.float32, list(shape)]
        if (what == "images" or augmentation.mixes) and [tensor.dtype, list(tensor.shape)] != wanted:
            raise UserError(f"its {what} are {tensor.dtype} {list(tensor.shape)}; they must be {wanted[0]} {wanted[1]}")


def pair_stages(recipe: Recipe, student: dict[str, Shape], teacher: dict[str, Shape]) -> tuple[list[Pair], list[str]]:
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
        if loss.name not in losses or "student_features" not in losses[loss.name].inputs:
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


def _check_chunks(recipe: Recipe):
    """(key, message) for each loss that needs more of the features than chunks of time keep."""
    for index, loss in enumerate(recipe.losses):
        if loss.name not in losses:
            continue
        entry = losses[loss.name]
        if "student_features" in entry.inputs and reading_of(entry.function, loss.options) is None:
            fix = 'temporal = "rate" or "step"' if loss.name == "attention" else "mark it with lasnn.loss.over_time"
            yield (
                f"losses.{index}",
                f"{loss.name!r} reads its features at all time steps together, which distill.time_chunk does not keep; "
                f"set time_chunk = 0, or {fix}",
            )
