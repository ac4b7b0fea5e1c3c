"""The energy of a network with its memory accesses: an analytical model of 45 nm hardware, layer by layer.

The model is that of Lemaire et al., "An Analytical Estimation of Spiking Neural Networks Energy Efficiency" (ICONIP
2022, arXiv 2210.13107), with the energies of Horowitz (ISSCC 2014). Every layer has memories of its own, and no value
that was read is kept for a second use, in a network of spikes and in one of real values alike. docs/energy.md has the
formulas, what lasnn adds to the paper, and what is not counted.

T is the number of time steps; a count is per image and of all T steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lasnn.network.teacher import Teacher
from lasnn.network.units import Add, NormActivate, Product, residual_of

# What one access of 32 bits takes in a memory of so many bytes, in pJ; linear between them, and from 0 at 0 bytes. A
# larger memory is made of several of the last size.
ACCESS_PJ = ((0, 0.0), (8 * 1024, 10.0), (32 * 1024, 20.0), (1024 * 1024, 100.0))
# A spike is sent as a message, the address of its neuron, through a queue of so many messages.
MESSAGE_BYTES, QUEUE_MESSAGES = 4, 1000
# Addresses are integers of 32 bits in every precision, in pJ.
ADDRESS_ADD, ADDRESS_MULTIPLY = 0.1, 3.1


@dataclass(frozen=True)
class NumberFormat:
    """Widths in bytes, and the energies of operations in pJ (45 nm; Horowitz, ISSCC 2014)."""

    add: float
    """Of a weight, or its product with a value, to a sum."""
    multiply: float
    """Of a weight and a value."""
    state_add: float
    state_multiply: float
    weight_bytes: int
    value_bytes: int
    """Of an activation of an ANN, or a pixel."""
    state_bytes: int
    """Of a voltage, of a current that is kept over the steps, and of a bias."""


PRECISIONS = {
    "fp32": NumberFormat(0.9, 3.7, 0.9, 3.7, 4, 4, 4),
    # Products of 8 bits are added up in 32 (Jacob et al., CVPR 2018), and a voltage is such a sum.
    "int8": NumberFormat(0.1, 0.2, 0.1, 3.1, 1, 1, 4),
}


@dataclass(frozen=True)
class Traffic:
    """What a layer does for an image: operations, and reads and writes of single values."""

    additions: float = 0.0
    multiply_additions: float = 0.0
    state_additions: float = 0.0
    state_multiply_additions: float = 0.0
    address_additions: float = 0.0
    address_multiply_additions: float = 0.0
    weight_reads: float = 0.0
    bias_reads: float = 0.0
    potential_reads: float = 0.0
    potential_writes: float = 0.0
    spike_reads: float = 0.0
    spike_writes: float = 0.0
    value_reads: float = 0.0
    value_writes: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


# Those of `Traffic` that are shown as accesses.
ACCESSES = tuple(one.name for one in fields(Traffic) if one.name.endswith(("_reads", "_writes")))
Source = Literal["spikes", "constant", "values"]


@dataclass(frozen=True)
class LayerSize:
    """What is known of a layer, whatever the images are.

    Args:
        kind: what the layer is; a sum is a shortcut's.
        weights, biases: how many it has.
        filters: of a convolution, its output channels times the area of its kernel.
        inputs, outputs: values of an image, at one step.
        source: what it reads: spikes, real values that are the same at every step, or others.
        leak: of a neuron, whether its voltage decays.
        shortcut: of a neuron or an ANN's activation, whether real values are added to what it gets.
    """

    kind: Literal["convolution", "linear", "product", "sum", "neuron"]
    weights: int = 0
    biases: int = 0
    filters: int = 0
    inputs: int = 0
    outputs: int = 0
    source: Source = "spikes"
    leak: bool = False
    shortcut: bool = False

    @classmethod
    def of(cls, layer: nn.Module, inputs: int, outputs: int, source: Source) -> "LayerSize":
        """The size of a convolution, a linear layer, a sum or a product."""
        if not isinstance(layer, nn.Linear | _ConvNd):
            return cls("product" if isinstance(layer, Product) else "sum", 0, 0, 0, inputs, outputs, source)
        biases = 0 if layer.bias is None else len(layer.bias)
        if isinstance(layer, nn.Linear):
            return cls("linear", layer.weight.numel(), biases, 0, inputs, outputs, source)
        filters = layer.out_channels * layer.weight[0, 0].numel()
        return cls("convolution", layer.weight.numel(), biases, filters, inputs, outputs, source)


@dataclass(frozen=True)
class LayerTraffic:
    """A layer, what it does because neurons spike, and what it does where none does: of the encoder's spikes too."""

    size: LayerSize
    by_spikes: Traffic
    always: Traffic


