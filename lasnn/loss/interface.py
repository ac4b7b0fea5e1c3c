"""What a loss may say of itself besides its signature, and what it is told of the stages that it compares."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Readout = Literal["mean", "step"]
# "mean": the features only by their mean over time, so that it may be given that, [1, B, C, H, W], in their place;
# "steps": it is the mean over time steps of what it is of each alone; None: neither.
Reading = Literal["mean", "steps"] | None


@dataclass(frozen=True)
class Pair:
    """A stage of the student and the stage of the teacher that it learns from; shapes are (C, H, W)."""

    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]


# From the pairs and the loss's options to (option, message) of what does not fit; "name" is the loss itself.
PairCheck = Callable[[Sequence[Pair], Mapping[str, Any]], Iterable[tuple[str, str]]]


def over_time(
    reading: Callable[[dict[str, Any]], Reading] | Reading, fix: str = "mark it with lasnn.loss.over_time"
) -> Callable[[Callable], Callable]:
    """Decorator that says how a loss reads the student's features over time; a function is given the loss's options.

    `fix` is what the user can do where that is neither by the mean nor step by step.
    """

    def mark(function: Callable) -> Callable:
        function.over_time = reading if callable(reading) else lambda _: reading
        function.over_time_fix = fix
        return function

    return mark


def reading_of(loss: Callable, options: dict[str, Any]) -> Reading:
    """How a loss with these options reads the student's features over time; None where it does not say."""
    return getattr(loss, "over_time", lambda _: None)(options)


def reading_fix(loss: Callable) -> str:
    """What makes a loss one that can read the features by their mean over time, or step by step."""
    return getattr(loss, "over_time_fix", "mark it with lasnn.loss.over_time")


def check_pairs(check: PairCheck) -> Callable[[Callable], Callable]:
    """Decorator that gives a loss a check of the paired stages, made before anything is trained."""

    def mark(function: Callable) -> Callable:
        function.check_pairs = check
        return function

    return mark


def pair_problems(loss: Callable, pairs: Sequence[Pair], options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(option, message) of what a loss with these options cannot do with the pairs."""
    return list(getattr(loss, "check_pairs", lambda *_: ())(pairs, options))
