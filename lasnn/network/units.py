"""The units that make a network an ANN or an SNN: normalise, add a residual, activate."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from lasnn.activation import QCFS
from lasnn.kernels import BatchNorm2d, BatchStatistics, normalised_mean
from lasnn.kernels.layout import state_dtype
from lasnn.network.time import TimeContext
from lasnn.neuron import Neuron
from lasnn.registry import neurons


class Unit(nn.Module):
    """What the units of ANNs and SNNs share."""

    # Where it is set, it is told of each call: the output, and a function that computes the unit's current, the mean
    # over time of what entered its activation, [B, C, H, W].
    on_call: Callable[[Tensor, Callable[[], Tensor]], None] | None = None


class NormActivate(Unit):
    """Batch normalisation, an optional residual, an activation (ReLU unless given): the unit of an ANN.

    `channels=None` leaves the normalisation out. Input and output are [N, C, H, W] (or [N, F] without it).
    """

    def __init__(self, channels: int | None, activation: nn.Module | None = None):
        super().__init__()
        self.norm = nn.Identity() if channels is None else BatchNorm2d(channels)
        self.activation = activation or nn.ReLU()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        x = x if residual is None else x + residual
        output = self.activation(x)
        if self.on_call is not None:
            self.on_call(output, lambda: x)
        return output


def residual_of(inputs: tuple, named: Mapping[str, Any]) -> Tensor | None:
    """What a unit is called with beside its input, by position or by name; for forward hooks."""
    return inputs[1] if len(inputs) > 1 else named.get("residual")


class NormSpike(Unit):
    """Batch normalisation, an optional residual, a spiking neuron: the unit of an SNN, in one kernel.

    `channels=None` leaves the normalisation out. Input [T*B, C, H, W], or [B, C, H, W] where it is constant in time
    (it is then normalised once, with the statistics of the unrepeated tensor); output: spikes [T*B, C, H, W].

    A neuron with a `forward` of its own, and one without normalisation, runs behind it, not in the kernel.
    """

    def __init__(self, channels: int | None, neuron: nn.Module, time: TimeContext):
        super().__init__()
        self.norm = nn.Identity() if channels is None else BatchNorm2d(channels)
        self.neuron = neuron
        self.time = time
        # In its network; the network sets it.
        self.name = ""

    @property
    def fused(self) -> bool:
        """Whether normalisation and neuron are one kernel."""
        return type(self.norm) in (nn.BatchNorm2d, BatchNorm2d) and fuses(type(self.neuron))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        run = self._fused if self.fused else self._in_turn
        if self.time.voltages is None:
            return run(x, residual)[0]
        spikes, v_last = run(x, residual, v0=self.time.voltages.get(self.name))
        self.time.voltages[self.name] = v_last
        return spikes

    def _fused(self, x: Tensor, residual: Tensor | None, **state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Spikes and, where a state is given (None: rest), the voltage after the last step."""
        if residual is not None and residual.dtype != x.dtype:
            # As in a sum: autocast leaves some operations in single precision.
            wider = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(wider), residual.to(wider)
        steps = self.time.steps
        constant = steps > 1 and x.shape[0] == self.time.batch
        options = {"timesteps": steps, "constant": constant, "return_state": bool(state), **state}
        spikes, *v_last, batch = self.neuron.after_norm(x, self.norm, residual, **options)
        self.time.update_statistics(self.norm, batch)
        if self.on_call is not None:
            self.on_call(spikes, partial(self._mean_current, x, residual, batch, 1 if constant else steps))
        return spikes, v_last[0] if v_last else None

    def _mean_current(self, x: Tensor, residual: Tensor | None, batch: BatchStatistics | None, steps: int) -> Tensor:
        """The mean over time of the normalised x, which has so many steps, plus the residual: [B, C, H, W]."""
        current = normalised_mean(x, self.norm, batch, steps)
        if residual is not None:
            current = current + self.time.unfold(residual).mean(0, dtype=current.dtype)
        return current

    def _in_turn(self, x: Tensor, residual: Tensor | None, **state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same for what is not one kernel."""
        current = self.time.unfold(self.norm(x))
        if residual is not None:
            current = current + self.time.unfold(residual)
        spikes, v_last = self.neuron(current, timesteps=self.time.steps, **state)
        spikes = rearrange(spikes.to(x.dtype), "t b ... -> (t b) ...")
        if self.on_call is not None:
            self.on_call(spikes, lambda: current.mean(0, dtype=state_dtype(current.dtype)))
        return spikes, v_last


class Add(nn.Module):
    """The sum of two tensors of a network [T*B, ...]; one that is constant in time, [B, ...], is added at each step."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[0] == y.shape[0]:
            return x + y
        longer, constant = (x, y) if x.shape[0] > y.shape[0] else (y, x)
        return (rearrange(longer, "(t b) ... -> t b ...", b=constant.shape[0]) + constant).flatten(0, 1)


class Product(nn.Module):
    """Attention without softmax, Q (K^T V) of each head, over the pixels of maps [N, C, H, W].

    The brackets are free where there is no softmax: so set, the cost grows with the pixels, not with their square. As a
    module it is seen by the counter of operations.
    """

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        height = queries.shape[2]
        q, k, v = (rearrange(x, "n (h c) y x -> n h c (y x)", h=self.heads) for x in (queries, keys, values))
        # [N, heads, C of the values, C of the keys]
        attended = v @ k.transpose(-2, -1)
        return rearrange(attended @ q, "n h c (y x) -> n (h c) y x", y=height)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


def fuses(neuron: type[nn.Module]) -> bool:
    """Whether a neuron's `after_norm` is what its `forward` does: one that overrides the second only is not fused."""
    ancestry = neuron.__mro__
    forward, after_norm = (
        next((number for number, kind in enumerate(ancestry) if name in vars(kind)), len(ancestry))
        for name in ("forward", "after_norm")
    )
    return after_norm <= forward and issubclass(neuron, Neuron)


def run_with_current(stage: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A stage's output, and the current of the unit that ends it (see `Unit.on_call`); None where none does."""
    units = [unit for unit in stage.modules() if isinstance(unit, Unit)]
    last: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def remember(output: Tensor, current: Callable[[], Tensor]) -> None:
        last[:] = [(output, current)]

    for unit in units:
        unit.on_call = remember
    try:
        output = stage(x)
    finally:
        for unit in units:
            # Not deleted: the compiler does not follow that.
            unit.on_call = None
    return output, last[0][1]() if last and last[0][0] is output else None


# Makes the units of one network; an architecture calls it as `act(channels)`, or `act()` for no normalisation.
Act = Callable[..., nn.Module]


def ann_units(activation: str = "relu", **options) -> Act:
    """The factory that makes a network an ANN on "relu", or on "qcfs" with its `options` (see `QCFS`)."""
    make = {"relu": nn.ReLU, "qcfs": QCFS}[activation]
    return lambda channels=None: NormActivate(channels, make(**options))


def snn_units(neuron: str = "lif", **options) -> Act:
    """The factory that makes a network an SNN of the registered `neuron` with its `options`."""
    time = TimeContext()
    return lambda channels=None: NormSpike(channels, neurons.build(neuron, **options), time)