def by_spikes(size: LayerSize, spikes_in: float, additions: float, spikes_out: float) -> Traffic:
    """What a layer does because of the spikes that it reads or, as a neuron, writes.

    Args:
        size: the layer's.
        spikes_in: spikes that the layer reads; of a neuron, those that a shortcut adds to its current.
        additions: the synaptic operations that they cause.
        spikes_out: of a neuron, its spikes.
    """
    if size.kind == "neuron":
        return Traffic(
            # The reset takes one for each spike.
            state_additions=spikes_in + spikes_out,
            potential_reads=spikes_in,
            potential_writes=spikes_in,
            spike_reads=spikes_in,
            spike_writes=spikes_out,
        )
    return Traffic(
        additions=additions,
        # Where among its outputs a spike of a convolution begins takes two; from there the addresses are counted on.
        address_multiply_additions=2 * spikes_in if size.kind == "convolution" else 0.0,
        address_additions=additions,
        weight_reads=additions if size.weights else 0.0,
        potential_reads=additions,
        potential_writes=additions,
        spike_reads=spikes_in,
    )


def always(size: LayerSize, multiply_additions: float, steps: int) -> Traffic:
    """What a layer of a spiking network does without any spike.

    Args:
        size: the layer's.
        multiply_additions: of real values, in all steps.
        steps: T.
    """
    outputs = size.outputs * steps
    if size.kind == "neuron":
        return Traffic(
            state_additions=outputs * (bool(size.biases) + size.shortcut),
            state_multiply_additions=outputs * size.leak,
            bias_reads=outputs * bool(size.biases),
            potential_reads=outputs * (1 + size.shortcut),
            potential_writes=outputs,
        )
    if size.kind == "sum":
        return Traffic(state_additions=outputs, potential_reads=2 * outputs, potential_writes=outputs)
    if size.source == "spikes":
        return biases_of(size, steps)
    if size.source == "values":
        return of_values(size, multiply_additions, steps)
    once = of_values(size, multiply_additions)
    # Computed once, the current is kept, and read again at each step.
    return once + Traffic(potential_writes=size.outputs, potential_reads=outputs) if steps > 1 else once


def of_values(size: LayerSize, multiply_additions: float, runs: int = 1) -> Traffic:
    """What a layer does in so many runs on real values; storing its outputs is not in it."""
    if size.kind == "product":
        return Traffic(multiply_additions=multiply_additions, value_reads=2 * multiply_additions)
    return biases_of(size, runs) + Traffic(
        multiply_additions=multiply_additions,
        address_additions=runs * (size.inputs + size.outputs + size.filters),
        weight_reads=multiply_additions,
        value_reads=runs * size.inputs if size.kind == "linear" else multiply_additions,
    )


def biases_of(size: LayerSize, runs: int) -> Traffic:
    """The biases of a layer in so many runs."""
    outputs = runs * size.outputs if size.biases else 0
    return Traffic(additions=outputs, bias_reads=outputs)


def access_pj(size: float, width: int) -> float:
    """Energy in pJ of one access, `width` bytes wide, to a memory of `size` bytes."""
    size = min(size, ACCESS_PJ[-1][0])
    (below, low), (above, high) = next(pair for pair in pairwise(ACCESS_PJ) if size <= pair[1][0])
    return (low + (high - low) * (size - below) / (above - below)) * width / 4


def energy_pj(size: LayerSize, traffic: Traffic, precision: NumberFormat) -> dict[str, float]:
    """Energy of a layer in pJ: `operations`, `addressing`, and the accesses to each memory of it."""
    weights = size.weights * precision.weight_bytes + size.biases * precision.state_bytes
    state = access_pj(size.outputs * precision.state_bytes, precision.state_bytes)
    values_in = access_pj(size.inputs * precision.value_bytes, precision.value_bytes)
    values_out = access_pj(size.outputs * precision.value_bytes, precision.value_bytes)
    message = access_pj(QUEUE_MESSAGES * MESSAGE_BYTES, MESSAGE_BYTES)
    return {
        "operations": traffic.additions * precision.add
        + traffic.multiply_additions * (precision.multiply + precision.add)
        + traffic.state_additions * precision.state_add
        + traffic.state_multiply_additions * (precision.state_multiply + precision.state_add),
        "addressing": traffic.address_additions * ADDRESS_ADD
        + traffic.address_multiply_additions * (ADDRESS_MULTIPLY + ADDRESS_ADD),
        "weights": traffic.weight_reads * access_pj(weights, precision.weight_bytes)
        + traffic.bias_reads * access_pj(weights, precision.state_bytes),
        "potentials": (traffic.potential_reads + traffic.potential_writes) * state,
        "spikes": (traffic.spike_reads + traffic.spike_writes) * message,
        "values": traffic.value_reads * values_in + traffic.value_writes * values_out,
    }


