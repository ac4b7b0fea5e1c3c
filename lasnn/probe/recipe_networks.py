"""A recipe's student and teacher on the meta device, probed."""

from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from lasnn.compatibility import Shape
from lasnn.data import Dataset
from lasnn.factory import make_encoder, make_student, make_teacher
from lasnn.loss import Pair, inputs_of
from lasnn.network.staged import CURRENT, Staged
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.probe.answers import STEPS
from lasnn.probe.network import (
    Probed,
    check_answers,
    check_gradients,
    check_spikes,
    on_meta,
    probe,
    without_data,
)
from lasnn.probe.parts import check_encoder, check_neuron
from lasnn.problems import Problems
from lasnn.random import keyed
from lasnn.recipe.check import teacher_registry
from lasnn.recipe.schema import Recipe
from lasnn.registry import Entry, architectures, encoders, losses, neurons

Network = TypeVar("Network", Student, Teacher)


@dataclass(frozen=True)
class ProbedNetwork(Generic[Network]):
    """A network on the meta device, and what its stages return; nothing where it does not run."""

    model: Network
    probed: Probed

    @property
    def shapes(self) -> dict[str, Shape]:
        """(C, H, W) of the stages that give maps."""
        return self.probed.shapes

    @property
    def network(self) -> Staged:
        return self.model.network

    @property
    def stages(self) -> dict[str, Shape]:
        """Every stage, with an empty shape where that is not known."""
        return dict.fromkeys(self.network.stage_names, ()) | self.shapes


def build_student(recipe: Recipe, data: Dataset, problems: Problems) -> ProbedNetwork[Student] | None:
    """The student on the meta device; None where its neuron, its encoder or itself cannot be built."""
    table, image = recipe.student, (data.channels, data.height, data.width)
    with on_meta():
        neuron = problems.attempt("student.neuron", lambda: neurons.build(table.neuron.name, **table.neuron.options))
        encoder = problems.attempt("student.encoder", lambda: make_encoder(recipe, data))
        if neuron is None or encoder is None:
            return None
        student = problems.attempt("student", lambda: without_data(make_student(recipe, data)))
    if student is None:
        return None
    found = len(problems.lines)
    problems.attempt("student.neuron", lambda: check_neuron(recipe, encoder.constant))
    problems.attempt("student.encoder", lambda: check_encoder(recipe, data))
    if len(problems.lines) > found:
        # In the network they would fail again.
        return ProbedNetwork(student, Probed())

    def run() -> Probed:
        entry = student_entry(recipe)
        check_spikes(student.network, architectures[table.architecture])
        with on_meta():
            return probe(student.network, image, table.timesteps, classes=len(data.classes), entry=entry)

    return ProbedNetwork(student, problems.attempt("student", run, default=Probed()))


def build_teacher(
    recipe: Recipe, data: Dataset, problems: Problems, name: str = "teacher"
) -> ProbedNetwork[Teacher] | None:
    """The teacher, or the "start", on the meta device; None where it cannot be built."""
    image = (data.channels, data.height, data.width)
    with on_meta():
        teacher = problems.attempt(name, lambda: without_data(make_teacher(recipe, data, name)))
        if teacher is None:
            return None
        run = partial(probe, teacher.network, image, classes=len(data.classes), entry=teacher_entry(recipe, name))
        return ProbedNetwork(teacher, problems.attempt(name, run, default=Probed()))


def student_entry(recipe: Recipe) -> Entry:
    """The part of the student that is blamed for its faults: the user's own, else the architecture."""
    table = recipe.student
    parts = architectures[table.architecture], neurons[table.neuron.name], encoders[table.encoder_table.name]
    return next((part for part in parts if part.own), parts[0])


def teacher_entry(recipe: Recipe, name: str = "teacher") -> Entry:
    table = recipe.start if name == "start" else recipe.teacher
    return teacher_registry(table.architecture)[table.architecture]


def try_student(recipe: Recipe, data: Dataset, student: ProbedNetwork[Student], pairs: list[Pair]) -> None:
    """Look for gradients and equal answers in a student with a part of the user's own.

    Raises:
        UserError: something is wrong with them.
    """
    entry = student_entry(recipe)
    if not entry.own:
        return
    image, steps = (data.channels, data.height, data.width), recipe.student.timesteps
    asked = {name for loss in recipe.losses for name in inputs_of(losses[loss.name], loss.options)}
    compared = [suffix for name, suffix in (("student_features", ""), ("student_currents", CURRENT)) if name in asked]
    taps = [pair.student + suffix for suffix in compared for pair in pairs]
    check_gradients(student.network, image, steps, taps, entry)
    with keyed(recipe.seed, "probe"):
        model = make_student(recipe, data)
    model.timesteps = min(steps, STEPS)
    check_answers(recipe, data, model, student.shapes, entry)


def try_teacher(
    recipe: Recipe, data: Dataset, teacher: ProbedNetwork[Teacher], trained: bool, name: str = "teacher"
) -> None:
    """The same for a teacher, or a "start", of the user's own; one that is not trained needs no gradient."""
    entry = teacher_entry(recipe, name)
    if not entry.own:
        return
    if trained:
        check_gradients(teacher.network, (data.channels, data.height, data.width), 1, (), entry)
    with keyed(recipe.seed, "probe"):
        model = make_teacher(recipe, data, name)
    check_answers(recipe, data, model, teacher.shapes, entry)
