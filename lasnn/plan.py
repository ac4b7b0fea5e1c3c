"""What a recipe will do, found out on the meta device: no data, no memory, no training (a user's own parts are tried on
the CPU as well, see `lasnn.probe`).

Every distillation starts here, so a tap that does not exist or an image that is too small for the network is
reported before the first batch, together with whatever else is wrong.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import isclass
from pathlib import Path

import torch

from lasnn.compatibility import Shape, check_same_weights, fitted_weights
from lasnn.data import Dataset
from lasnn.description import describe_teacher
from lasnn.errors import UserError, unknown
from lasnn.factory import (
    find_checkpoint,
    make_augmentation,
    make_data,
    make_network,
    make_student,
    make_teacher,
    pick_device,
    pick_precision,
)
from lasnn.loss import Pair
from lasnn.memory import carried_voltages, count_parameters, training_memory
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import ann_units
from lasnn.probe import (
    Built,
    build_student,
    build_teacher,
    check_augmentation,
    check_currents,
    check_losses,
    check_maps,
    empty_losses,
    on_meta,
    probe,
    real_values,
    scheduled_losses,
    student_entry,
    teacher_entry,
    try_losses,
    try_student,
    try_teacher,
)
from lasnn.problems import Problems
from lasnn.recipe.schema import Recipe
from lasnn.registry import losses


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
    # All its parameters are frozen by its own code, as those of a plugin that loads it: it is used as it is.
    teacher_frozen: bool
    memory_bytes: int
    # Of a network from elsewhere that is called as a whole: the path of the module that each stage is; else nothing.
    teacher_stages: dict[str, str]
    notes: tuple[str, ...] = ()

    def summary(self) -> dict:
        """The plan as plain values, as `lasnn distill --dry-run --json` prints it."""
        recipe = self.recipe
        epochs = recipe.distill.epochs
        return {
            "recipe": recipe.name,
            "data": recipe.data.name,
            "images": {
                "train": training_images(recipe, self.data),
                "validation": recipe.data.validation,
                "test": self.data.test_size,
            },
            "image": [self.data.channels, self.data.height, self.data.width],
            "classes": len(self.data.classes),
            "notes": [*self.data.notes(), *self.notes],
            "device": str(self.device),
            "precision": self.precision,
            "teacher": recipe.teacher.architecture if recipe.teacher else None,
            "teacher_parameters": self.teacher_parameters,
            "teacher_checkpoint": str(self.teacher_checkpoint) if self.teacher_checkpoint else None,
            "teacher_frozen": self.teacher_frozen,
            "teacher_stages": self.teacher_stages,
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
    def precision(self) -> str:
        """Of the training: "fp32", "bf16" or "fp16"."""
        return pick_precision(self.recipe, self.device)

    @property
    def steps_per_epoch(self) -> int:
        """Of the images that are there; once they are loaded, of those that could be read."""
        return math.ceil(training_images(self.recipe, self.data) / self.recipe.data.batch_size)

    @property
    def _teacher_steps(self) -> int:
        teacher = self.recipe.teacher
        ready = teacher is None or self.teacher_checkpoint or self.teacher_frozen
        return 0 if ready else teacher.epochs * self.steps_per_epoch


def training_images(recipe: Recipe, data: Dataset) -> int:
    """How many images are trained on: all but those that `data.validation` holds out."""
    return data.train_size - recipe.data.validation


def micro_batches(images: int, recipe: Recipe) -> int:
    """How many parts, of even sizes, `data.accumulate` makes of a batch of so many images."""
    return math.ceil(images / math.ceil(recipe.data.batch_size / recipe.data.accumulate))


def read_plan(recipe: str | Path | Recipe, overrides: Sequence[str] = ()) -> Plan:
    """Read a recipe and make its plan.

    Raises:
        UserError: every mistake of form, a line each; or, of a recipe without any, all that does not fit together.
    """
    if not isinstance(recipe, Recipe):
        return make_plan(Recipe.load(recipe, overrides))
    if overrides:
        raise UserError("overrides go with a recipe's file or name; this Recipe is already checked")
    return make_plan(recipe)


def make_plan(recipe: Recipe) -> Plan:
    """Build everything that the recipe names on the meta device and check that it fits together.

    Raises:
        UserError: everything that does not fit, a line each.
    """
    problems = Problems(recipe)
    recipe.use_plugins()
    for file in recipe.changed_plugins():
        problems.report("plugins", f"{file} was edited after the recipe was read; read the recipe again")
    device = _check_device(recipe, problems)
    checkpoint = None
    if recipe.teacher and recipe.teacher.checkpoint is not None:
        checkpoint = problems.attempt("teacher.checkpoint", lambda: find_checkpoint(recipe))
    data = problems.attempt("data", lambda: make_data(recipe))
    if data is None:
        # Without its images' size and classes no network can be built.
        raise UserError(*problems.lines)
    problems.attempt("data.validation", lambda: check_validation(recipe, data))
    augmentation = problems.attempt("data.augment", lambda: make_augmentation(recipe, data))
    if augmentation:
        problems.attempt("data.augment", lambda: check_augmentation(augmentation, recipe, data))
    student = build_student(recipe, data, problems)
    teacher = build_teacher(recipe, data, problems) if recipe.teacher else None
    if checkpoint and teacher:
        expected = describe_teacher(recipe, data, teacher.network)
        problems.attempt("teacher.checkpoint", partial(fitted_weights, checkpoint, teacher.network, expected))
    frozen = bool(teacher) and not checkpoint and not any(one.requires_grad for one in teacher.network.parameters())
    pairs = _pair(recipe, data, student, teacher, problems)
    _check_batches(recipe, data, student, None if checkpoint or frozen else teacher, problems)
    memory = 0
    if student and recipe.time_chunk and not problems.lines:
        with on_meta():
            problems.attempt("student.neuron", lambda: carried_voltages(recipe, data, student.model))
    if not problems.lines:
        try_losses(recipe, data, pairs, teacher, augmentation.mixes, problems)
    if not problems.lines:
        problems.attempt("student", lambda: try_student(recipe, data, student, pairs))
        if teacher:
            problems.attempt("teacher", lambda: try_teacher(recipe, data, teacher, trained=not (checkpoint or frozen)))
    if not problems.lines:
        beside = teacher.model if teacher else None
        half = pick_precision(recipe, device) != "fp32"
        with on_meta():
            memory = problems.attempt("student", lambda: training_memory(recipe, data, student.model, beside, half))
    if problems.lines:
        raise UserError(*problems.lines)
    return Plan(
        recipe=recipe,
        data=data,
        device=device,
        pairs=tuple(pairs),
        student_parameters=count_parameters(student.network),
        teacher_parameters=count_parameters(teacher.network) if teacher else None,
        teacher_checkpoint=checkpoint,
        teacher_frozen=frozen,
        memory_bytes=memory,
        teacher_stages=dict(getattr(teacher.network, "paths", {})) if teacher else {},
        notes=(
            *held_out(recipe, data),
            *real_values(student.network, student.probed),
            *scheduled_losses(recipe),
            *empty_losses(recipe),
        ),
    )


def held_out(recipe: Recipe, data: Dataset) -> Iterator[str]:
    """A line where images are held out."""
    if count := recipe.data.validation:
        yield f"held out {count:,} of the {data.train_size:,} training images, by a hash of each; not trained on"


def check_validation(recipe: Recipe, data: Dataset) -> None:
    """Check that `data.validation` leaves images to train on.

    Raises:
        UserError: it does not.
    """
    if recipe.data.validation >= data.train_size:
        raise UserError(
            f"{recipe.data.validation:,} images to hold out; there are {data.train_size:,} training images, and at "
            "least one must be left to train on"
        )


def _lone_image(recipe: Recipe, data: Dataset) -> tuple[str, str] | None:
    """(key, message) where a batch, or a part of one, has one image; None where none has."""
    images = training_images(recipe, data)
    if images < 1:
        # `check_validation` says so.
        return None
    full = min(recipe.data.batch_size, images)
    last = images % full or full
    if 1 not in (size // micro_batches(size, recipe) for size in (full, last)):
        return None
    what, key = ("the last batch", "batch_size") if last == 1 else ("a micro-batch", "accumulate")
    return f"data.{key}", f"{what} has one image, and a stage one pixel: batch norm has nothing to average over"


def _one_pixel(recipe: Recipe, student: dict[str, Shape], trained_teacher: dict[str, Shape]) -> bool:
    """Whether batch norm has one value for each image somewhere: by the shapes of the stages."""
    # A loss with learnt parts may have one of the student's features, averaged over time.
    rates = recipe.student.timesteps == 1 or any(isclass(losses[loss.name].function) for loss in recipe.losses)
    shapes = [*trained_teacher.values(), *(student.values() if rates else ())]
    return any(shape[1:] == (1, 1) for shape in shapes)


def check_batches(plan: Plan) -> None:
    """Check the batches once the images are loaded: where some could not be read, the last one has another size.

    Raises:
        UserError: a batch has one image, which batch norm cannot train on, or none is left to train on.
    """
    recipe, data = plan.recipe, plan.data
    try:
        check_validation(recipe, data)
    except UserError as error:
        raise UserError(*(recipe.line("data.validation", problem) for problem in error.problems)) from error
    lone = _lone_image(recipe, data)
    if lone is None:
        return
    image, teacher = (data.channels, data.height, data.width), {}
    with on_meta():
        student = probe(make_student(recipe, data).network, image, recipe.student.timesteps).shapes
        if recipe.teacher and plan.teacher_checkpoint is None and not plan.teacher_frozen:
            teacher = probe(make_teacher(recipe, data).network, image).shapes
    if _one_pixel(recipe, student, teacher):
        raise UserError(recipe.line(*lone))


def _check_device(recipe: Recipe, problems: Problems) -> torch.device | None:
    device = problems.attempt("device", lambda: pick_device(recipe.device))
    if recipe.precision == "fp16" and device is not None and device.type == "cpu":
        problems.report("precision", '"fp16" needs a GPU; on the CPU choose "fp32" or "bf16"')
    return device


def _pair(
    recipe: Recipe,
    data: Dataset,
    student: Built[Student] | None,
    teacher: Built[Teacher] | None,
    problems: Problems,
) -> list[Pair]:
    """The paired stages, checked against the losses that compare them."""
    if recipe.teacher is None:
        if recipe.distill.pairs:
            problems.report("distill.pairs", "there is no [teacher] to pair with")
        check_losses(recipe, [], [], problems)
        return []
    stages = student.stages if student else _stages_alone(recipe, data, problems)
    if stages is None or teacher is None:
        return []
    pairs, wrong = pair_stages(recipe, stages, teacher.stages)
    for problem in wrong:
        problems.report("distill.pairs", problem)
    if student:
        ours = check_maps([pair.student for pair in pairs], student.probed, student_entry(recipe))
        theirs = check_maps([pair.teacher for pair in pairs], teacher.probed, teacher_entry(recipe))
        for line in dict.fromkeys([*ours, *theirs]):
            problems.report("distill.pairs", line)
            wrong.append(line)
    check_losses(recipe, pairs, wrong, problems)
    check_currents(recipe, data, pairs, {"student": student, "teacher": teacher}, problems)
    if student and recipe.student.init == "teacher":
        problems.attempt("student.init", lambda: check_same_weights(student.network, teacher.network))
    return pairs


def _stages_alone(recipe: Recipe, data: Dataset, problems: Problems) -> dict[str, Shape] | None:
    """The student's stages where its neuron or encoder is wrong: they are the same whatever these are."""
    with torch.device("meta"):
        network = problems.attempt("student", lambda: make_network(recipe.student, ann_units(), data))
    return dict.fromkeys(network.stage_names, ()) if network else None


def _check_batches(
    recipe: Recipe, data: Dataset, student: Built[Student] | None, trained: Built[Teacher] | None, problems: Problems
) -> None:
    """Whether the batches can be cut as wanted, and leave batch norm something to average over."""
    if recipe.data.accumulate > recipe.data.batch_size:
        parts, images = recipe.data.accumulate, recipe.data.batch_size
        problems.report(
            "data.accumulate", f"{parts} parts of a batch of {images} images; it is at most data.batch_size"
        )
    lone = _lone_image(recipe, data)
    if lone and _one_pixel(recipe, student.shapes if student else {}, trained.shapes if trained else {}):
        problems.report(*lone)


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