def energy_with_memory(layers: Mapping[str, LayerTraffic], precision: NumberFormat) -> dict[str, Any]:
    """Energy in µJ an image.

    Args:
        layers: of a network.
        precision: of its weights and sums.

    Returns:
        `energy_uj`; the same `by_kind` (`operations`, `addressing`, and accesses to `weights`, `potentials`, `spikes`
        and `values`) and `by_layer`; `without_spikes_uj`, what is left of it where no neuron spikes.
    """
    kinds: dict[str, float] = {}
    by_layer, silent = {}, 0.0
    for name, layer in layers.items():
        quiet, driven = (energy_pj(layer.size, part, precision) for part in (layer.always, layer.by_spikes))
        for kind in quiet:
            kinds[kind] = kinds.get(kind, 0.0) + 1e-6 * (quiet[kind] + driven[kind])
        by_layer[name] = 1e-6 * (sum(quiet.values()) + sum(driven.values()))
        silent += 1e-6 * sum(quiet.values())
    return {
        "energy_uj": sum(by_layer.values()),
        "by_kind": kinds,
        "by_layer": by_layer,
        "without_spikes_uj": silent,
    }


def in_each_precision(layers: Mapping[str, LayerTraffic]) -> dict[str, dict[str, Any]]:
    """`energy_with_memory` by the name of the precision."""
    return {name: energy_with_memory(layers, precision) for name, precision in PRECISIONS.items()}


def memory_accesses(layers: Mapping[str, LayerTraffic]) -> dict[str, dict[str, float]]:
    """Reads and writes an image by layer and by what is read or written; those that do not occur are left out."""
    both = {name: layer.always + layer.by_spikes for name, layer in layers.items()}
    counted = {name: {kind: getattr(traffic, kind) for kind in ACCESSES} for name, traffic in both.items()}
    return {name: {kind: count for kind, count in counts.items() if count} for name, counts in counted.items()}


def break_even_rate(firing_rate: float, student: Mapping[str, Any], teacher_uj: float) -> float | None:
    """The firing rate at which a student takes as much energy as its teacher, all its layers scaled alike.

    Args:
        firing_rate: spikes per neuron and step that the student's energy was counted at.
        student: of `energy_with_memory`.
        teacher_uj: the teacher's energy in the same precision.

    Returns:
        Spikes per neuron and step; 0 where the student takes more without a single spike, above 1 where it always takes
        less, None where it did not spike.
    """
    by_spikes = student["energy_uj"] - student["without_spikes_uj"]
    if by_spikes <= 0:
        return None
    return max(0.0, firing_rate * (teacher_uj - student["without_spikes_uj"]) / by_spikes)


@torch.no_grad()
def teacher_layers(teacher: Teacher, image: tuple[int, int, int]) -> dict[str, LayerTraffic]:
    """What each layer of a teacher does for an image of C, H, W.

    Convolutions, linear layers, norms (a bias, once they are folded), and lasnn's shortcuts and products; pools and
    what else another library's network computes is not counted, which is to the teacher's advantage.
    """
    found: dict[str, LayerTraffic] = {}
    network = teacher.network
    folded = {id(unit.norm) for unit in network.modules() if isinstance(unit, NormActivate)}

    def add(name: str, size: LayerSize, traffic: Traffic) -> None:
        before = found.get(name)
        found[name] = LayerTraffic(size, Traffic(), traffic if before is None else before.always + traffic)

    def hook(name: str) -> Callable[..., None]:
        def see(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: torch.Tensor) -> None:
            outputs = output.numel()
            if isinstance(layer, NormActivate):
                size = LayerSize("neuron", 0, has_bias(layer.norm, output), 0, outputs, outputs, "values")
                shortcut = outputs * (residual_of(inputs, named) is not None)
                add(name, size, biases_of(size, 1) + Traffic(additions=shortcut, value_reads=shortcut))
            elif isinstance(layer, _BatchNorm):
                size = LayerSize("neuron", 0, has_bias(layer, output), 0, outputs, outputs, "values")
                add(name, size, biases_of(size, 1))
            elif isinstance(layer, Add):
                size = LayerSize.of(layer, outputs, outputs, "values")
                add(name, size, Traffic(additions=outputs, value_reads=2 * outputs, value_writes=outputs))
            else:
                x = inputs[0] if inputs else next(iter(named.values()))
                size = LayerSize.of(layer, x.numel(), outputs, "values")
                count = multiply_additions_of(layer, output, x)
                add(name, size, of_values(size, count) + Traffic(value_writes=outputs))

        return see

    hooks = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in network.named_modules()
        if isinstance(module, _ConvNd | nn.Linear | Add | Product | NormActivate | _BatchNorm)
        and id(module) not in folded
    ]
    try:
        teacher(torch.zeros(1, *image, device=next(teacher.parameters()).device))
    finally:
        for one in hooks:
            one.remove()
    return found


def has_bias(norm: nn.Module, output: torch.Tensor) -> int:
    """Biases that a norm becomes once it is folded into the layer before it; 0 where there is no norm."""
    return 0 if isinstance(norm, nn.Identity) else output.shape[1]


def multiply_additions_of(layer: nn.Module, output: torch.Tensor, x: torch.Tensor | None = None) -> int:
    """Multiply-additions of a convolution, a linear layer or a product (two of matrices), from its output; of a
    transposed convolution from its input, x.
    """
    if isinstance(layer, Product):
        return 2 * output.numel() * output.shape[1] // layer.heads
    return (x if getattr(layer, "transposed", False) else output).numel() * layer.weight[0].numel()
