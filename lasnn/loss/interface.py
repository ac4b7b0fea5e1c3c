"""What a loss may say of itself besides its signature, what it is told of the stages that it compares, and its call."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from lasnn.registry import Entry, translate_errors

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

    @property
    def pixels(self) -> int:
        """Of the smaller of both maps, which the larger is pooled to."""
        return math.prod(map(min, self.student_shape[1:], self.teacher_shape[1:]))


# From the pairs and the loss's options to (option, message) of what does not fit; "name" is the loss itself.
PairCheck = Callable[[Sequence[Pair], Mapping[str, Any]], Iterable[tuple[str, str]]]
PairNotes = Callable[[Sequence[Pair], Mapping[str, Any]], Iterable[str]]


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


def check_pairs(check: PairCheck, notes: PairNotes = lambda *_: ()) -> Callable[[Callable], Callable]:
    """Decorator that gives a loss a check of the paired stages, made before anything is trained, and `notes`, lines for
    the plan on what can be done but does little.
    """

    def mark(function: Callable) -> Callable:
        function.check_pairs, function.pair_notes = check, notes
        return function

    return mark


def pair_problems(loss: Callable, pairs: Sequence[Pair], options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(option, message) of what a loss with these options cannot do with the pairs."""
    return list(getattr(loss, "check_pairs", lambda *_: ())(pairs, options))


def pair_notes(loss: Callable, pairs: Sequence[Pair], options: Mapping[str, Any]) -> list[str]:
    """Lines on what a loss with these options makes of the pairs."""
    return list(getattr(loss, "pair_notes", lambda *_: ())(pairs, options))


def asks_for(inputs: Callable[[Mapping[str, Any]], Iterable[str]]) -> Callable[[Callable], Callable]:
    """Decorator of a loss that needs only some of its inputs: from its options to their names. The others, which are
    not computed for it, are None.
    """

    def mark(function: Callable) -> Callable:
        function.asks_for = inputs
        return function

    return mark


def inputs_of(entry: Entry, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The inputs that a loss needs with these options."""
    asked = getattr(entry.function, "asks_for", None)
    return entry.inputs if asked is None else tuple(asked(options))


def couples_images(loss: Callable) -> Callable:
    """Decorator of a loss that compares the images of a batch with each other, so that its parts do not add up. Of
    several processes each is given all images of the batch; with `data.accumulate` it is refused.
    """
    loss.couples_images = True
    return loss


def does_couple_images(loss: Callable) -> bool:
    """Whether a loss compares the images of a batch with each other."""
    return getattr(loss, "couples_images", False)


def at_one_step(what: str) -> Callable[[Callable], Callable]:
    """Decorator of a loss that compares time steps: what is left of it at T = 1, for the plan's notes."""

    def mark(function: Callable) -> Callable:
        function.at_one_step = what
        return function

    return mark


def left_at_one_step(loss: Callable) -> str | None:
    """What is left at T = 1 of a loss that compares time steps; None of others."""
    return getattr(loss, "at_one_step", None)


class BoundLoss:
    """A registered loss with a recipe's options, ready to be called with its inputs.

    Args:
        entry: of the loss.
        options: the recipe's.
        pairs: the stages that are compared, whose shapes a class may ask for.
        num_classes: K.

    Attributes:
        inputs: the names of what it needs.
        module: of a loss that is a class; it has drawn its weights from the global generators. None of a function.
        reading: how it reads the student's features over time.
        couples_images: whether it compares the images of a batch with each other.

    Raises:
        UserError: its constructor fails.
    """

    def __init__(self, entry: Entry, options: dict[str, Any], pairs: Sequence[Pair], num_classes: int):
        self.entry = entry
        self.inputs = inputs_of(entry, options)
        self.reading = reading_of(entry.function, options)
        self.couples_images = does_couple_images(entry.function)
        self.module: nn.Module | None = None
        if not inspect.isclass(entry.function):
            self._function = partial(entry.function, **options)
            return
        sizes = {
            "student_shapes": [pair.student_shape for pair in pairs],
            "teacher_shapes": [pair.teacher_shape for pair in pairs],
            "num_classes": num_classes,
        }
        with translate_errors(entry):
            self._function = self.module = entry.function(*(sizes[name] for name in entry.sizes), **options)

    def __call__(self, given: Mapping[str, Any]) -> Tensor:
        """The loss of the inputs, by name; those that it does not need may be missing."""
        with translate_errors(self.entry):
            return self._function(*(given[name] if name in self.inputs else None for name in self.entry.inputs))
