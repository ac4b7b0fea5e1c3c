"""What a spiking network does on images: accuracy, firing rate and operations, after every time step.

Shapes: T time steps, B batch, C channels, H x W pixels, K classes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lasnn import processes
from lasnn.data import Batches, Images, Streamed
from lasnn.errors import not_finite
from lasnn.evaluation.metrics import AccuracyMetrics, EarlyExit
from lasnn.evaluation.operations import OperationCounter, merge_by_name
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.random import generator

# What is measured on the images that are held out.
VALIDATION = ("validation_accuracy", "validation_nll")


@torch.no_grad()
def measure(
    student: Student,
    images: Images,
    timesteps: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    draw: int = 0,
    early_exit: float | None = None,
    watch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> list[dict[str, Any]]:
    """Accuracy, firing rate and energy of a student at each of several T.

    With a causal encoder one pass of the longest run serves all: the logits after t steps are those of a run of t.

    Args:
        student: in eval mode.
        images: test images, on the student's device.
        timesteps: the values of T.
        batch_size: images a batch.
        seed: keys the encoder's random numbers.
        draw: further random numbers of the same seed, for an encoder that draws.
        early_exit: stop an image as soon as the largest class probability reaches this; for causal encoders.
        watch: called with each batch of each run: the mean logits of its first 1 to T steps [T, B, K], the labels [B]
            and the energy in µJ of these steps [T, B].

    Returns:
        One dict for each T, in the order given: `timesteps`, `images`, `accuracy` (a fraction), `accuracy_by_class`,
        `calibration_error` (expected, 15 bins), `confusion` (rows: true classes), `firing_rate` (spikes per neuron and
        step), `silent` (the fraction of neurons that spike on no image) and both by layer, `energy_uj` (per image; also
        by layer), `operations` (per image), `energy_with_memory` (per image, for "fp32" and "int8"; see
        `lasnn.evaluation.energy.energy_with_memory`), `memory_accesses` (per image, by layer), `counting_notes` (by
        layer, what could not be told; see `lasnn.evaluation.operations.OperationCounter`), with `early_exit` also
        `exit`: its `threshold`, `mean_steps`, `accuracy` and `energy_uj`.

    Raises:
        ValueError: `early_exit` with an encoder that is not causal.
        MachineError: the spikes are not finite numbers.
    """
    causal = student.encoder.causal
    if early_exit is not None and not causal:
        raise ValueError("early exit needs a causal encoder")
    results: dict[int, dict[str, Any]] = {}
    for longest in [max(timesteps)] if causal else sorted(set(timesteps)):
        steps = sorted(set(timesteps)) if causal else [longest]
        student.timesteps = longest
        tallies: dict[int, AccuracyMetrics] = {}
        exits = {} if early_exit is None else {t: EarlyExit(early_exit) for t in steps}
        with OperationCounter(student, longest) as counter:
            for part in batch_slices(images, batch_size):
                batch, labels = part.images, part.labels
                logits, _ = student.steps(
                    batch, generator=_draws(seed, part.index, batch.device, draw), **part.place_in_batch
                )
                counted = torch.arange(1, longest + 1, device=batch.device)[:, None, None]
                means = logits.float().cumsum(0) / counted
                for t in steps:
                    tallies.setdefault(t, AccuracyMetrics(logits.shape[-1])).add(means[t - 1], labels)
                energy = counter.energy_by_image() if exits or watch else None
                for t, early in exits.items():
                    early.add(means[:t], labels, energy[:t])
                if watch is not None:
                    watch(means, labels, energy)
        counter.join()
        every = processes.all_gather((tallies, exits))
        tallies = merge_by_name([part for part, _ in every], add)
        exits = merge_by_name([part for _, part in every], add)
        total = counter.after(longest)["firing_rate"]
        if not math.isfinite(total):
            raise not_finite("the student's spikes")
        for t in steps:
            results[t] = {
                "timesteps": t,
                "images": len(images),
                **tallies[t].result(),
                **counter.after(t),
                **({"exit": exits[t].result()} if exits else {}),
            }
    return [results[t] for t in timesteps]


def _draws(seed: int, index: int, device: torch.device, draw: int = 0) -> torch.Generator:
    """The random numbers of a batch in evaluation; draw 0 is that of the training's own evaluations."""
    return generator(seed, "evaluate", index, *([draw] if draw else []), device=device)


def accuracy(student: Student, images: Images | Streamed, *, batch_size: int, seed: int) -> float:
    """Fraction of the images that the student classifies correctly at its T; the same draws as `measure`."""
    return validate(student, images, batch_size=batch_size, seed=seed)["validation_accuracy"]


def teacher_accuracy(teacher: Teacher, images: Images | Streamed, *, batch_size: int) -> float:
    """Fraction of the images that the teacher classifies correctly."""
    return validate(teacher, images, batch_size=batch_size, seed=0)["validation_accuracy"]


@torch.no_grad()
def validate(network: Student | Teacher, images: Images | Streamed, *, batch_size: int, seed: int) -> dict[str, float]:
    """A network on images, with the logits that its accuracy is measured by (a student's mean over time).

    Returns:
        `validation_accuracy`, a fraction, and `validation_nll`, the mean negative log-likelihood of the true class, in
        nats.
    """
    correct, nll = 0, 0.0
    for part in batch_slices(images, batch_size):
        if isinstance(network, Student):
            draws = _draws(seed, part.index, part.images.device)
            logits = network.steps(part.images, generator=draws, **part.place_in_batch)[0].float().mean(0)
        else:
            logits = network(part.images).float()
        correct += int((logits.argmax(-1) == part.labels).sum())
        nll += float(cross_entropy(logits.double(), part.labels, reduction="sum"))
    every = processes.all_gather((correct, nll))
    right, lost = (sum(values) / len(images) for values in zip(*every, strict=True))
    return dict(zip(VALIDATION, (right, lost), strict=True))


def evaluation(
    network: Student | Teacher,
    test: Images | Streamed,
    validation: Images | Streamed | None,
    *,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """What is measured after an epoch: `accuracy` on the test images and, where there are some, what `validate` returns
    of those that are held out.
    """
    options = {"batch_size": batch_size, "seed": seed}
    found = {"accuracy": validate(network, test, **options)["validation_accuracy"]}
    return found if validation is None else found | validate(network, validation, **options)


@dataclass(frozen=True)
class EvaluationSlice:
    """This process's part of a batch of test images."""

    index: int
    """The number of the batch."""
    images: Tensor
    """[b, C, H, W] in [0, 1]."""
    labels: Tensor
    """[b]."""
    place_in_batch: dict[str, int]
    """`first` and `total`, as `Student.steps` takes them, where other processes have the rest; else empty."""


def batch_slices(images: Images | Streamed, batch_size: int) -> Iterator[EvaluationSlice]:
    """This process's parts of the batches, in order; those without an image are left out."""
    batches = Batches(images, batch_size, seed=0, epoch=0, shuffle=False, share=processes.local_slice)
    for index, (batch, labels) in enumerate(batches):
        total = batches.images_in(index)
        if len(labels) == total:
            yield EvaluationSlice(index, batch, labels, {})
        elif len(labels):
            yield EvaluationSlice(index, batch, labels, {"first": processes.local_slice(total).start, "total": total})
