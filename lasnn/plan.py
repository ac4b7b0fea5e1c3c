"""What a recipe will do, found out on the meta device: no data, no memory, no training (a user's own parts are tried on
the CPU as well, see `lasnn.probe`).

Every distillation starts here, so a tap that does not exist or an image that is too small for the network is
reported before the first batch, together with whatever else is wrong.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import isclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from lasnn.compatibility import Shape, check_same_weights, fitted_weights, starting_weights
from lasnn.data import Augmentation, Dataset
from lasnn.description import describe_start, describe_teacher
from lasnn.errors import UserError, unknown
from lasnn.factory import (
    emulates_bfloat16,
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
from lasnn.memory import ann_memory, carried_voltages, count_parameters, training_images, training_memory
from lasnn.network.scales import Scales
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import ann_units
from lasnn.probe import (
    ProbedNetwork,
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
from lasnn.recipe.load import toml_value
from lasnn.recipe.schema import Recipe, TeacherTable
from lasnn.registry import losses, translate_errors


@dataclass(frozen=True)
class Start:
    """Where the student's weights start.

    Args:
        source: "random", "teacher", "start" (the recipe's table) or "file".
        said: a line that says it, and why.
        path: the file.
        converted: whether the copied weights are balanced for the student's T.
    """

    source: Literal["random", "teacher", "start", "file"]
    said: str
    path: Path | None = None
    converted: bool = False


@dataclass(frozen=True)
class PlannedAnn:
    """The ANN of a recipe's [teacher] or [start].

    Args:
        parameters: how many it has.
        checkpoint: the weights file that it is read from; None where it is not read.
        frozen: whether all its parameters are frozen, as of a plugin that loads it, or of a network that is called as a
            whole: it is used as it is.
        stages: of a network from elsewhere that is called as a whole, the path of the module that each stage is.
    """

    parameters: int
    checkpoint: Path | None
    frozen: bool
    stages: dict[str, str]

    @property
    def trained(self) -> bool:
        """Whether the run trains it, or takes it from the cache."""
        return self.checkpoint is None and not self.frozen


@dataclass(frozen=True)
class Plan:
    """A checked recipe with what follows from it."""

    recipe: Recipe
    data: Dataset
    device: torch.device
    pairs: tuple[Pair, ...]
    student_parameters: int
    # By "teacher" and "start", as far as the recipe has these tables.
    anns: dict[str, PlannedAnn]
    start: Start
    memory_bytes: int
    ann_memory_bytes: dict[str, int]
    notes: tuple[str, ...] = ()

    def summary(self) -> dict:
        """The plan as plain values, as `lasnn distill --dry-run --json` prints it."""
        recipe = self.recipe
        epochs = recipe.distill.epochs
        teacher, twin = self.anns.get("teacher"), self.anns.get("start")
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
            "teacher_parameters": teacher.parameters if teacher else None,
            "teacher_checkpoint": str(teacher.checkpoint) if teacher and teacher.checkpoint else None,
            "teacher_frozen": teacher.frozen if teacher else False,
            "teacher_stages": teacher.stages if teacher else {},
            "start": recipe.start.architecture if recipe.start else None,
            "start_parameters": twin.parameters if twin else None,
            "start_checkpoint": str(twin.checkpoint) if twin and twin.checkpoint else None,
            "start_frozen": twin.frozen if twin else False,
            "init": self.start.said,
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
            "teacher_steps": self._steps("teacher"),
            "start_steps": self._steps("start"),
            "student_steps": epochs * self.steps_per_epoch,
            "memory_bytes": self.memory_bytes,
            "ann_memory_bytes": self.ann_memory_bytes,
        }

    @property
    def precision(self) -> str:
        """Of the training: "fp32", "bf16" or "fp16"."""
        return pick_precision(self.recipe, self.device)

    @property
    def steps_per_epoch(self) -> int:
        """Of the images that are there; once they are loaded, of those that could be read."""
        return math.ceil(training_images(self.recipe, self.data) / self.recipe.data.batch_size)

    def _steps(self, name: str) -> int:
        """Of an ANN's training."""
        trained = name in self.anns and self.anns[name].trained
        return getattr(self.recipe, name).epochs * self.steps_per_epoch if trained else 0


def micro_batches(images: int, recipe: Recipe) -> int:
    """How many parts, of even sizes, `data.accumulate` makes of a batch of so many images."""
    return math.ceil(images / math.ceil(recipe.data.batch_size / recipe.data.accumulate))


def read_plan(recipe: str | Path | Recipe, overrides: Iterable[str] = ()) -> Plan:
    """Read a recipe and make its plan.

    Raises:
        UserError: every mistake of form, a line each; or, of a recipe without any, all that does not fit together.
    """
    if not isinstance(recipe, Recipe):
        return make_plan(Recipe.load(recipe, overrides))
    if list(overrides):
        raise UserError("overrides go with a recipe's file or name; this Recipe is already checked")
    return make_plan(recipe)


def make_plan(recipe: Recipe) -> Plan:
    """Build everything that the recipe names on the meta device and check that it fits together.

    Raises:
        UserError: everything that does not fit, a line each.
    """
    problems = Problems(recipe)
    recipe.use_plugins()
    _check_settings(recipe, problems)
    device = _pick_device(recipe, problems)
    checkpoints = _find_checkpoints(recipe, problems)
    data = problems.attempt("data", lambda: make_data(recipe))
    if data is None:
        # Without its images' size and classes no network can be built.
        raise UserError(*problems.lines)
    problems.attempt("data.validation", lambda: check_validation(recipe, data))
    augmentation = problems.attempt("data.augment", lambda: make_augmentation(recipe, data))
    if augmentation:
        problems.attempt("data.augment", lambda: check_augmentation(augmentation, recipe, data))
    networks = _build(recipe, data, problems)
    anns = {
        name: _plan_ann(recipe, data, name, network, checkpoints.get(name), problems)
        for name, network in networks.anns.items()
    }
    pairs = _pair(recipe, data, networks.student, networks.anns.get("teacher"), problems)
    start = _start(recipe, data, networks.student, networks.anns, problems)
    trained = [network for name, network in networks.anns.items() if anns[name].trained]
    _check_batch_parts(recipe, data, networks.student, trained, problems)
    memory = _try(recipe, data, device, networks, anns, pairs, augmentation, problems)
    if problems.lines:
        raise UserError(*problems.lines)
    student, half = networks.student, pick_precision(recipe, device) != "fp32"
    with on_meta():
        ann_memory_bytes = {
            name: ann_memory(recipe, data, network.model, name, half)
            for name, network in networks.anns.items()
            if anns[name].trained
        }
    return Plan(
        recipe=recipe,
        data=data,
        device=device,
        pairs=tuple(pairs),
        student_parameters=count_parameters(student.network),
        anns=anns,
        start=start,
        memory_bytes=memory,
        ann_memory_bytes=ann_memory_bytes,
        notes=(
            *held_out(recipe, data, anns, start),
            *one_step(recipe, data),
            *slow_arithmetic(recipe, device),
            *real_values(student.network, student.probed),
            *scheduled_losses(recipe),
            *empty_losses(recipe, pairs),
        ),
    )


def _check_settings(recipe: Recipe, problems: Problems) -> None:
    """What needs nothing but the recipe to be seen."""
    for file in recipe.changed_plugins():
        problems.report("plugins", f"{file} was edited after the recipe was read; read the recipe again")
    if recipe.compile and recipe.time_chunk:
        problems.report(
            "compile", "does not go with distill.time_chunk, which computes the pass again; set one of them"
        )


def _pick_device(recipe: Recipe, problems: Problems) -> torch.device | None:
    """Where it is to run; None where that is not here."""
    device = problems.attempt("device", lambda: pick_device(recipe.device))
    if recipe.precision == "fp16" and device is not None and device.type == "cpu":
        problems.report("precision", '"fp16" needs a GPU; on the CPU choose "fp32" or "bf16"')
    return device


def _find_checkpoints(recipe: Recipe, problems: Problems) -> dict[str, Path | None]:
    """The files that ANNs are read from; None where one cannot be found."""
    return {
        name: problems.attempt(f"{name}.checkpoint", partial(find_checkpoint, recipe, name))
        for name, table in (("teacher", recipe.teacher), ("start", recipe.start))
        if table and table.checkpoint is not None
    }


class _Networks(NamedTuple):
    """What could be built on the meta device."""

    student: ProbedNetwork[Student] | None
    anns: dict[str, ProbedNetwork[Teacher]]


def _build(recipe: Recipe, data: Dataset, problems: Problems) -> _Networks:
    student = build_student(recipe, data, problems)
    anns = {
        name: build_teacher(recipe, data, problems, name)
        for name, table in (("teacher", recipe.teacher), ("start", recipe.start))
        if table
    }
    return _Networks(student, {name: ann for name, ann in anns.items() if ann})


def _plan_ann(
    recipe: Recipe, data: Dataset, name: str, ann: ProbedNetwork[Teacher], checkpoint: Path | None, problems: Problems
) -> PlannedAnn:
    """Where an ANN's weights come from; that they fit is checked."""
    network = ann.network
    if checkpoint:
        expected = describe_teacher(recipe, data, network, name)
        problems.attempt(f"{name}.checkpoint", lambda: fitted_weights(checkpoint, network, expected, name))
    return PlannedAnn(
        parameters=count_parameters(network),
        checkpoint=checkpoint,
        frozen=not checkpoint and not any(one.requires_grad for one in network.parameters()),
        stages=dict(getattr(network, "paths", {})),
    )


def _try(
    recipe: Recipe,
    data: Dataset,
    device: torch.device | None,
    networks: _Networks,
    anns: dict[str, PlannedAnn],
    pairs: list[Pair],
    augmentation: Augmentation | None,
    problems: Problems,
) -> int:
    """Run what has no problem so far, a few images of nothing; how many bytes the training is going to keep."""
    student, teacher = networks.student, networks.anns.get("teacher")
    if problems.lines:
        return 0
    if recipe.time_chunk:
        with on_meta():
            problems.attempt("student.neuron", lambda: carried_voltages(recipe, data, student.model))
    if problems.lines:
        return 0
    of_losses = try_losses(recipe, data, pairs, teacher, augmentation.mixes, problems)
    if problems.lines:
        return 0
    problems.attempt("student", lambda: try_student(recipe, data, student, pairs))
    for name, ann in networks.anns.items():
        problems.attempt(name, partial(try_teacher, recipe, data, ann, anns[name].trained, name))
    if problems.lines:
        return 0
    beside = teacher.model if teacher else None
    half = pick_precision(recipe, device) != "fp32"
    with on_meta():
        return problems.attempt(
            "student", lambda: training_memory(recipe, data, student.model, beside, of_losses, half)
        )


def _start(
    recipe: Recipe,
    data: Dataset,
    student: ProbedNetwork[Student] | None,
    anns: Mapping[str, ProbedNetwork[Teacher]],
    problems: Problems,
) -> Start | None:
    """Where the student's weights start; None where it cannot be built, or where they do not fit."""
    init = recipe.student.init
    if init == "random" or student is None:
        return Start("random", "random weights")
    if recipe.student.init_is_path:
        if path := problems.attempt("student.init", lambda: find_checkpoint(recipe, "student")):
            expected = describe_start(recipe, data)
            problems.attempt("student.init", lambda: starting_weights(path, student.network, expected))
        return Start("file", f"the weights in {path}", path)
    name = "start" if recipe.start else "teacher"
    source = "[start]" if recipe.start else "the teacher"
    ann = recipe.start or recipe.teacher
    if name not in anns:
        # It is left out, or cannot be built.
        return Start("random", "random weights: there is no [start] and no [teacher]")
    try:
        check_same_weights(student.network, anns[name].network, init, name)
    except UserError as error:
        if init != "auto" or recipe.start:
            differ = _other_network(recipe, ann, name) or "; ".join(error.problems)
            key, fix = "student.init", 'leave it out or set "random", or name the student\'s own ANN in [start]'
            if recipe.start:
                key, fix = "start", "make it the student's own network, or leave it out"
            problems.report(key, f"the weights of {source} do not fit the student: {differ}; {fix}")
        return Start("random", f"random weights: {source} is another network")
    # Same weights, and yet another network: what pools, how many heads there are.
    other = recipe.other_options(ann) if ann.architecture == recipe.student.architecture else {}
    differ = [f"{key} = {toml_value(theirs)}, the student's {toml_value(own)}" for key, (theirs, own) in other.items()]
    also = f"; learnt with {' and '.join(differ)}" if differ else ""
    if init in ("teacher", "copied") or problems.lines:
        # What cannot run has no scales.
        return Start(name, f"the weights of {source}, copied{also}")
    try:
        with translate_errors(teacher_entry(recipe, name)):
            Scales(anns[name].network, (data.channels, data.height, data.width))
    except UserError as error:
        if init == "converted":
            for problem in error.problems:
                problems.report("student.init", f'{problem}; it can be "copied"')
        return Start(name, f"the weights of {source}, copied: they cannot be converted ({error.problems[0]}){also}")
    known = {"images": "measured on training images", "none": "by batch norm's own"}[recipe.student.calibration]
    said = f"the weights of {source}, converted: thresholds for T = {recipe.student.timesteps}, currents {known}"
    return Start(name, said + also, converted=True)


def _other_network(recipe: Recipe, ann: TeacherTable, name: str) -> str:
    """How an ANN differs from the student in what the recipe says of both; nothing where it does not."""
    if ann.architecture != recipe.student.architecture:
        return f"the {name} is a {ann.architecture}, the student a {recipe.student.architecture}"
    return ", ".join(
        f"{name}.{key} = {toml_value(theirs)}, student.{key} = {toml_value(own)}"
        for key, (theirs, own) in recipe.other_options(ann).items()
    )


def held_out(recipe: Recipe, data: Dataset, anns: Mapping[str, PlannedAnn], start: Start) -> Iterator[str]:
    """Lines where images are held out, one on the networks that this run does not train."""
    if count := recipe.data.validation:
        yield f"held out {count:,} of the {data.train_size:,} training images, by a hash of each; not trained on"
        given = [
            f"{name}.checkpoint" if ann.checkpoint else f"[{name}]" for name, ann in anns.items() if not ann.trained
        ]
        if start.source == "file":
            given.append("student.init")
        if given:
            yield (
                f"held out: whether {' and '.join(given)} learnt from these images is not known; if so, what is "
                "measured on them flatters"
            )


def one_step(recipe: Recipe, data: Dataset) -> Iterator[str]:
    """A line where a batch asks for more images than there are."""
    images = training_images(recipe, data)
    if recipe.data.batch_size > images:
        yield (
            f"data.batch_size = {recipe.data.batch_size}: more than the {images:,} training images, so that an epoch "
            "is one step"
        )


def slow_arithmetic(recipe: Recipe, device: torch.device) -> Iterator[str]:
    """A line where the precision that was asked for is emulated."""
    if recipe.precision == "bf16" and emulates_bfloat16(device):
        yield (
            f'precision = "bf16": this {"GPU" if device.type == "cuda" else "CPU"} has no instructions for it, and a '
            'step takes several times as long as with "fp32"'
        )


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


def _one_pixel(recipe: Recipe, student: dict[str, Shape], trained: Iterable[dict[str, Shape]]) -> bool:
    """Whether batch norm has one value for each image somewhere: by the shapes of the stages."""
    # A loss with learnt parts may have one of the student's features, averaged over time.
    rates = recipe.student.timesteps == 1 or any(isclass(losses[loss.name].function) for loss in recipe.losses)
    shapes = [*(shape for ann in trained for shape in ann.values()), *(student.values() if rates else ())]
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
    image, trained = (data.channels, data.height, data.width), []
    with on_meta():
        student = probe(make_student(recipe, data).network, image, recipe.student.timesteps).shapes
        for name, ann in plan.anns.items():
            if ann.trained:
                trained.append(probe(make_teacher(recipe, data, name).network, image).shapes)
    if _one_pixel(recipe, student, trained):
        raise UserError(recipe.line(*lone))


def _pair(
    recipe: Recipe,
    data: Dataset,
    student: ProbedNetwork[Student] | None,
    teacher: ProbedNetwork[Teacher] | None,
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
    return pairs


def _stages_alone(recipe: Recipe, data: Dataset, problems: Problems) -> dict[str, Shape] | None:
    """The student's stages where its neuron or encoder is wrong: they are the same whatever these are."""
    with torch.device("meta"):
        network = problems.attempt("student", lambda: make_network(recipe.student, ann_units(), data))
    return dict.fromkeys(network.stage_names, ()) if network else None


def _check_batch_parts(
    recipe: Recipe,
    data: Dataset,
    student: ProbedNetwork[Student] | None,
    trained: Iterable[ProbedNetwork[Teacher]],
    problems: Problems,
) -> None:
    """Whether the batches can be cut as wanted, and leave batch norm something to average over."""
    if recipe.data.accumulate > recipe.data.batch_size:
        parts, images = recipe.data.accumulate, recipe.data.batch_size
        problems.report(
            "data.accumulate", f"{parts} parts of a batch of {images} images; it is at most data.batch_size"
        )
    lone = _lone_image(recipe, data)
    if lone and _one_pixel(recipe, student.shapes if student else {}, [ann.shapes for ann in trained]):
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
