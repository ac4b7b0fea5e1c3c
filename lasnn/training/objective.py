"""The objectives: from images and targets to named terms, and "loss", their weighted sum.

An objective runs networks without registering them as its own: its parameters are those of its losses alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lasnn.loss import reading_of
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.plan import Plan
from lasnn.random import generator, keyed
from lasnn.recipe.schema import LossTable, Recipe
from lasnn.registry import losses, translate_errors


class Objective(nn.Module, ABC):
    """What a phase minimises.

    A call is `objective(images, targets, epoch=0, step=0)` and returns {"<term>": ..., "loss": ...}, scalars that are
    means over the images. `epoch` and `step` key every random number that it draws, dropout's too. The images may be a
    slice of a batch, from number `first` of `total`: what the encoder draws for an image does not depend on the
    slicing; what layers draw by themselves, as dropout does, is keyed by the slice too.

    Args:
        phase: "teacher" or "student", which keys the random numbers.
        seed: of the run.
        weights: of the terms in the sum, in their order.
    """

    def __init__(self, phase: str, seed: int, weights: dict[str, float]):
        super().__init__()
        self.phase = phase
        self.seed = seed
        self.weights = weights

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        epoch: int = 0,
        step: int = 0,
        *,
        first: int = 0,
        total: int | None = None,
    ) -> dict[str, Tensor]:
        # The global generators, for layers that draw by themselves.
        with keyed(self.seed, self.phase, epoch, step, *([first] if first else [])):
            draws = generator(self.seed, "encode", epoch, step, device=images.device)
            terms = self.terms(images, targets, draws, {"first": first, "total": total})
        terms["loss"] = sum(weight * terms[name] for name, weight in self.weights.items())
        return terms

    @abstractmethod
    def terms(
        self, images: Tensor, targets: Tensor, draws: torch.Generator, position: dict[str, int | None]
    ) -> dict[str, Tensor]:
        """The terms, each a scalar.

        Args:
            images, targets: of the slice.
            draws: for the encoder.
            position: `first` and `total` of the call.
        """


class TeacherObjective(Objective):
    """Cross-entropy of an ANN's logits."""

    def __init__(self, teacher: Teacher, recipe: Recipe):
        super().__init__("teacher", recipe.seed, {"cross-entropy": 1.0})
        # A tuple hides the network from nn.Module.
        self.networks = (teacher,)
        self.label_smoothing = recipe.teacher.label_smoothing

    def terms(
        self, images: Tensor, targets: Tensor, draws: torch.Generator, position: dict[str, int | None]
    ) -> dict[str, Tensor]:
        (teacher,) = self.networks
        logits = teacher(images).float()
        if not len(targets):
            return {"cross-entropy": zero_loss([logits])}
        smoothing = self.label_smoothing
        return {"cross-entropy": nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)}


class DistillationObjective(Objective):
    """The recipe's losses of a student under its teacher."""

    def __init__(self, student: Student, teacher: Teacher | None, plan: Plan):
        recipe = plan.recipe
        super().__init__("student", recipe.seed, {loss.name: loss.weight for loss in recipe.losses})
        self.networks = (student, teacher)
        recipe.use_plugins()
        self.losses = recipe.losses
        # Looked up once: a name may come to mean another version of its plugin.
        self.entries = {loss.name: losses[loss.name] for loss in self.losses}
        self.time_chunk = recipe.time_chunk
        inputs = {name for entry in self.entries.values() for name in entry.inputs}
        self.needs_teacher = bool(inputs & {"teacher_logits", "teacher_features"})
        pairs = plan.pairs if "student_features" in inputs else ()
        self.student_taps = [pair.student for pair in pairs]
        self.teacher_taps = [pair.teacher for pair in pairs]

    def terms(
        self, images: Tensor, targets: Tensor, draws: torch.Generator, position: dict[str, int | None]
    ) -> dict[str, Tensor]:
        student, _ = self.networks
        given = {"targets": targets, **self.from_teacher(images)}
        if self.time_chunk:
            return self._terms_in_chunks(images, given, draws, position)
        logits, features = student.steps(images, self.student_taps, draws, **position)
        return self._values(self.losses, given, logits, features)

    def from_teacher(self, images: Tensor) -> dict[str, Any]:
        """The teacher's logits and features, without gradient; nothing where no loss asks for them."""
        if not self.needs_teacher:
            return {}
        _, teacher = self.networks
        with torch.no_grad():
            logits, features = teacher.taps(images, self.teacher_taps)
        return {"teacher_logits": logits, "teacher_features": [features[tap] for tap in self.teacher_taps]}

    def _values(
        self, wanted: Sequence[LossTable], given: dict[str, Any], logits: Tensor, features: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The terms of some of the losses, by name.

        Args:
            given: the losses' inputs that are not the student's.
            logits, features: the student's, of all time steps or of a chunk.
        """
        students = {"logits": logits, "student_features": [features[tap] for tap in self.student_taps]}
        inputs, values = {**given, **students}, {}
        for loss in wanted:
            entry = self.entries[loss.name]
            if len(given["targets"]):
                with translate_errors(entry):
                    values[loss.name] = entry.function(*(inputs[name] for name in entry.inputs), **loss.options)
            else:
                values[loss.name] = zero_loss([students[name] for name in entry.inputs if name in students])
        return values

    def _terms_in_chunks(
        self, images: Tensor, given: dict[str, Any], draws: torch.Generator, position: dict[str, int | None]
    ) -> dict[str, Tensor]:
        """The same with `time_chunk` time steps at once.

        Losses that are means over time steps are computed chunk by chunk, whose features are dropped afterwards.
        """
        student, _ = self.networks
        by_step = [
            loss for loss in self.losses if reading_of(self.entries[loss.name].function, loss.options) == "steps"
        ]
        options = dict(position)
        if by_step:
            options["of_steps"] = lambda logits, features: torch.stack(
                list(self._values(by_step, given, logits, features).values())
            )
        logits, features, means = student.in_chunks(images, self.time_chunk, self.student_taps, draws, **options)
        found = dict(zip([loss.name for loss in by_step], means if by_step else (), strict=True))
        found |= self._values([loss for loss in self.losses if loss not in by_step], given, logits, features)
        return {loss.name: found[loss.name] for loss in self.losses}


def zero_loss(outputs: Iterable[Tensor | list[Tensor]]) -> Tensor:
    """The loss where other processes have all the images of a slice: 0, which keeps this one's gradients in their
    exchange.
    """
    tensors = [tensor for output in outputs for tensor in (output if isinstance(output, list) else [output])]
    return torch.stack([tensor.sum().float() for tensor in tensors]).sum()
