"""Whether a recipe's losses can work on its networks: on the pairs, in chunks of time, in parts of a batch; and each of
them on small random inputs.
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from inspect import isclass
from typing import Any

import torch
from torch import Tensor

from lasnn.data import Dataset
from lasnn.errors import UserError
from lasnn.loss import (
    BoundLoss,
    Pair,
    does_couple_images,
    inputs_of,
    left_at_one_step,
    pair_notes,
    pair_problems,
    reading_fix,
    reading_of,
)
from lasnn.memory import count_parameters
from lasnn.network.student import Student
from lasnn.network.teacher import Classifier, Teacher
from lasnn.probe.answers import said
from lasnn.probe.network import stages_without_current
from lasnn.probe.parts import batches_to_try
from lasnn.probe.recipe_networks import ProbedNetwork
from lasnn.problems import Problems
from lasnn.random import generator, keyed
from lasnn.recipe.schema import LossTable, Recipe
from lasnn.registry import Entry, losses, translate_errors


def check_losses(recipe: Recipe, pairs: list[Pair], wrong: list[str], problems: Problems) -> None:
    """Whether each loss can work on the pairs, and on chunks of time; `wrong` pairs are reported already."""
    for index, loss in enumerate(recipe.losses):
        entry = losses[loss.name]
        if recipe.data.accumulate > 1 and does_couple_images(entry.function):
            problems.report(
                f"losses.{index}.name",
                f"{loss.name!r} compares the images of a batch with each other, which data.accumulate = "
                f"{recipe.data.accumulate} computes in parts; set accumulate = 1",
            )
        asked = inputs_of(entry, loss.options)
        if not any(name.endswith(("_features", "_currents")) for name in asked):
            continue
        if not pairs and not wrong:
            problems.report(f"losses.{index}.name", f"{loss.name!r} needs pairs of stages; name some in distill.pairs")
        with translate_errors(entry):
            found = pair_problems(entry.function, pairs, loss.options)
        for option, message in found:
            problems.report(f"losses.{index}.{option}", message)
        if recipe.time_chunk and (why := _unreadable_in_chunks(entry, loss.options, asked)):
            fix = f"set time_chunk = 0, or {reading_fix(entry.function)}"
            problems.report(f"losses.{index}", f"{loss.name!r} {why}, which distill.time_chunk does not keep; {fix}")


def _unreadable_in_chunks(entry: Entry, options: dict[str, Any], asked: Sequence[str]) -> str | None:
    """What a loss reads that chunks of time do not keep, in words; None where it can be computed in them."""
    reading = reading_of(entry.function, options)
    if "student_features" in asked and reading is None:
        return "reads its features at all time steps together"
    if reading == "steps" and (isclass(entry.function) or "student_currents" in asked):
        # Batch norms in it would update their statistics in each chunk, and again backward; a current is a mean.
        return "has learnt parts or reads currents, and features step by step"
    return None


def check_currents(
    recipe: Recipe,
    data: Dataset,
    pairs: list[Pair],
    networks: dict[str, ProbedNetwork[Student] | ProbedNetwork[Teacher] | None],
    problems: Problems,
) -> None:
    """Whether the paired stages have currents, for the losses that compare these."""
    if problems.lines:
        return
    image = (data.channels, data.height, data.width)
    asked = [inputs_of(losses[loss.name], loss.options) for loss in recipe.losses]
    for who, built in networks.items():
        index = next((index for index, names in enumerate(asked) if f"{who}_currents" in names), None)
        if index is None or built is None:
            continue
        for line in stages_without_current(built.network, image, [getattr(pair, who) for pair in pairs]):
            fix = "leave it out of distill.pairs, or compare features"
            name = recipe.losses[index].name
            problems.report(f"losses.{index}", f"{name!r} compares currents; the {who}'s {line}: {fix}")


def scheduled_losses(recipe: Recipe) -> Iterator[str]:
    """A line for each loss whose weight does not stay."""
    for loss in recipe.losses:
        if loss.schedule == "cosine":
            yield f"loss     {loss.name!r}: its weight falls to 0 along a cosine"
        elif loss.schedule == "until":
            yield f"loss     {loss.name!r}: its weight is 0 after {100 * loss.until:g}% of the training"


def empty_losses(recipe: Recipe, pairs: Sequence[Pair]) -> Iterator[str]:
    """A line for each loss that compares time steps where there is one, and for each with pairs that do little."""
    for loss in recipe.losses:
        function = losses[loss.name].function
        left = left_at_one_step(function) if recipe.student.timesteps == 1 else None
        if left:
            yield f"loss     {loss.name!r} compares time steps, and T is 1: {left}"
        for line in pair_notes(function, pairs, loss.options):
            yield f"loss     {loss.name!r}: {line}"


def try_losses(
    recipe: Recipe,
    data: Dataset,
    pairs: Sequence[Pair],
    teacher: ProbedNetwork[Teacher] | None,
    mixed: bool,
    problems: Problems,
) -> int:
    """Call each loss on random tensors; `mixed` targets are class probabilities.

    Returns:
        How many learnable numbers the losses have of their own.
    """
    parameters = 0
    for index, loss in enumerate(recipe.losses):
        key, classifier = f"losses.{index}", None
        if "teacher_classifier" in inputs_of(losses[loss.name], loss.options):
            classifier = problems.attempt(key, partial(_classifier, teacher.model, data))
            if classifier is None:
                continue
        attempt = partial(_check_loss, loss, recipe, data, pairs, mixed, classifier)
        parameters += problems.attempt(key, attempt) or 0
    return parameters


def _classifier(teacher: Teacher, data: Dataset) -> Classifier:
    """The teacher's classifier, on the meta device.

    Raises:
        UserError: it has none for the data's classes.
    """
    found, classes = teacher.classifier, len(data.classes)
    if len(found.weight) != classes:
        raise UserError(
            f"the last nn.Linear in the teacher's head has {len(found.weight)} outputs and the data {classes} classes, "
            "so that it is no classifier"
        )
    return found


def _check_loss(
    loss: LossTable,
    recipe: Recipe,
    data: Dataset,
    pairs: Sequence[Pair],
    mixed: bool,
    classifier: Classifier | None,
) -> int:
    """Call a loss on random tensors of the run's shapes: of two images and, where it is the user's, of a batch.

    Args:
        mixed: the targets are class probabilities.
        classifier: the teacher's, on any device, for its shape; None where no loss asks for it.

    Returns:
        How many learnable numbers it has.

    Raises:
        UserError: it fails, or does not return one finite number that has a gradient.
    """
    entry, draws = losses[loss.name], generator("try", loss.name)
    classes, steps = len(data.classes), recipe.student.timesteps
    with keyed(recipe.seed, "probe"):
        bound = BoundLoss(entry, loss.options, pairs, classes)
    an_image = steps * (classes + sum(map(torch.Size.numel, (torch.Size(pair.student_shape) for pair in pairs))))
    for images in batches_to_try(recipe, an_image, entry.own):

        def random(who: str, *leading: int, images: int = images) -> list[Tensor]:
            shapes = [getattr(pair, f"{who}_shape") for pair in pairs]
            return [torch.rand(*leading, images, *shape, generator=draws) for shape in shapes]

        # As features are: spikes, and what ReLU leaves, so that half of both is 0.
        spikes = [feature.round() for feature in random("student", steps)]

        learnt = {
            "logits": torch.randn(steps, images, classes, generator=draws).requires_grad_(),
            "student_features": [feature.requires_grad_() for feature in spikes],
            "student_currents": [current.requires_grad_() for current in random("student", 1)],
        }
        given = {
            "targets": torch.full((images, classes), 1 / classes) if mixed else torch.arange(images) % classes,
            "teacher_logits": torch.randn(images, classes, generator=draws),
            "teacher_features": [(feature - 0.5).relu() for feature in random("teacher")],
            "teacher_currents": random("teacher"),
        }
        for name, value in learnt.items():
            given[name] = [one.clone() for one in value] if isinstance(value, list) else value.clone()
        if classifier is not None:
            shapes = classifier.weight.shape, classifier.bias.shape
            given["teacher_classifier"] = Classifier(*(torch.randn(shape, generator=draws) for shape in shapes))
        with keyed(recipe.seed, "probe"), warnings.catch_warnings():
            # What it returns says so, too.
            warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True to a scalar")
            value = bound(given)
        if not isinstance(value, Tensor) or value.ndim != 0:
            what = list(value.shape) if isinstance(value, Tensor) else said(value)
            raise UserError(f"{entry.said} must return one number, a tensor []; it returned {what}")
        if not entry.own:
            break
        if not value.isfinite():
            raise UserError(
                f"{entry.said} is {value.item()} on {images} random images: a logarithm or a division by 0?"
            )
        gradients = []
        if value.requires_grad:
            with translate_errors(entry):
                leaves = [learnt["logits"], *learnt["student_features"], *learnt["student_currents"]]
                gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        if loss.weight > 0 and all(gradient is None for gradient in gradients):
            fix = "compute it from the logits or the student's features without detach(), item(), argmax or float()"
            raise UserError(f"{entry.said} has no gradient, so that nothing learns from it: {fix}")
        if not all(gradient is None or gradient.isfinite().all() for gradient in gradients):
            raise UserError(
                f"the gradient of {entry.said} is not finite on spikes and features that are often 0: a root there has "
                "none; add a small number inside it, as (x + 1e-8).sqrt()"
            )
    return 0 if bound.module is None else count_parameters(bound.module)
