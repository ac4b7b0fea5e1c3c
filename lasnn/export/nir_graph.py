"""A spiking network as a NIR graph (Pedersen et al., Nature Communications 2024).

    tau dv/dt = (v_leak - v) + r·I     a spike where v > v_threshold, then v = v_reset     (NIR's LIF)

In steps of dt that is h = v + dt/tau·(v_leak - v + r·I). Readers disagree about r, v_leak and v_reset, so each neuron
is written with r = 1 and v_leak = v_reset = 0: its voltage is counted from rest, and where the input does not decay
both voltage and threshold are divided by tau. That changes no spike, and touches no weight.

Shapes: T time steps, B batch, C channels, H x W pixels, F features, K classes. NIR knows neither time nor batch.
"""

import copy
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import nir
import numpy as np
import torch
from torch import Tensor, fx, nn

from lasnn.errors import UserError
from lasnn.kernels import BatchNorm2d
from lasnn.kernels.functional import folded
from lasnn.network.pooling import AvgPool2d
from lasnn.network.staged import Staged
from lasnn.network.units import Add, NormSpike, Product
from lasnn.neuron import Neuron
from lasnn.registry import reason

# One time step, in seconds; snnTorch knows no other.
DT = 1e-4
NORMS = (nn.BatchNorm2d, BatchNorm2d)
# How a forward adds and flattens without a module.
ADD = ("add", "add_", "iadd")
FLATTEN = ("flatten", "view", "reshape")


def build(network: Staged, image: tuple[int, int, int]) -> tuple[nir.NIRGraph, dict[str, str]]:
    """A spiking network in eval mode as a NIR graph.

    A batch norm becomes part of the convolution before it. Average pooling becomes sum pooling; the next layer's
    weights (or the next neuron's voltage) take the division up. A residual is a second edge into the neuron; a sum, of
    spikes or of currents, is an edge of each summand into what reads it.

    Args:
        image: C, H, W of what the encoder returns.

    Returns:
        The graph, from one time step's input [C, H, W] to that step's logits [K], and {spiking node: its unit's name}
        in the order in which a forward pass runs them.

    Raises:
        UserError: what NIR or its readers cannot say, a line for each reason.
    """
    path = StageSequence(network)
    try:
        traced = Tracer().trace(path)
    except Exception as error:
        raise UserError(
            f"the architecture's forward cannot be followed ({reason(error)}); NIR holds a fixed graph: leave out "
            "conditions and loops that depend on values, and einops"
        ) from error
    builder = Builder(path, traced)
    builder.build(image)
    if builder.problems:
        raise UserError(*(f"{_several(where)}: {reason}" for reason, where in builder.problems.items()))
    return nir.NIRGraph(nodes=builder.nodes, edges=builder.edges), builder.units


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer that is written once something reads it; until then a batch norm can join it.

    Weight and bias are fp64; `options` are those of the convolution, None for a linear layer.
    """

    name: str
    weight: Tensor
    bias: Tensor
    inputs: tuple[str, ...]
    options: dict[str, Any] | None

    def mapped(self, scale: Tensor, shift: Tensor) -> "Layer":
        """The layer with each output channel multiplied by `scale` and moved by `shift`."""
        weight = self.weight * scale.view(-1, *[1] * (self.weight.ndim - 1))
        return replace(self, weight=weight, bias=self.bias * scale + shift)

    def node(self) -> nir.NIRNode:
        weight, bias = self.weight.float().numpy(), self.bias.float().numpy()
        if self.options is None:
            return nir.Affine(weight=weight, bias=bias)
        return nir.Conv2d(input_shape=None, weight=weight, bias=bias, groups=1, **self.options)


@dataclass(frozen=True)
class Signal:
    """A value in the network: the sum of some nodes' outputs, each times a factor that whoever reads it takes up."""

    terms: dict[str | Layer, float]
    # [1, C, H, W] or [1, F].
    meta: Tensor

    def plus(self, other: "Signal") -> "Signal":
        terms = dict(self.terms)
        for term, factor in other.terms.items():
            # NIR refuses a second edge between the same nodes.
            terms[term] = terms.get(term, 0.0) + factor
        return Signal(terms, self.meta)


