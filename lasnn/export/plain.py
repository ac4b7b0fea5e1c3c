"""A student in plain PyTorch operators, unrolled over T: what ONNX and pt2 files hold.

The arithmetic is that of the CPU kernels, operation by operation (kernels/cpu/), so that its logits and spikes are the
student's bit for bit at the same batch size and number of threads.

Shapes: T time steps, B batch, C channels, H x W pixels, K classes.
"""

import copy
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from lasnn.kernels.functional import folded
from lasnn.network.pooling import AvgPool2d
from lasnn.network.student import Student
from lasnn.network.time import TimeContext
from lasnn.network.units import NormSpike
from lasnn.neuron import Neuron


@dataclass
class Trace:
    """What the units of one forward pass did, by name in the order in which they ran."""

    spikes: dict[str, Tensor] = field(default_factory=dict)
    """Folded, [T*B, ...]."""
    potentials: dict[str, list[Tensor]] = field(default_factory=dict)
    """h at each step, [B, ...]."""


class PlainUnit(nn.Module):
    """What a `NormSpike` does in evaluation, from rest, in plain operators.

    A neuron with a `forward` of its own is called as it is.
    """

    def __init__(self, unit: NormSpike, time: TimeContext, trace: Trace):
        super().__init__()
        self.name, self.time, self.trace = unit.name, time, trace
        self.own = getattr(type(unit.neuron), "forward", None) is not Neuron.forward
        if unit.fused:
            for name, value in zip(("mean", "scale", "bias"), folded(unit.norm), strict=True):
                self.register_buffer(name, value.detach())
        else:
            self.norm = unit.norm
        self.fused = unit.fused
        if self.own:
            self.neuron = unit.neuron
            return
        tau = unit.neuron.time_constant
        self.decay = tau.reciprocal().item() if isinstance(tau, Tensor) else 1 / tau
        self.decay_input = unit.neuron.options.get("decay_input", False)
        self.threshold, self.v_reset = unit.neuron.options["threshold"], unit.neuron.options["v_reset"]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        current = self.time.unfold((x - self.mean) * self.scale + self.bias if self.fused else self.norm(x))
        if residual is not None:
            current = current + self.time.unfold(residual)
        if self.own:
            spikes = self.neuron(current, timesteps=self.time.steps)[0].to(x.dtype).flatten(0, 1)
        else:
            spikes = self.fire(current)
        self.trace.spikes[self.name] = spikes
        return spikes

    def fire(self, current: Tensor) -> Tensor:
        """[T, B, ...], or [1, B, ...] where constant in time -> spikes [T*B, ...]."""
        v_rest = self.v_reset or 0.0
        v, spikes, potentials = None, [], []
        for t in range(self.time.steps):
            x = current[t if len(current) > 1 else 0]
            if self.decay_input:
                x = x * self.decay
            if v is None:
                # From rest nothing leaks.
                h = x + v_rest if v_rest else x
            elif self.decay:
                h = v - (v - v_rest if v_rest else v) * self.decay + x
            else:
                h = v + x
            fired = h >= self.threshold
            s = fired.to(h.dtype)
            v = h - s * self.threshold if self.v_reset is None else torch.where(fired, self.v_reset, h)
            spikes.append(s)
            potentials.append(h)
        self.trace.potentials[self.name] = potentials
        return torch.cat(spikes)


class Plain(nn.Module):
    """A student in plain operators: images [B, C, H, W] in [0, 1] -> logits [B, K], the mean over its T steps.

    An encoder that draws is left out: the input is then what it returns, [T, B, C, H, W].

    Args:
        student: in evaluation mode; weights are shared, not copied.
        show_spikes: return the spikes of each unit, [T*B, ...], after the logits.
    """

    def __init__(self, student: Student, show_spikes: bool = False):
        super().__init__()
        self.timesteps, self.show_spikes, self.trace = student.timesteps, show_spikes, Trace()
        self.encoder = None if student.encoder.random else student.encoder
        network = student.network
        shared = {id(value): value for value in chain(network.parameters(), network.buffers())}
        self.network = copy.deepcopy(network, shared)
        self.units: dict[str, PlainUnit] = {}
        for name, unit in list(self.network.named_modules(remove_duplicate=False)):
            if isinstance(unit, NormSpike):
                plain = self.units.setdefault(unit.name, PlainUnit(unit, self.network.time, self.trace))
            elif isinstance(unit, AvgPool2d):
                plain = nn.AvgPool2d(2)
            else:
                continue
            parent, _, attribute = name.rpartition(".")
            setattr(self.network.get_submodule(parent), attribute, plain)
        self.eval()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        logits = self.run(x if self.encoder is None else self.encoder(x, self.timesteps))
        return (logits, *self.trace.spikes.values()) if self.show_spikes else logits

    def run(self, encoded: Tensor) -> Tensor:
        """What the encoder returns, [T, B, C, H, W] or [1, B, C, H, W] -> logits [B, K]."""
        self.trace.spikes.clear()
        self.trace.potentials.clear()
        return self.network(encoded, self.timesteps)[0].mean(0)

    @torch.no_grad()
    def potentials(self, encoded: Tensor) -> dict[str, Tensor]:
        """The potential h of each layer just before it is compared with the threshold, [T, B, ...]."""
        self.run(encoded)
        return {name: torch.stack(h) for name, h in self.trace.potentials.items()}
