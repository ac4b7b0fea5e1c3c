"""Conversion of a trained ANN into a spiking network, without training: the baseline that distillation must beat.

Each *normalise, (+ residual), activate* unit of the teacher becomes an integrate-and-fire neuron with soft reset behind
the same batch norm (running statistics) and residual. Its threshold lambda is the layer's own, and its spikes carry the
value lambda, so no weight is rescaled: the rescaling of the usual formulation, w·lambda_before/lambda, is the same
network for a chain of layers and has no unique form where a shortcut joins.

    h[t] = v[t-1] + x[t]     s[t] = 1 where h[t] >= lambda     v[t] = h[t] - lambda·s[t]     output lambda·s[t]

The input is the teacher's normalised image at every step; the logits are the mean over the steps. For a constant x the
mean output is lambda·clip(floor((T·x + v[0])/lambda)/T, 0, 1): the clipped ReLU in steps of lambda/T.

Shapes: T time steps, B batch, C channels, H x W pixels, K classes.
"""

import copy
import math
from collections import Counter
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lasnn.activation import QCFS
from lasnn.data import Batches, Images
from lasnn.encoder import Direct
from lasnn.errors import MachineError, UserError, not_finite, unknown
from lasnn.evaluation.balance import calibration_batches
from lasnn.evaluation.few_steps import (
    balanced_thresholds,
    correct_biases,
    iterated_thresholds,
    nearest_thresholds,
)
from lasnn.kernels.layout import state_dtype
from lasnn.network.staged import Staged
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import NormActivate, NormSpike
from lasnn.neuron import IF

Method = Literal["maxnorm", "percentile", "qcfs", "threshold-iteration", "local-balancing", "light-calibration"]
# Where the voltage starts, as a share of the threshold: rest in Diehl et al. (IJCNN 2015, maxnorm), Rueckauer et al.
# (Frontiers in Neuroscience 2017, percentile) and Li et al. (ICML 2021, light-calibration), one half in Bu et al. (ICLR
# 2022, qcfs, and CVPR 2025, local-balancing); the threshold iteration assumes one half.
MEMBRANE_START = {
    "maxnorm": 0.0,
    "percentile": 0.0,
    "qcfs": 0.5,
    "threshold-iteration": 0.5,
    "local-balancing": 0.5,
    "light-calibration": 0.0,
}
# Those whose thresholds are chosen for one T: another T is another conversion.
OF_ONE_T = ("threshold-iteration", "light-calibration")
CONVERTIBLE = (nn.ReLU, QCFS)
ONE_PLACE = "a spiking neuron has one voltage and one threshold: call act() once for each place"

# What may stand between the units: for a spike train it commutes with the mean over time.
LINEAR = (
    "convolution addmm mm linear native_batch_norm _native_batch_norm_legit_no_training _batch_norm_no_update "
    "cudnn_batch_norm avg_pool2 avg_pool2d _adaptive_avg_pool2d mean sum add sub neg mul div cat stack view "
    "_unsafe_view _reshape_alias clone alias detach t transpose permute expand squeeze unsqueeze slice select split "
    "split_with_sizes unbind flip roll constant_pad_nd reflection_pad2d replication_pad2d upsample_nearest2d "
    "upsample_bilinear2d pixel_shuffle pixel_unshuffle _to_copy empty zeros ones new_zeros new_ones"
)