class StageSequence(nn.Module):
    """Stem, stages and head of a network one after the other, under their own names."""

    def __init__(self, network: Staged):
        super().__init__()
        self.names = ("stem", *network.stage_names, "head")
        for name in self.names:
            self.add_module(name, getattr(network, name))

    def forward(self, x: Tensor) -> Tensor:
        # By name: children() has a module that is two stages once.
        for name in self.names:
            x = getattr(self, name)(x)
        return x


class Tracer(fx.Tracer):
    """Takes lasnn's own modules for one each, like those of torch.nn."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        own = (NormSpike, AvgPool2d, Add, Product, *NORMS)
        return isinstance(module, own) or super().is_leaf_module(module, name)


class Builder(fx.Interpreter):
    """Runs a traced network on `Signal`s and collects the nodes and edges of its graph.

    What cannot be said goes to `problems`, by reason, and is passed over, so that one run finds all of it.
    """

    def __init__(self, path: StageSequence, traced: fx.Graph):
        super().__init__(fx.GraphModule(path, traced))
        self.path = path
        self.on_meta = copy.deepcopy(path).to("meta")
        self.nodes: dict[str, nir.NIRNode] = {}
        self.edges: list[tuple[str, str]] = []
        self.units: dict[str, str] = {}
        self.problems: dict[str, list[str]] = {}
        self._written: dict[Layer, str] = {}

    @torch.no_grad()
    def build(self, image: tuple[int, int, int]) -> None:
        """Collect the graph for inputs of C, H, W."""
        start = self._write("input", nir.Input(input_type=np.array(image)), ())
        logits = self.run(Signal({start: 1.0}, torch.empty(1, *image, device="meta")))
        if logits.meta.ndim != 2:
            ends = list(logits.meta.shape[1:])
            self._refuse("head", f"it ends in {ends} values, not in one for each class", logits.meta)
            return
        if list(logits.terms.values()) != [1.0]:
            # Not every reader sums the edges into the output, and nothing behind it takes up a factor.
            logits = self._each("logits", logits)
        inputs, _ = self._read(logits)
        self._write("output", nir.Output(output_type=np.array(logits.meta.shape[1:])), inputs)

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        module = self.path.get_submodule(target)
        if isinstance(module, NormSpike):
            return self._spike(target, module, *args, **kwargs)
        if isinstance(module, Add):
            return args[0].plus(args[1])
        meta = self.on_meta.get_submodule(target)(*_metas(args), **_metas(kwargs))
        x, kind = (*args, *kwargs.values())[0], type(module)
        if kind in (nn.Identity, nn.Dropout, nn.Dropout2d):
            return x
        if kind is nn.Conv2d:
            return self._convolve(target, module, x, meta)
        if kind is nn.Linear and x.meta.ndim == 2:
            return self._weigh(target, module.weight, module.bias, x, meta)
        if kind in NORMS:
            return self._normalise(target, module, x)
        if kind in (AvgPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d):
            return self._pool(target, module, x, meta)
        if kind is nn.Flatten and meta.shape == x.meta.flatten(1).shape:
            return self._flatten(target, x, meta)
        return self._refuse(target, UNSAID.get(kind, f"NIR has nothing for {module}"), meta)

    def call_function(self, target: Callable, args: tuple, kwargs: dict) -> Any:
        return self._call(target.__name__, target(*_metas(args), **_metas(kwargs)), args, kwargs)

    def call_method(self, target: str, args: tuple, kwargs: dict) -> Any:
        tensor, *others = _metas(args)
        return self._call(target, getattr(tensor, target)(*others, **_metas(kwargs)), args, kwargs)

    def get_attr(self, target: str, args: tuple, kwargs: dict) -> Any:
        return operator.attrgetter(target)(self.on_meta)

    def _call(self, name: str, result: Any, args: tuple, kwargs: dict) -> Any:
        if not isinstance(result, Tensor):
            # As x.shape, and what is calculated from it.
            return result
        signals = [value for value in args if isinstance(value, Signal)]
        if name in ADD and [signal.meta.shape for signal in signals] == [result.shape] * 2 and not kwargs:
            return signals[0].plus(signals[1])
        if name in FLATTEN and len(signals) == 1 and result.shape == signals[0].meta.flatten(1).shape:
            return self._flatten(name, signals[0], result)
        return self._refuse("the architecture's forward", f"NIR has nothing for {name}()", result)

    def _spike(self, target: str, unit: NormSpike, x: Signal, residual: Signal | None = None) -> Signal:
        if type(unit.norm) in NORMS:
            x = self._normalise(f"{target}.norm", unit.norm, x)
        if residual is not None:
            x = x.plus(residual)
        reason = unsaid_neuron(unit.neuron)
        if reason:
            return self._refuse(target, reason, x.meta)
        inputs, factor = self._read(x)
        name = self._write(target, neuron_node(unit.neuron, tuple(x.meta.shape[1:]), factor), inputs)
        self.units[name] = unit.name
        return Signal({name: 1.0}, x.meta)

    def _convolve(self, target: str, layer: nn.Conv2d, x: Signal, meta: Tensor) -> Signal:
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        if layer.groups != 1:
            return self._refuse(target, "readers of NIR take no grouped convolution", meta)
        if layer.kernel_size[0] != layer.kernel_size[1]:
            return self._refuse(target, "nir takes each kernel for a square one", meta)
        if layer.padding_mode != "zeros" or (left, top) != (right, bottom):
            return self._refuse(target, "NIR pads with zeros, and both sides alike", meta)
        options = {"stride": layer.stride, "padding": (top, left), "dilation": layer.dilation}
        return self._weigh(target, layer.weight, layer.bias, x, meta, options)

    def _weigh(
        self, name: str, weight: Tensor, bias: Tensor | None, x: Signal, meta: Tensor, options: dict | None = None
    ) -> Signal:
        inputs, factor = self._read(x)
        weight = weight.detach().cpu().double()
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().cpu().double()
        return Signal({Layer(name, weight * factor, bias, inputs, options): 1.0}, meta)

    def _normalise(self, target: str, norm: nn.BatchNorm2d, x: Signal) -> Signal:
        if norm.running_mean is None:
            return self._refuse(target, "a batch norm without running statistics depends on the batch", x.meta)
        mean, scale, bias = (value.detach().cpu().flatten() for value in folded(norm, torch.float64))
        only = next(iter(x.terms)) if list(x.terms.values()) == [1.0] else None
        if not isinstance(only, Layer):
            (only,) = self._each(target, x).terms
        return Signal({only.mapped(scale, bias - mean * scale): 1.0}, x.meta)

    def _each(self, name: str, x: Signal) -> Signal:
        """`x` as a layer, each channel by itself: a 1 x 1 convolution or a matrix, as readers know nothing smaller."""
        weight, options = torch.eye(x.meta.shape[1]), None
        if x.meta.ndim == 4:
            weight, options = weight[..., None, None], {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
        return self._weigh(name, weight, None, x, x.meta, options)

    def _pool(self, target: str, pool: nn.AvgPool2d | nn.AdaptiveAvgPool2d, x: Signal, meta: Tensor) -> Signal:
        before, after = x.meta.shape[2:], meta.shape[2:]
        if isinstance(pool, nn.AdaptiveAvgPool2d):
            if any(pixels % windows for pixels, windows in zip(before, after, strict=True)):
                sizes = " x ".join(map(str, before)), " x ".join(map(str, after))
                return self._refuse(target, f"{sizes[0]} pixels do not divide into {sizes[1]} equal windows", meta)
            kernel = stride = tuple(pixels // windows for pixels, windows in zip(before, after, strict=True))
            divisor = math.prod(kernel)
        else:
            kernel, stride, padding = (_pair(value) for value in (pool.kernel_size, pool.stride, pool.padding))
            whole = [(pixels - k) // s + 1 for pixels, k, s in zip(before, kernel, stride, strict=True)]
            if any(padding) or whole != list(after):
                return self._refuse(target, "readers of NIR pool whole windows: no padding, no ceil_mode", meta)
            divisor = pool.divisor_override or math.prod(kernel)
        inputs, factor = self._read(x)
        node = nir.SumPool2d(kernel_size=np.array(kernel), stride=np.array(stride), padding=np.array((0, 0)))
        return Signal({self._write(target, node, inputs): factor / divisor}, meta)

    def _flatten(self, target: str, x: Signal, meta: Tensor) -> Signal:
        if x.meta.ndim == 2:
            return x
        inputs, factor = self._read(x)
        # Counted from the end, readers are right with a batch dimension in front and without one.
        node = nir.Flatten(input_type=np.array(x.meta.shape[1:]), start_dim=-3, end_dim=-1)
        return Signal({self._write(target, node, inputs): factor}, meta)

    def _read(self, x: Signal) -> tuple[tuple[str, ...], float]:
        """The nodes whose outputs add up to `x`, and the one factor that is left to take up."""
        factors = set(x.terms.values())
        common = factors.pop() if len(factors) == 1 else 1.0
        names = []
        for term, factor in x.terms.items():
            if factor != common:
                name = term.name if isinstance(term, Layer) else term
                (term,) = self._each(f"{name}_scaled", Signal({term: factor}, x.meta)).terms
            if isinstance(term, Layer):
                if term not in self._written:
                    self._written[term] = self._write(term.name, term.node(), term.inputs)
                term = self._written[term]
            names.append(term)
        return tuple(names), common

    def _write(self, name: str, node: nir.NIRNode, inputs: Iterable[str]) -> str:
        """Add a node under the first free one of `name`, `name`_2, ...; PyTorch's names of modules hold no dots."""
        name = free = name.replace(".", "_")
        number = 1
        while free in self.nodes:
            number += 1
            free = f"{name}_{number}"
        self.nodes[free] = node
        self.edges += [(before, free) for before in inputs]
        return free

    def _refuse(self, where: str, reason: str, meta: Tensor) -> Signal:
        places = self.problems.setdefault(reason, [])
        if where not in places:
            places.append(where)
        return Signal({}, meta)


