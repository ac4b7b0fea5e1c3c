"""By how much each tensor of a spiking network is smaller than that of the ANN whose weights it has.

A spike is 1 where the ANN has a, and a neuron fires at its own threshold where the ANN's current has theta. Both follow
from scales: with k of a tensor, the ANN's value is k times the student's. A convolution, a linear layer or a batch norm
brings its input's scale to any other by its weights; what adds, pools or reshapes keeps it, so that all that a shortcut
joins has one scale. `Scales` finds which tensors share one; `fold` puts given scales into a student's weights. Its
state dict keeps its keys and its neurons their thresholds.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lasnn.errors import UserError
from lasnn.network.staged import Staged
from lasnn.network.units import NormActivate

LAYERS = (nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
# What keeps a scale: k·f(x) = f(k·x) for k > 0.
HOMOGENEOUS = (
    "avg_pool2 avg_pool2d _adaptive_avg_pool2d max_pool2d max_pool2d_with_indices mean sum add sub neg cat stack view "
    "_unsafe_view _reshape_alias clone alias detach t transpose permute expand squeeze unsqueeze slice select split "
    "split_with_sizes unbind flip roll constant_pad_nd reflection_pad2d replication_pad2d upsample_nearest2d "
    "upsample_bilinear2d pixel_shuffle pixel_unshuffle _to_copy"
)


class Scales:
    """Which tensors of a network share a scale, found by a forward pass on the meta device.

    Args:
        ann: made of units with an activation each, as `ann_units` makes them.
        image: C, H, W.

    Attributes:
        layers, norms: name -> (group of the input, group of the output).
        units: name -> (group of the current, group of what the unit emits).
        fixed: the groups whose scale is 1: those of the images and the logits.

    Raises:
        UserError: something in the network has no one scale, a line each.
    """

    def __init__(self, ann: Staged, image: tuple[int, int, int]):
        network = copy.deepcopy(ann).to("meta").eval()
        trace = _Trace(network)
        x = torch.empty(1, 1, *image, device="meta")
        start = trace.group(x)
        with torch.no_grad(), trace:
            logits, _ = network(x)
        if trace.problems:
            raise UserError(*trace.problems)

        def found(pairs: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
            return {name: (trace.root(before), trace.root(after)) for name, (before, after) in pairs.items()}

        self.layers, self.norms, self.units = found(trace.layers), found(trace.norms), found(trace.units)
        without = {after for name, (_, after) in self.norms.items() if network.get_submodule(name).weight is None}
        self.fixed = {trace.root(start), trace.root(trace.group(logits))} | without

    def complete(self, scales: Mapping[int, float]) -> dict[int, float]:
        """The scale of every group, from those of the groups that units read or write: a layer between passes its
        input's on, which leaves its weights as they are.
        """
        known = dict.fromkeys(self.fixed, 1.0) | dict(scales)
        for before, after in (*self.layers.values(), *self.norms.values()):
            known.setdefault(before, 1.0)
            known.setdefault(after, known[before])
        return known


class _Trace(TorchDispatchMode):
    """Follows the groups of the tensors of a network through its forward pass."""

    def __init__(self, network: Staged):
        super().__init__()
        self.layers: dict[str, tuple[int, int]] = {}
        self.norms: dict[str, tuple[int, int]] = {}
        self.units: dict[str, tuple[int, int]] = {}
        self._problems: dict[str, None] = {}
        self._parents: list[int] = []
        # Tensors are kept, so that no two have one id.
        self._seen: dict[int, tuple[Tensor, int]] = {}
        self._running: list[tuple[str, nn.Module]] = []
        self._inside = 0
        activations = {}
        for name, module in network.named_modules():
            if isinstance(module, NormActivate):
                activations[module.activation] = name
        for name, module in network.named_modules():
            module.register_forward_pre_hook(lambda module, _, name=name: self._running.append((name, module)))
            if module in activations:
                self._watch(module, activations[module], self.units)
            elif isinstance(module, LAYERS):
                self._watch(module, name, self.layers)
            elif isinstance(module, NORMS):
                self._watch(module, name, self.norms)
            module.register_forward_hook(self._leave)

    @property
    def problems(self) -> list[str]:
        return list(self._problems)

    def root(self, group: int) -> int:
        while self._parents[group] != group:
            group = self._parents[group]
        return group

    def group(self, x: Tensor) -> int:
        """The group of a tensor, a new one where it has none yet."""
        if id(x) not in self._seen:
            self._parents.append(len(self._parents))
            self._seen[id(x)] = x, len(self._parents) - 1
        return self._seen[id(x)][1]

    def _watch(self, module: nn.Module, name: str, found: dict[str, tuple[int, int]]) -> None:
        """Note the groups of a module's input and output, whatever it does with them inside."""

        def enter(module: nn.Module, _: object) -> None:
            self._inside += 1

        def leave(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
            self._inside -= 1
            x = inputs[0] if inputs else next(iter(named.values()))
            if name in found:
                self._problems[f"{name} ({type(module).__name__}) runs twice, with one scale for both"] = None
            # An Identity returns what it is given.
            output = output.view_as(output) if output is x else output
            before = self.group(x)
            self._parents.append(len(self._parents))
            self._seen[id(output)] = output, len(self._parents) - 1
            found[name] = before, len(self._parents) - 1
            return output

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, with_kwargs=True)

    def _leave(self, *_: object) -> None:
        self._running.pop()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = op(*args, **(kwargs or {}))
        if self._inside:
            return output
        given = [one for arg in args for one in (arg if isinstance(arg, list | tuple) else (arg,))]
        tensors = [one for one in given if isinstance(one, Tensor)]
        traced = [one for one in tensors if id(one) in self._seen]
        if not traced:
            return output
        name = op.overloadpacket.__name__.removesuffix("_")
        # A product with a number, or with weights, keeps the scale; a sum with them does not.
        factors = tensors if name == "mul" else tensors[:1] if name == "div" else ()
        product = len(traced) == 1 and any(one is traced[0] for one in factors)
        shifts = name in ("add", "sub") and len(traced) < 2
        if shifts or not (name in HOMOGENEOUS.split() or product):
            place, module = self._running[-1] if self._running else ("", None)
            where = f"{place or 'the network'} ({type(module).__name__})"
            self._problems[f"{where} has no one scale: {name} does not pass it on"] = None
        groups = [self.root(self.group(one)) for one in traced]
        for other in groups[1:]:
            self._parents[self.root(other)] = self.root(groups[0])
        for one in output if isinstance(output, list | tuple) else (output,):
            if isinstance(one, Tensor) and id(one) not in self._seen:
                self._seen[id(one)] = one, groups[0]
        return output


