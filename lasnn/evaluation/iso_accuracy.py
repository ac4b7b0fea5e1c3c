"""How many steps a conversion of the same ANN needs for the accuracy of the distilled student: the ratio.

Threshold balancing converts the very teacher that taught the student. QCFS needs one that was trained on its own
activation; that teacher is trained in a run of its own, which is as short as a run can be.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any, get_args

import torch

from lasnn.errors import UserError
from lasnn.evaluation.conversion import OF_ONE_T, Method, check
from lasnn.evaluation.evaluate import evaluate, first_reaching
from lasnn.factory import make_teacher
from lasnn.plan import Plan
from lasnn.recipe.check import teacher_registry
from lasnn.recipe.load import toml_value
from lasnn.recipe.schema import Recipe
from lasnn.registry import teachers
from lasnn.run import RunFolder
from lasnn.weights import digest, load_weights

METHODS: tuple[Method, ...] = get_args(Method)
LONGEST = 1024
# A run of T steps costs T passes, and one of 4 T gives the shorter one too: few are made in vain.
GROWTH, SHORTEST = 4, 16
# T that are measured at once where each needs a conversion of its own.
TOGETHER = 4


def qcfs_settings(recipe: Recipe) -> tuple[str, ...] | None:
    """Settings of the run that trains QCFS's own teacher, () where the recipe's is one; None where it is not trained
    or has activations of its own.

    The student of that run is of no use: one step, one epoch, cross-entropy.
    """
    if recipe.teacher.activation == "qcfs":
        return ()
    if recipe.teacher.checkpoint is not None or teacher_registry(recipe.teacher.architecture) is teachers:
        return None
    short = ("student.timesteps=1", "distill.epochs=1", "distill.warmup_epochs=0.0")
    return ("teacher.activation=qcfs", *short, f"losses={toml_value([{'name': 'cross-entropy'}])}")


def furthest(method: Method, longest: int) -> int:
    """The T at which a method is given up: where each T is a conversion of its own, and all of them cost the square of
    the longest, so early that they cost no more than twice those of another method.
    """
    return min(longest, math.isqrt(4 * longest)) if method in OF_ONE_T else longest


def check_convertible(plans: Mapping[str, Plan]) -> None:
    """Check that each method can convert the teacher of its plan; nothing is run.

    Raises:
        UserError: what cannot be converted, once for each method.
    """
    problems = []
    for method, plan in plans.items():
        data = plan.data
        with torch.device("meta"):
            teacher = make_teacher(plan.recipe, data).eval()
        try:
            check(teacher, method, (data.channels, data.height, data.width))
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise UserError(*problems)


def convert_until(run: Path, method: Method, accuracy: float, longest: int, kept: Path) -> dict[str, Any]:
    """Convert a run's teacher and measure it at every T, until an accuracy is reached or it is given up (`furthest`).

    What is measured is kept in a file, and taken from there where it goes far enough for the same teacher.

    Returns:
        `method`, `run`, `teacher` (digest of its weights), `teacher_accuracy`, `converted` (see `evaluate`) and
        `results`: `timesteps`, `accuracy`, `firing_rate` and `energy_uj` for T = 1, 2, 3, ...
    """
    teacher = digest(load_weights(run / "teacher.safetensors")[0])
    folder = RunFolder(kept.parent)
    found = folder.read_json(kept.name)
    if found.get("teacher") != teacher:
        found = {"results": []}
    last = furthest(method, longest)
    while len(found["results"]) < last and first_reaching(found["results"], accuracy) is None:
        done = len(found["results"])
        first, steps = 1, min(last, max(SHORTEST, GROWTH * done))
        if method in OF_ONE_T:
            first, steps = done + 1, min(last, done + TOGETHER)
        results = evaluate(run, range(first, steps + 1), converted=method, include_speed=False)
        figures = ("timesteps", "accuracy", "firing_rate", "energy_uj")
        found = {
            "method": method,
            "run": str(run),
            "teacher": teacher,
            "teacher_accuracy": results[0]["teacher_accuracy"],
            # Of a conversion for each T that of the last one.
            "converted": results[-1]["converted"],
            "results": found["results"][: first - 1] + [{key: result[key] for key in figures} for result in results],
        }
        folder.write_json(kept.name, found)
    return found


def match(
    method: Method, timesteps: int, students: Mapping[int, float], curves: Mapping[int, dict], longest: int
) -> dict[str, Any]:
    """The smallest T at which conversions reach the accuracy of students, by seed, and its ratio to the students' T.

    Args:
        timesteps: T of the students.
        longest: T at which the method was given up.
        students: {seed: accuracy}.
        curves: {seed: what `convert_until` returned}.
    """
    seeds = [seed for seed in students if seed in curves]
    reached = {seed: first_reaching(curves[seed]["results"][:longest], students[seed]) for seed in seeds}
    needed = [math.inf if reached[seed] is None else reached[seed]["timesteps"] for seed in seeds]
    middle = median(needed) if needed else math.inf
    return {
        "method": method,
        "timesteps": timesteps,
        "longest": longest,
        "accuracy": mean(students[seed] for seed in seeds) if seeds else None,
        "teacher_accuracy": mean(curves[seed]["teacher_accuracy"] for seed in seeds) if seeds else None,
        "reached": {str(seed): result and result["timesteps"] for seed, result in reached.items()},
        "energy_uj": {str(seed): result and result["energy_uj"] for seed, result in reached.items()},
        "ratio": middle / timesteps if math.isfinite(middle) else None,
    }


def accuracy_over_time(curves: Iterable[dict]) -> dict[int, float]:
    """Mean accuracy of conversions over seeds at T = 1, 2, 4, ..., as far as all of them were measured."""
    results = [curve["results"] for curve in curves]
    furthest = min(map(len, results), default=0)
    powers = [2**power for power in range(furthest.bit_length())]
    return {t: mean(result[t - 1]["accuracy"] for result in results) for t in powers}


def say_reached(found: Mapping[str, Any]) -> str:
    """The T of each seed, or that it is not reached."""
    steps = found["reached"].values()
    if steps and all(step is None for step in steps):
        return f"not reached by T = {found['longest']}"
    return ", ".join(f"> {found['longest']}" if step is None else str(step) for step in steps)


def say_ratio(found: Mapping[str, Any]) -> str:
    """The median ratio; a lower bound where one of the seeds that it lies between does not reach the accuracy."""
    if found["ratio"] is not None:
        return f"{found['ratio']:g}"
    longest = found["longest"]
    bound = median([longest if step is None else step for step in found["reached"].values()] or [longest])
    return f"> {bound / found['timesteps']:g}"


def sentence(found: Mapping[str, Any]) -> str:
    """A match in a line of text."""
    who = f"{found['method']} (ANN: {found['teacher']}, {found['teacher_accuracy']:.4f})"
    what = f"the distilled student's {found['accuracy']:.4f} of T = {found['timesteps']}"
    if all(step is None for step in found["reached"].values()):
        return f"{who} does not reach {what} by T = {found['longest']}: ratio {say_ratio(found)}"
    return f"{who} reaches {what} at T = {say_reached(found)}: ratio {say_ratio(found)}"