UNSAID = {
    nn.MaxPool2d: 'NIR has no max-pooling; train with pool = "avg"',
    Product: "NIR has no product of two signals, as attention makes; export to onnx or pt2",
    nn.Linear: "a linear layer on pictures; put nn.Flatten() before it",
}


def unsaid_neuron(neuron: nn.Module) -> str:
    """Why NIR cannot say a neuron; "" where it can."""
    kind = type(neuron)
    if not isinstance(neuron, Neuron) or kind.forward is not Neuron.forward or kind.after_norm is not Neuron.after_norm:
        return f"{kind.__name__} computes its spikes by itself; NIR holds lasnn's own neurons: lif, plif, if"
    if neuron.options["v_reset"] is None:
        return 'readers of NIR silently take a soft reset for a hard one; train with student.neuron.reset = "hard"'
    return ""


def neuron_node(neuron: Neuron, shape: tuple[int, ...], factor: float = 1.0) -> nir.NIRNode:
    """A neuron whose input is `factor` times its node's; no spike is changed."""
    threshold = (neuron.options["threshold"] - neuron.options["v_reset"]) / factor
    tau = float(neuron.time_constant)
    if not math.isinf(tau) and not neuron.options.get("decay_input", False):
        threshold /= tau

    def each(value: float) -> np.ndarray:
        return np.full(shape, value, np.float32)

    # NIR's neurons fire above the threshold, lasnn's at it: above the next smaller number.
    v_threshold = np.nextafter(each(threshold), each(0))
    if math.isinf(tau):
        # dv/dt = r·I: a step adds dt·r·I.
        return nir.IF(r=each(1 / DT), v_threshold=v_threshold, v_reset=each(0))
    return nir.LIF(tau=each(tau * DT), r=each(1), v_leak=each(0), v_threshold=v_threshold, v_reset=each(0))


def _metas(value: Any) -> Any:
    """The same with meta tensors in the signals' places."""
    return fx.node.map_aggregate(value, lambda each: each.meta if isinstance(each, Signal) else each)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _several(places: list[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
