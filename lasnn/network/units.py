"""The units that make a network an ANN or an SNN: normalise, add a residual, activate."""

from collections.abc import Callable

from einops import rearrange
from torch import Tensor, nn

from lasnn.activation import QCFS
from lasnn.kernels import BatchNorm2d
from lasnn.kernels.functional import normalised
from lasnn.kernels.layout import state_dtype
from lasnn.network.time import TimeContext
from lasnn.network.time_chunks import recompute
from lasnn.neuron import Neuron
from lasnn.registry import neurons


class NormActivate(nn.Module):
    """Batch normalisation, an optional residual, an activation (ReLU unless given): the unit of an ANN.

    `channels=None` leaves the normalisation out. Input and output are [N, C, H, W] (or [N, F] without it).
    """

    def __init__(self, channels: int | None, activation: nn.Module | None = None):
        super().__init__()
        self.norm = nn.Identity() if channels is None else BatchNorm2d(channels)
        self.activation = activation or nn.ReLU()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        return self.activation(x if residual is None else x + residual)


class NormSpike(nn.Module):
    """Batch normalisation, an optional residual, a spiking neuron: the unit of an SNN, in one kernel.

    `channels=None` leaves the normalisation out. Input [T*B, C, H, W], or [B, C, H, W] where it is constant in time
    (it is then normalised once, with the statistics of the unrepeated tensor); output: spikes [T*B, C, H, W].

    A registered neuron with a `forward` of its own runs behind `lasnn.kernels.BatchNorm2d`, not in the kernel.
    """

    def __init__(self, channels: int | None, neuron: nn.Module, clock: TimeContext):
        super().__init__()
        self.norm = nn.Identity() if channels is None else BatchNorm2d(channels)
        self.neuron = neuron
        self.clock = clock
        self.fused = channels is not None and getattr(type(neuron), "forward", None) is Neuron.forward
        # In its network; the network sets it.
        self.name = ""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        voltages = self.clock.voltages
        if self.fused and voltages is None:
            steps = self.clock.steps
            constant = steps > 1 and x.shape[0] == self.clock.batch
            spikes, running = self.neuron.after_norm(x, self.norm, residual, timesteps=steps, constant=constant)
            if running is not None:
                self.norm.running_mean.copy_(running.mean)
                self.norm.running_var.copy_(running.var)
                self.norm.num_batches_tracked.add_(1)
            return spikes
        if voltages is None:
            return self._in_turn(x, residual)[0]
        before = voltages.get(self.name)
        if self.training:
            # Only x, the residual and the voltage are kept for the backward pass, as by the kernel.
            spikes, after = recompute(self, self._in_turn, x, residual, v0=before)
        else:
            spikes, after = self._in_turn(x, residual, v0=before)
        voltages[self.name] = after
        return spikes

    def _in_turn(self, x: Tensor, residual: Tensor | None, **before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalisation and neuron one after the other, with the voltage before and after if it is carried."""
        if not self.fused:
            current = self.norm(x)
        elif self.training:
            # In the kernel's precision, whatever the type of x.
            current = self.norm(x.to(state_dtype(x.dtype)))
        else:
            current = normalised(x, self.norm)
        current = self.clock.unfold(current)
        if residual is not None:
            current = current + self.clock.unfold(residual)
        spikes, after = self.neuron(current, timesteps=self.clock.steps, **before)
        return rearrange(spikes.to(x.dtype), "t b ... -> (t b) ..."), after


# Makes the units of one network; an architecture calls it as `act(channels)`, or `act()` for no normalisation.
Act = Callable[..., nn.Module]


def ann_units(activation: str = "relu", **options) -> Act:
    """The factory that makes a network an ANN on "relu", or on "qcfs" with its `options` (see `QCFS`)."""
    make = {"relu": nn.ReLU, "qcfs": QCFS}[activation]
    return lambda channels=None: NormActivate(channels, make(**options))


def snn_units(neuron: str = "lif", **options) -> Act:
    """The factory that makes a network an SNN of the registered `neuron` with its `options`."""
    clock = TimeContext()
    return lambda channels=None: NormSpike(channels, neurons.build(neuron, **options), clock)