@torch.no_grad()
def fold(network: Staged, found: Scales, scales: Mapping[int, float]) -> None:
    """Put scales into the weights of a network that has the ANN's: its currents and spikes are then those of the ANN,
    divided by the scales of their groups.

    Behind a layer whose input has the scale k, channels whose running variance is below k² times their norm's eps come
    out smaller: no variance stands for that. The layer's weights could carry the scale instead, but weights in front of
    a batch norm learn at a rate that falls with the square of their size.

    Args:
        network: changed in place.
        scales: of the groups that units read or write.
    """
    known = found.complete(scales)
    for name, (before, after) in found.layers.items():
        layer, (k, to) = network.get_submodule(name), (known[before], known[after])
        layer.weight.mul_(k / to)
        if layer.bias is not None:
            layer.bias.div_(to)
    for name, (before, after) in found.norms.items():
        norm, (k, to) = network.get_submodule(name), (known[before], known[after])
        if norm.running_mean is not None:
            norm.running_mean.div_(k)
            # So that (x - mean)/sqrt(var + eps) stays what it was.
            norm.running_var.copy_(((norm.running_var + norm.eps) / k**2 - norm.eps).clamp(min=0))
        if norm.weight is not None:
            norm.weight.div_(to)
            norm.bias.div_(to)
