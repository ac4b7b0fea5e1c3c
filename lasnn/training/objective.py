"""The objectives: from images and targets to named terms, and "loss", their weighted sum.

An objective runs networks without registering them as its own: its parameters are those of its losses alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lasnn import processes
from lasnn.kernels.layout import state_dtype
from lasnn.loss import BoundLoss
from lasnn.network.staged import CURRENT
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.plan import Plan
from lasnn.random import generator, keyed
from lasnn.recipe.schema import LossTable
from lasnn.registry import losses


class Objective(nn.Module, ABC):
    """What a phase minimises.

    A call is `objective(images, targets, epoch=0, step=0)` and returns {"<term>": ..., "loss": ...}, scalars that are
    means over the images. `epoch` and `step` key every random number that it draws, dropout's too. The images may be a
    slice of a batch, from number `first` of `total`: what the encoder draws for an image does not depend on the
    slicing; what layers draw by themselves, as dropout does, is keyed by the slice too.

    Args:
        phase: "teacher" (a start's too) or "student", which keys the random numbers.
        seed: of the run.
        weights: of the terms in the sum, in their order; where they follow schedules, those of the first step.
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
        terms["loss"] = sum(weight * terms[name] for name, weight in self.weights_at(epoch, step).items())
        return terms

    def weights_at(self, epoch: int, step: int) -> dict[str, float]:
        """The weights of a step."""
        return self.weights

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

    def __init__(self, teacher: Teacher, seed: int, label_smoothing: float):
        super().__init__("teacher", seed, {"cross-entropy": 1.0})
        # A tuple hides the network from nn.Module.
        self.networks = (teacher,)
        self.label_smoothing = label_smoothing

    def terms(
        self, images: Tensor, targets: Tensor, draws: torch.Generator, position: dict[str, int | None]
    ) -> dict[str, Tensor]:
        (teacher,) = self.networks
        logits = teacher.taps(images)[0].float()
        if not len(targets):
            return {"cross-entropy": zero_loss([logits])}
        smoothing = self.label_smoothing
        return {"cross-entropy": nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)}


