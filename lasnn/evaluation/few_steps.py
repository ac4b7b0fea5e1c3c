"""Thresholds of conversions that are made for few steps (see `lasnn.evaluation.conversion`).

Shapes: T time steps, B batch, C channels, H x W pixels.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lasnn.data import Batches, Images
from lasnn.errors import not_finite
from lasnn.evaluation.balance import calibration_batches, noise_of_norms, recorded
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import NormActivate, NormSpike, residual_of

# Rounds of the threshold iteration, and its relative change below which it has come to an end.
ROUNDS, CHANGE = 200, 1e-5
# Of a channel that emits less than this, in the mean square of the spikes a step, nothing is improved.
NEVER = 1e-6
# Thresholds that are tried for the least mean square error, as shares of the largest activation.
SHARES = 100


@torch.no_grad()
def iterated_thresholds(teacher: Teacher, image: tuple[int, int, int], timesteps: int) -> dict[str, Tensor]:
    """The thresholds [C] of each layer that lose least of normal currents over T steps, without data.

    Over T steps an integrate-and-fire neuron that starts at half its threshold rounds a current to q·threshold, q = 0,
    1/T, ..., 1. With currents N(mu, sigma^2) the best threshold for the parts that they fall into is E[x q]/E[q^2]; to
    take it, and so on, is Lloyd's iteration (as in the code of DCGS). mu and sigma are batch norm's shift and scale;
    where a residual is added, or there is no batch norm, those of noise of these sent through the network.
    """
    found = {}
    for name, (mean, deviation) in normal_currents(teacher, image).items():
        mean, deviation = mean.double(), deviation.double().clamp(min=1e-12)
        threshold = torch.where(mean + 2 * deviation > 0, mean + 2 * deviation, deviation)
        for _ in range(ROUNDS):
            factor = lloyd(mean, deviation, threshold, timesteps)
            threshold = threshold * factor
            if float((factor - 1).abs().max()) < CHANGE:
                break
        found[name] = threshold.float()
    return found


def lloyd(mean: Tensor, deviation: Tensor, threshold: Tensor, timesteps: int) -> Tensor:
    """By what a round of the iteration multiplies the threshold: E[x q]/(threshold·E[q^2])."""
    odd = 2 * torch.arange(1, timesteps + 1, dtype=mean.dtype, device=mean.device)[:, None] - 1
    a = (odd * threshold / (2 * timesteps) - mean) / (math.sqrt(2) * deviation)
    product = mean / threshold * (1 - a.erf().mean(0))
    product = product + deviation / threshold * math.sqrt(2 / math.pi) * (-a.square()).exp().mean(0)
    square = 1 - (odd * a.erf()).sum(0) / timesteps**2
    return torch.where(square > NEVER, product / square.clamp(min=NEVER), 1.0)


def normal_currents(teacher: Teacher, image: tuple[int, int, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation [C] of what enters each unit's activation, as far as batch norm announces them."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []

    def watch(name: str, unit: NormActivate) -> None:
        alone = [False]

        def before(_: nn.Module, inputs: tuple, options: dict) -> None:
            alone[0] = residual_of(inputs, options) is None

        def on_call(_: Tensor, current: object) -> None:
            if alone[0] and not isinstance(unit.norm, nn.Identity):
                found[name] = unit.norm.bias.clone(), unit.norm.weight.abs()
            else:
                x = current().transpose(0, 1).flatten(1).float()
                found[name] = x.mean(1), x.std(1)

        hooks.append(unit.register_forward_pre_hook(before, with_kwargs=True))
        unit.on_call = on_call

    units = {name: unit for name, unit in teacher.network.named_modules() if isinstance(unit, NormActivate)}
    for name, unit in units.items():
        watch(name, unit)
    try:
        with noise_of_norms(teacher, seed=0) as images:
            teacher(images(image))
    finally:
        for hook in hooks:
            hook.remove()
        for unit in units.values():
            del unit.on_call
    return found


@torch.no_grad()
def balanced_thresholds(teacher: Teacher, images: Images, batch_size: int) -> dict[str, Tensor]:
    """The thresholds [C] of local threshold balancing (Bu et al., CVPR 2025), over one pass of the training images.

    They begin at 0. With each batch a channel's grows by twice the mean of what its activations have above it, over all
    of them; and the layers behind are given activations that are clipped at it, as spikes will be.

    Raises:
        MachineError: an activation is not a finite number.
    """
    thresholds: dict[str, Tensor] = {}
    with clipped(teacher, thresholds):
        for batch, _ in Batches(images, batch_size, seed=0, epoch=0):
            teacher(batch)
    for name, threshold in thresholds.items():
        if not threshold.isfinite().all():
            raise not_finite(f"the teacher's activations in {name}")
    # A channel that was silent on all images stays so, whatever its threshold.
    return {name: torch.where(value > 0, value, 1.0) for name, value in thresholds.items()}


@contextmanager
def clipped(teacher: Teacher, thresholds: dict[str, Tensor]) -> Iterator[None]:
    """Within the block, every call of a unit raises its thresholds and clips its output at them."""

    def hook_of(name: str):
        def clip(_: nn.Module, __: object, output: Tensor) -> Tensor:
            channels = output.shape[1]
            by_channel = output.transpose(0, 1).reshape(channels, -1).float()
            threshold = thresholds.setdefault(name, torch.zeros(channels, device=output.device))
            threshold += 2 * (by_channel - threshold[:, None]).clamp(min=0).mean(1)
            return output.clamp(max=threshold.view(-1, *(1 for _ in output.shape[2:])))

        return clip

    hooks = [
        unit.register_forward_hook(hook_of(name))
        for name, unit in teacher.network.named_modules()
        if isinstance(unit, NormActivate)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def nearest_thresholds(teacher: Teacher, images: Images, timesteps: int, start: float) -> dict[str, float]:
    """The threshold of each layer whose spikes over T steps are nearest to its activations, in the mean square, on some
    training images; 1 for a silent layer.
    """
    currents = recorded(teacher, lambda: [teacher(batch) for batch in calibration_batches(images, seed=0)])
    found = {}
    for name, (current, output) in currents.items():
        largest = float(output.max())
        tried = [largest * share / SHARES for share in range(1, SHARES + 1)]

        def error(threshold: float, current: Tensor = current, output: Tensor = output) -> float:
            count = (current * (timesteps / threshold) + start).floor().clamp(0, timesteps)
            return float((count * (threshold / timesteps) - output).square().mean())

        found[name] = min(tried, key=error) if largest > 0 else 1.0
    return found


@torch.no_grad()
def correct_biases(converted: Student, teacher: Teacher, images: Images) -> None:
    """Light calibration (Li et al., ICML 2021): layer by layer, take from the shift of each channel's batch norm what
    the mean of its spikes is above that of the ANN's activations, on some training images.

    A layer without a batch norm of its own, as one between linear layers, is not corrected.
    """
    batches = list(calibration_batches(images, seed=0))

    def ann() -> None:
        for batch in batches:
            teacher(batch)

    def snn() -> None:
        for batch in batches:
            converted.steps(batch)

    wanted = channel_means(teacher.network, NormActivate, ann)
    for name in [name for name, unit in converted.network.named_modules() if isinstance(unit, NormSpike)]:
        norm = converted.network.get_submodule(name).norm
        if not isinstance(norm, nn.Identity):
            norm.bias -= channel_means(converted.network, NormSpike, snn, only=name)[name] - wanted[name]


def channel_means(network: nn.Module, kind: type, run, only: str | None = None) -> dict[str, Tensor]:
    """The mean output [C] of the units of a kind during some forward passes."""
    seen: dict[str, list[tuple[Tensor, int]]] = {}

    def hook_of(name: str):
        def add(_: nn.Module, __: object, output: Tensor) -> None:
            values = output.transpose(0, 1).flatten(1).float()
            seen.setdefault(name, []).append((values.sum(1), values.shape[1]))

        return add

    hooks = [
        unit.register_forward_hook(hook_of(name))
        for name, unit in network.named_modules()
        if isinstance(unit, kind) and only in (None, name)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sum(total for total, _ in parts) / sum(count for _, count in parts) for name, parts in seen.items()}
