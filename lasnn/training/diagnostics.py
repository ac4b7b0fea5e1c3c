"""What each loss term does to the student, and how its stages spike: after each epoch, on a few images that stay the
same. Nothing of the training is touched.

Batch norm runs on its running statistics, so that these stay as they are; gradients are not accumulated; random numbers
are keyed. Every process computes all of it, on the same images.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lasnn import processes
from lasnn.data import Images, Streamed
from lasnn.factory import make_augmentation
from lasnn.loss import attention, does_couple_images
from lasnn.network.units import NormSpike
from lasnn.plan import Plan, micro_batches
from lasnn.random import generator, keyed
from lasnn.registry import losses
from lasnn.training.objective import DistillationObjective

# Of the time of an epoch's steps, what the images are chosen for: below 2 %, for what is not proportional to them.
SHARE = 0.012
LEAST, MOST = 4, 128


class Diagnostics:
    """Called with the number of an epoch that is done, returns {"diagnostics": ...} for its metrics:

    - `images`: how many it is measured on;
    - `attention_distance`, by pair: 1 - cos of student's and teacher's attention maps (channel sums of the squared
      firing rate and feature), the mean over images; 1 where the student's map is empty;
    - `gradient`, by term: the norm of its weight at the epoch's first step times its gradient on the student's
      parameters, over that of cross-entropy (the recipe's, or else that of the mean logits with weight 1); None where
      that is 0, and of a loss that compares the images of a batch where these are fewer;
    - `firing_rate` and `silent`, by stage: spikes per neuron and step, and the share of neurons that spike on none of
      the images.

    Norms are taken on the parameters, though that costs a backward pass for each term: terms of logits and of features
    meet nowhere before.

    Args:
        objective: the student's.
        plan: the run's.
        images: to train on; a few of them are used, without augmentation.
    """

    def __init__(self, objective: DistillationObjective, plan: Plan, images: Images | Streamed):
        self.objective = objective
        self.pairs = plan.pairs
        # Half precision without its scaler loses small gradients.
        self.half = plan.precision == "bf16"
        self.device, self.data, self.batch_size = plan.device, plan.data, plan.recipe.data.batch_size
        self.mixed = make_augmentation(plan.recipe, plan.data).mixes
        order = torch.randperm(len(images), generator=generator(plan.recipe.seed, "diagnose"))
        self.images, self.chosen = images, order[: how_many(plan, len(images))]

    def __call__(self, epoch: int) -> dict[str, Any]:
        objective, (student, teacher) = self.objective, self.objective.networks
        [(pixels, targets)] = self.images.batches([self.chosen])
        if self.mixed:
            # As the losses get them in training.
            targets = nn.functional.one_hot(targets, len(self.data.classes)).float()
        images = pixels.float() / 255
        draws = generator(objective.seed, "diagnose", device=images.device)
        stages = [pair.student for pair in self.pairs]
        several = len(objective.tables) > 1
        with keyed(objective.seed, "diagnose"), self._evaluating(), torch.set_grad_enabled(several):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.half), counted(student) as spikes:
                logits, features = student.steps(images, {*stages, *objective.student_taps}, draws)
                given = {"targets": targets, **objective.from_teacher(images)} if several else {}
                terms = objective.values(objective.tables, given, logits, features) if several else {}
            found = {"images": len(targets)}
            if self.pairs:
                with torch.no_grad():
                    theirs = teacher.taps(images, [pair.teacher for pair in self.pairs])[1]
                    found["attention_distance"] = {
                        pair.student if pair.student == pair.teacher else f"{pair.student}:{pair.teacher}": float(
                            attention([features[pair.student].detach()], [theirs[pair.teacher]], measure="cosine")
                        )
                        for pair in self.pairs
                    }
            if several:
                weights = objective.weights_at(epoch, 0)
                found["gradient"] = self._gradients(terms, weights, logits, targets)
        return {"diagnostics": found | by_stage(spikes)}

    def _gradients(
        self, terms: dict[str, Tensor], weights: dict[str, float], logits: Tensor, targets: Tensor
    ) -> dict[str, float | None]:
        """The norm of each term's weighted gradient over that of cross-entropy."""
        student, _ = self.objective.networks
        learnt = [parameter for parameter in student.parameters() if parameter.requires_grad]
        # Of fewer images than a batch has it is another loss.
        fewer = len(targets) < min(self.batch_size, len(self.images))
        terms = {
            name: term for name, term in terms.items() if not (fewer and self.objective.bound[name].couples_images)
        }
        norms = {name: weights[name] * norm(term, learnt) if weights[name] else 0.0 for name, term in terms.items()}
        reference = norms.get("cross-entropy", 0.0)
        if not reference:
            reference = norm(nn.functional.cross_entropy(logits.float().mean(0), targets), learnt)
        ratios = {name: value / reference if reference else math.nan for name, value in norms.items()}
        finite = {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}
        return {name: finite.get(name) for name in weights if name != "cross-entropy"}

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Student and losses in evaluation mode within the block, and afterwards as they were."""
        modules = [module for one in (self.objective.networks[0], self.objective) for module in one.modules()]
        modes = [module.training for module in modules]
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode


def how_many(plan: Plan, images: int) -> int:
    """Images to use, of so many to train on: as many as take `SHARE` of an epoch's time, if a backward pass takes twice
    a forward pass, and never more than the training computes at once.
    """
    recipe = plan.recipe
    # In passes of a training step, of which a third goes forward, and two passes of the teacher.
    cost = 1 + 2 * len(recipe.losses) / 3
    share = math.ceil(recipe.data.batch_size / processes.world_size())
    at_once = math.ceil(share / micro_batches(recipe.data.batch_size, recipe))
    if recipe.time_chunk:
        at_once = at_once * recipe.time_chunk // recipe.student.timesteps
    if plan.precision == "fp16":
        # These are in fp32, which takes twice as much.
        at_once //= 2
    # A loss that compares the images of a batch is itself only on a whole one.
    coupled = any(does_couple_images(losses[loss.name].function) for loss in recipe.losses)
    most = max(MOST, recipe.data.batch_size) if coupled else MOST
    return max(1, min(max(LEAST, int(SHARE * images / cost)), most, at_once, images))


def norm(term: Tensor, learnt: list[nn.Parameter]) -> float:
    """The norm of a term's gradient; nothing is added to `grad`."""
    if not term.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(term, learnt, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(gradient.float()) for gradient in gradients if gradient is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


@dataclass
class Counts:
    """What a spiking unit did: which of its neurons spiked, and how many values and spikes it had."""

    spiked: Tensor
    values: int
    spikes: Tensor


@contextmanager
def counted(student: nn.Module) -> Iterator[dict[str, Counts]]:
    """Within the block the spiking units of a student count, by name."""
    found: dict[str, Counts] = {}

    def count(unit: NormSpike, _: Any, output: Tensor) -> None:
        # [T*B, ...]; a long run comes in several calls, a chunk of its steps each.
        spikes = output.detach() != 0
        now = Counts(spikes.any(0), spikes.numel(), spikes.sum())
        if before := found.get(unit.name):
            now = Counts(before.spiked | now.spiked, before.values + now.values, before.spikes + now.spikes)
        found[unit.name] = now

    units = [unit for unit in student.modules() if isinstance(unit, NormSpike)]
    handles = [unit.register_forward_hook(count) for unit in units]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def by_stage(counts: dict[str, Counts]) -> dict[str, dict[str, float]]:
    """Firing rate and silent share of the units, by the stage (or stem, or head) that they are in."""
    stages: dict[str, list[Counts]] = {}
    for name, of_unit in counts.items():
        stages.setdefault(name.partition(".")[0], []).append(of_unit)
    return {
        "firing_rate": {
            stage: sum(int(unit.spikes) for unit in units) / sum(unit.values for unit in units)
            for stage, units in stages.items()
        },
        "silent": {
            stage: 1 - sum(int(unit.spiked.sum()) for unit in units) / sum(unit.spiked.numel() for unit in units)
            for stage, units in stages.items()
        },
    }