class DistillationObjective(Objective):
    """The recipe's losses of a student under its teacher.

    Its parameters are those of losses with learnt parts, which `losses` has by their number in the recipe.

    Args:
        student, teacher: on the run's device.
        plan: the run's.
        images: how many there are to train on: the weights' schedules count the steps.
    """

    def __init__(self, student: Student, teacher: Teacher | None, plan: Plan, images: int):
        recipe = plan.recipe
        super().__init__("student", recipe.seed, {loss.name: loss.weight for loss in recipe.losses})
        self.networks = (student, teacher)
        recipe.use_plugins()
        self.tables = recipe.losses
        self.epochs, self.steps_per_epoch = recipe.distill.epochs, ceil(images / recipe.data.batch_size)
        self.time_chunk = recipe.time_chunk
        # Looked up once: a name may come to mean another version of its plugin.
        self.bound: dict[str, BoundLoss] = {}
        for loss in self.tables:
            with keyed(recipe.seed, "loss", loss.name):
                bound = BoundLoss(losses[loss.name], loss.options, plan.pairs, len(plan.data.classes))
            self.bound[loss.name] = bound
        modules = {str(number): self.bound[loss.name].module for number, loss in enumerate(self.tables)}
        self.losses = nn.ModuleDict({number: module for number, module in modules.items() if module is not None})
        self.losses.to(plan.device)
        asked = {name for bound in self.bound.values() for name in bound.inputs}
        self.asks_teacher = any(name.startswith("teacher_") for name in asked)
        self.asks_classifier = "teacher_classifier" in asked
        # What is tapped of each pair for an input of this name.
        self.taps = {
            name: [getattr(pair, who) + suffix for pair in plan.pairs] if name in asked else []
            for name, who, suffix in (
                ("student_features", "student", ""),
                ("student_currents", "student", CURRENT),
                ("teacher_features", "teacher", ""),
                ("teacher_currents", "teacher", CURRENT),
            )
        }

    def weights_at(self, epoch: int, step: int) -> dict[str, float]:
        done = (epoch * self.steps_per_epoch + step) / (self.epochs * self.steps_per_epoch)
        return {loss.name: loss.weight_at(done) for loss in self.tables}

    @property
    def modules_by_name(self) -> dict[str, nn.Module]:
        """The losses with learnt parts, `loss <name>` each."""
        return {f"loss {name}": bound.module for name, bound in self.bound.items() if bound.module is not None}

    def terms(
        self, images: Tensor, targets: Tensor, draws: torch.Generator, position: dict[str, int | None]
    ) -> dict[str, Tensor]:
        student, _ = self.networks
        given = {"targets": targets, **self.from_teacher(images)}
        if self.time_chunk:
            return self._terms_in_chunks(images, given, draws, position)
        logits, features = student.steps(images, self.student_taps, draws, **position)
        return self.values(self.tables, given, logits, features, position["total"])

    @property
    def student_taps(self) -> list[str]:
        """What is tapped of the student."""
        return self.taps["student_features"] + self.taps["student_currents"]

    def from_teacher(self, images: Tensor) -> dict[str, Any]:
        """The teacher's inputs of the losses, without gradient; nothing where no loss asks for any."""
        if not self.asks_teacher:
            return {}
        _, teacher = self.networks
        names = ("teacher_features", "teacher_currents")
        with torch.no_grad():
            logits, features = teacher.taps(images, [tap for name in names for tap in self.taps[name]])
        found = {name: [features[tap] for tap in self.taps[name]] for name in names}
        if self.asks_classifier:
            found["teacher_classifier"] = teacher.classifier
        return {"teacher_logits": logits, **found}

    def values(
        self,
        wanted: Sequence[LossTable],
        given: dict[str, Any],
        logits: Tensor,
        features: dict[str, Tensor],
        total: int | None = None,
    ) -> dict[str, Tensor]:
        """The terms of some of the losses, by name.

        Args:
            given: the losses' inputs that are not the student's.
            logits, features: the student's, of all time steps or of a chunk.
            total: the images of all processes, if these are a part of them.
        """
        students = {"logits": logits}
        for name in ("student_features", "student_currents"):
            students[name] = [features[tap] for tap in self.taps[name]]
        inputs, values = {**given, **students}, {}
        for loss in wanted:
            bound = self.bound[loss.name]
            if bound.couples_images and total is not None and processes.world_size() > 1:
                value = bound(gathered(bound, inputs, total))
            elif len(given["targets"]):
                value = bound(inputs)
            else:
                value = zero_loss([students[name] for name in bound.inputs if name in students])
                value = value + without_images(bound, inputs)
            if processes.world_size() > 1 and "student_currents" in bound.inputs:
                # Their backward passes exchange statistics: all processes run those of all stages, or none does.
                value = value + 0.0 * zero_loss(students["student_currents"])
            values[loss.name] = value
        return values

    def _terms_in_chunks(
        self, images: Tensor, given: dict[str, Any], draws: torch.Generator, position: dict[str, int | None]
    ) -> dict[str, Tensor]:
        """The same with `time_chunk` time steps at once.

        Losses that are means over time steps are computed chunk by chunk, whose features are dropped afterwards.
        """
        student, _ = self.networks
        by_step = [loss for loss in self.tables if self.bound[loss.name].reading == "steps"]
        options = dict(position)
        if by_step:
            options["of_steps"] = lambda logits, features: torch.stack(
                list(self.values(by_step, given, logits, features, position["total"]).values())
            )
        logits, features, means = student.in_chunks(images, self.time_chunk, self.student_taps, draws, **options)
        found = dict(zip([loss.name for loss in by_step], means if by_step else (), strict=True))
        others = [loss for loss in self.tables if loss not in by_step]
        found |= self.values(others, given, logits, features, position["total"])
        return {loss.name: found[loss.name] for loss in self.tables}


def zero_loss(outputs: Iterable[Tensor | list[Tensor]]) -> Tensor:
    """The loss where other processes have all the images of a slice: 0, which keeps this one's gradients in their
    exchange.
    """
    tensors = [tensor for output in outputs for tensor in (output if isinstance(output, list) else [output])]
    return torch.stack([tensor.sum().float() for tensor in tensors]).sum()


def gathered(bound: BoundLoss, inputs: dict[str, Any], total: int) -> dict[str, Any]:
    """The inputs that a loss needs, of the images of all processes, `total` of them."""

    def of_student(x: Tensor) -> Tensor:
        if total < processes.world_size():
            # A tensor of no images does not show how many steps there are.
            [steps] = processes.all_reduce_max(len(x))
            x = x if x.shape[1] else x[:1].expand(steps, *x.shape[1:])
        return processes.gather_images(x, total, dim=1)

    found = {name: inputs[name] for name in bound.inputs}
    if "student_features" in found and bound.reading == "mean":
        # As many times less to send as there are steps.
        features = found["student_features"]
        found["student_features"] = [x.mean(0, keepdim=True, dtype=state_dtype(x.dtype)) for x in features]
    for name, value in found.items():
        if name != "teacher_classifier":
            others = partial(processes.gather_images, total=total)
            gather = of_student if name == "logits" or name.startswith("student_") else others
            found[name] = [gather(x) for x in value] if isinstance(value, list) else gather(value)
    return found


def without_images(bound: BoundLoss, inputs: dict[str, Any]) -> Tensor | float:
    """0 of a loss's learnt parts, in the same way; its batch norms take part in the other processes' statistics."""
    if bound.module is None:
        return 0.0
    zero = sum(0.0 * parameter.sum().float() for parameter in bound.module.parameters())
    if any(isinstance(part, _BatchNorm) for part in bound.module.modules()):
        # A mean over no images is not a number.
        zero = zero + 0.0 * bound(inputs).nan_to_num(0.0)
    return zero
