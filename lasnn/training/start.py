"""Where a student's weights start: at random, with those of its ANN twin, or with those of a file."""

from collections.abc import Mapping

from torch import Tensor

from lasnn import processes
from lasnn.compatibility import starting_weights
from lasnn.data import Images, Streamed
from lasnn.description import describe_start
from lasnn.evaluation.balance import balance
from lasnn.factory import make_student
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher, without_activations
from lasnn.plan import Plan
from lasnn.random import keyed
from lasnn.registry import translate_own_errors
from lasnn.weights import digest


def new_student(
    plan: Plan, anns: Mapping[str, Teacher | None], images: Images | Streamed
) -> tuple[Student, str | None]:
    """The student before its training, on the run's device.

    Args:
        anns: the "teacher" and the "start", as far as the recipe has them.
        images: the training images.

    Returns:
        The student, and a digest of what it started from; None where that is nothing.
    """
    with keyed(plan.recipe.seed, "student"):
        student = make_student(plan.recipe, plan.data)
    weights = _weights(plan, anns, student)
    # What the neurons learn need not be among them.
    student.network.load_state_dict(student.network.state_dict() | weights)
    student.to(plan.device)
    if plan.start.converted:
        # Each process computes the same; the main one's is taken, so that not a bit differs.
        _convert(plan, student, anns[plan.start.source], images)
        processes.broadcast_parameters(student)
    return student, digest(weights) if weights else None


def _convert(plan: Plan, student: Student, ann: Teacher, images: Images | Streamed) -> None:
    shape = (plan.data.channels, plan.data.height, plan.data.width)
    measured = plan.recipe.student.calibration == "images"
    with translate_own_errors(lambda: "the converted start"):
        balance(student, ann, shape, images if measured else None, plan.recipe.seed, plan.recipe.time_chunk)


def _weights(plan: Plan, anns: Mapping[str, Teacher | None], student: Student) -> dict[str, Tensor]:
    """The weights that the plan starts the student from; {} for its own."""
    start = plan.start
    if start.source == "random":
        return {}
    if start.source == "file":
        return starting_weights(start.path, student.network, describe_start(plan.recipe, plan.data))[0]
    return without_activations(anns[start.source].network)