class BalancedIF(IF):
    """Integrate-and-fire with soft reset whose spikes carry the value of its threshold.

    Without a voltage to go on from it starts at `start` times the threshold. With a threshold for each channel, [C],
    the voltage counts in thresholds.
    """

    def __init__(self, threshold: float | Tensor, start: float):
        by_channel = isinstance(threshold, Tensor)
        super().__init__(threshold=1.0 if by_channel else threshold, reset="soft")
        self.register_buffer("by_channel", threshold if by_channel else None, persistent=False)
        self.start = start

    @property
    def amplitude(self) -> float | Tensor:
        """The value of a spike, [C] where each channel has its own."""
        return self.options["threshold"] if self.by_channel is None else self.by_channel

    def _as(self, x: Tensor, channel: int) -> float | Tensor:
        """The amplitudes beside a tensor whose dimension number `channel` is C."""
        if self.by_channel is None:
            return self.amplitude
        return self.by_channel.to(x.dtype).view(-1, *(1 for _ in x.shape[channel + 1 :]))

    def forward(self, current: Tensor, v0: Tensor | None = None, timesteps: int | None = None) -> tuple[Tensor, Tensor]:
        if self.by_channel is not None:
            current = current / self._as(current, 2)
        v0 = self._start(current[0]) if v0 is None else v0
        spikes, voltage = super().forward(current, v0, timesteps)
        return spikes * self._as(spikes, 2), voltage

    def after_norm(
        self,
        y: Tensor,
        norm: nn.BatchNorm2d,
        residual: Tensor | None = None,
        *,
        timesteps: int,
        constant: bool = False,
        v0: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple:
        if v0 is None:
            v0 = self._start(y[: len(y) if constant else len(y) // timesteps])
        if self.by_channel is not None:
            norm = self._in_thresholds(norm)
            residual = None if residual is None else residual / self._as(residual, 1)
        run = {"timesteps": timesteps, "constant": constant, "v0": v0, "return_state": return_state}
        spikes, *rest = super().after_norm(y, norm, residual, **run)
        return spikes * self._as(spikes, 1), *rest

    def _in_thresholds(self, norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
        """The batch norm whose outputs count in thresholds."""
        scaled = copy.copy(norm)
        scaled._parameters = {
            name: nn.Parameter(value / self.by_channel, requires_grad=False) for name, value in norm._parameters.items()
        }
        return scaled

    def _start(self, step: Tensor) -> Tensor:
        """The voltage before the first step."""
        return torch.full_like(step, self.start * self.options["threshold"], dtype=state_dtype(step.dtype))

    def extra_repr(self) -> str:
        said = f"{self.amplitude:.4g}" if self.by_channel is None else f"[{len(self.by_channel)}]"
        return f"threshold={said}, start={self.start}"


class Converted(Student):
    """A converted teacher: images in, logits out, like a distilled student.

    Args:
        network: whose units hold a `BalancedIF`.
        encoder: direct, with the teacher's mean and deviation.
        timesteps: T; set the attribute to run with another.
        description: method, `membrane_start` (in thresholds), `percentile` (None for other methods),
            `calibration_images` and the `thresholds` by layer (the mean where each channel has its own).
    """

    def __init__(self, network: Staged, encoder: nn.Module, timesteps: int, description: dict[str, Any]):
        super().__init__(network, encoder, timesteps)
        self.description = description


def convert(
    teacher: Teacher,
    method: Method,
    images: Images,
    *,
    percentile: float = 99.9,
    membrane_start: float | None = None,
    timesteps: int = 128,
    batch_size: int = 128,
) -> Converted:
    """Convert a trained teacher.

    Args:
        teacher: in eval mode.
        method: where the thresholds come from. "maxnorm": the layer's largest activation (Diehl et al., IJCNN 2015).
            "percentile": of its activations above 0 (Rueckauer et al., Frontiers in Neuroscience 2017; above 0 as in
            code that follows theirs). "qcfs": what a teacher on the QCFS activation has learnt (Bu et al., ICLR 2022).
            A layer that is silent on all images gets 1. "local-balancing": of each channel, raised batch by batch (Bu
            et al., CVPR 2025). For the T given here: "threshold-iteration", of each channel, the best for the currents
            that batch norm announces; "light-calibration", the best for measured activations, with batch norm's shifts
            corrected layer by layer (Li et al., ICML 2021). See `lasnn.evaluation.few_steps`.
        images: training images, on the teacher's device; "maxnorm", "percentile" and "local-balancing" measure on all
            of them, without augmentation, "light-calibration" on 512, "qcfs" and "threshold-iteration" on none.
        percentile: in (0, 100].
        membrane_start: voltage before the first step, as a share of the threshold, in [0, 1); None is 1/2 for "qcfs",
            "threshold-iteration" and "local-balancing", 0 for the others.
        timesteps: T of the result; it runs at any other, and at another than it was made for (`OF_ONE_T`) it is worse.
        batch_size: images measured at once.

    Returns:
        The spiking network, in eval mode, its weights frozen copies of the teacher's.

    Raises:
        UserError: the teacher cannot be converted, or an option does not fit; nothing has been run then.
        MachineError: the teacher's activations or learnt thresholds are not finite, positive numbers.
    """
    check(teacher, method, images.shape[1:], percentile=percentile, membrane_start=membrane_start)
    start = MEMBRANE_START[method] if membrane_start is None else membrane_start
    thresholds: dict[str, float] | dict[str, Tensor]
    measured_on = len(images)
    if method == "qcfs":
        thresholds, measured_on = learnt_thresholds(teacher), 0
    elif method == "threshold-iteration":
        thresholds, measured_on = iterated_thresholds(teacher, images.shape[1:], timesteps), 0
    elif method == "local-balancing":
        thresholds = balanced_thresholds(teacher, images, batch_size)
    elif method == "light-calibration":
        thresholds = nearest_thresholds(teacher, images, timesteps, start)
        measured_on = sum(map(len, calibration_batches(images, seed=0)))
    else:
        share = percentile if method == "percentile" else 100.0
        thresholds = measured_thresholds(teacher, images, share, batch_size=batch_size)
    network = copy.deepcopy(teacher.network).requires_grad_(False).eval()
    for name, threshold in thresholds.items():
        unit = network.get_submodule(name)
        spiking = NormSpike(None, BalancedIF(threshold, start), network.time)
        spiking.norm, spiking.name = unit.norm, name
        network.set_submodule(name, spiking)
    encoder = Direct(teacher.mean.flatten().tolist(), teacher.std.flatten().tolist()).to(teacher.mean.device)
    description = {
        "method": method,
        "membrane_start": start,
        "percentile": percentile if method == "percentile" else None,
        "calibration_images": measured_on,
        "thresholds": {name: float(torch.as_tensor(value).mean()) for name, value in thresholds.items()},
    }
    converted = Converted(network, encoder, timesteps, description).eval()
    if method == "light-calibration":
        correct_biases(converted, teacher, images)
    return converted


def check(
    teacher: Teacher,
    method: str,
    image: tuple[int, int, int],
    *,
    percentile: float = 99.9,
    membrane_start: float | None = None,
) -> None:
    """Check that a teacher can be converted; a forward pass on the meta device shows what stands between its units.

    Args:
        teacher, method, percentile, membrane_start: as for `convert`.
        image: C, H, W.

    Raises:
        UserError: what cannot be converted, a line each.
    """
    check_options(method, percentile, membrane_start)
    network = teacher.network
    named = units(network) if isinstance(network, Staged) else {}
    if not named:
        found = outside_units(network, image).not_linear if isinstance(network, Staged) else {}
        names = ", ".join(dict.fromkeys(place for place, _ in list(found)[:3])) or type(network).__name__
        raise UserError(
            "the teacher cannot be converted: it is not made of the units that an architecture gets as `act` "
            f"({names}); choose one of `lasnn list architectures`"
        )
    problems = [
        f"{name} cannot be converted: it ends in {type(unit.activation).__name__}, not in ReLU or QCFS"
        for name, unit in named.items()
        if not isinstance(unit.activation, CONVERTIBLE)
    ]
    places: dict[nn.Module, str] = {}
    for name, unit in network.named_modules(remove_duplicate=False):
        if isinstance(unit, NormActivate) and places.setdefault(unit, name) != name:
            problems.append(f"{name} cannot be converted: it is the same unit as {places[unit]}; {ONE_PLACE}")
    outside = outside_units(network, image)
    problems += [
        f"{name} cannot be converted: it runs {count} times in a pass; {ONE_PLACE}"
        for name, count in outside.runs.items()
        if count > 1
    ]
    problems += [
        f"{place} cannot be converted: {op} is not linear; between the units only convolutions, linear layers, batch "
        "norm, average pools and sums commute with the mean over time"
        + ('; train a teacher with average pools (teacher.pool = "avg" where the option is there)' * ("pool" in op))
        for place, op in outside.not_linear
    ]
    if not problems and method == "qcfs" and not all(isinstance(unit.activation, QCFS) for unit in named.values()):
        others = ", ".join(method for method in get_args(Method) if method != "qcfs")
        problems = [
            '"qcfs" needs a teacher trained on the QCFS activation, this one has ReLU; make a run with one '
            f"(lasnn distill RECIPE --set teacher.activation=qcfs), or choose one of {others}"
        ]
    if problems:
        raise UserError(*problems)


def check_options(method: str, percentile: float = 99.9, membrane_start: float | None = None) -> None:
    """Check the options alone.

    Raises:
        UserError: the first that does not fit.
    """
    if method not in get_args(Method):
        raise UserError(unknown("conversion", method, get_args(Method)))
    if not 0 < percentile <= 100:
        raise UserError(f"percentile must be above 0 and at most 100, got {percentile}")
    if membrane_start is not None and not 0 <= membrane_start < 1:
        raise UserError(f"membrane_start is a share of the threshold, at least 0 and below 1, got {membrane_start}")


def units(network: Staged) -> dict[str, NormActivate]:
    """The activation units of an ANN, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, NormActivate)}


class OutsideUnits(TorchDispatchMode):
    """Collects what a network does outside its units that is not linear, and how often each unit runs.

    Attributes:
        not_linear: (module, operation), in order.
        runs: calls of each unit, by name.
    """

    def __init__(self, network: Staged):
        super().__init__()
        self.not_linear: dict[tuple[str, str], None] = {}
        self.runs: Counter[str] = Counter()
        self._running: list[tuple[str, nn.Module]] = []
        # What depends on the images; tensors are kept, so that no two have one id.
        self._signals: dict[int, Tensor] = {}
        for name, module in network.named_modules():
            module.register_forward_pre_hook(lambda module, _, name=name: self._enter(name, module))
            module.register_forward_hook(self._leave)

    def follow(self, given: Any) -> None:
        """Take the tensors of anything for some that depend on the images."""
        self._signals |= {id(leaf): leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}

    def _enter(self, name: str, module: nn.Module) -> None:
        self._running.append((name, module))
        if isinstance(module, NormActivate):
            self.runs[name] += 1

    def _leave(self, *_: object) -> None:
        self._running.pop()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        depends = any(id(arg) in self._signals for arg in tree_leaves((args, kwargs)))
        if depends and not any(isinstance(module, NormActivate) for _, module in self._running):
            name = op.overloadpacket.__name__.removesuffix("_")
            # A product is linear where one side does not depend on the images.
            signals = sum(id(arg) in self._signals for arg in args)
            if name not in LINEAR.split() or (name in ("mul", "div") and signals > 1):
                place, module = self._running[-1] if self._running else ("", None)
                self.not_linear[f"{place or 'the network'} ({type(module).__name__})", name] = None
        output = op(*args, **(kwargs or {}))
        if depends:
            self.follow(output)
        return output


@torch.no_grad()
def outside_units(network: Staged, image: tuple[int, int, int]) -> OutsideUnits:
    """What one pass of a network does in eval mode, of images [C, H, W]."""
    network = copy.deepcopy(network).to("meta").eval()
    # Hooks stay on the copy.
    outside = OutsideUnits(network)
    x = torch.empty(1, 1, *image, device="meta")
    outside.follow(x)
    with outside:
        network(x)
    return outside


def learnt_thresholds(teacher: Teacher) -> dict[str, float]:
    """The thresholds that a QCFS teacher has learnt, by layer.

    Raises:
        MachineError: one is not a finite, positive number.
    """
    thresholds = {name: float(unit.activation.threshold.detach()) for name, unit in units(teacher.network).items()}
    for name, threshold in thresholds.items():
        if not (threshold > 0 and math.isfinite(threshold)):
            raise MachineError(f"{name} has learnt the threshold {threshold:.4g}: train again, at a lower rate")
    return thresholds


@torch.no_grad()
def measured_thresholds(teacher: Teacher, images: Images, percentile: float, *, batch_size: int) -> dict[str, float]:
    """Percentile of each layer's activations above 0 over all images; 100 is the largest, and exact.

    Raises:
        MachineError: an activation is not a finite number.
    """
    seen = {name: Distribution(bins=1 if percentile == 100 else 2**14) for name in units(teacher.network)}
    hooks = [
        unit.register_forward_hook(lambda _, __, output, name=name: seen[name].add(output))
        for name, unit in units(teacher.network).items()
    ]
    try:
        for batch, _ in Batches(images, batch_size, seed=0, epoch=0, shuffle=False):
            teacher(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name, distribution in seen.items():
        if not math.isfinite(distribution.largest):
            raise not_finite(f"the teacher's activations in {name}")
    return {name: distribution.percentile(percentile) or 1.0 for name, distribution in seen.items()}


class Distribution:
    """The positive values of tensors that come one after another, as a histogram.

    The bins' width is a power of two that doubles whenever a larger value comes, two bins becoming one: counts are
    exact and do not depend on the order, and no value is kept. `largest` is exact.
    """

    def __init__(self, bins: int):
        self.largest = 0.0
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.width = 0.0

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor."""
        top, bins = float(x.max()), len(self.counts)
        # NaN compares with nothing, and stays.
        self.largest = self.largest if top <= self.largest or math.isnan(self.largest) else top
        if bins == 1 or not 0 < top < math.inf:
            return
        self.width = self.width or 2.0 ** math.ceil(math.log2(top)) / bins
        while top > self.width * bins:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.width *= 2
        index = (x[x > 0].float() / self.width).long().clamp_(max=bins - 1)
        self.counts += torch.bincount(index, minlength=bins).cpu()

    def percentile(self, percent: float) -> float:
        """The value below which `percent` % of the positive values lie: a bin's upper edge, at most 2/bins of the
        largest too high; 0 where there are none.
        """
        if percent == 100 or not self.counts.any():
            return self.largest
        wanted = percent / 100 * int(self.counts.sum())
        number = int(torch.searchsorted(self.counts.cumsum(0).double(), wanted))
        return min(self.largest, (number + 1) * self.width)
