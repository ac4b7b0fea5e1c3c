"""Which tensors of a network that runs are spikes, and which are real values, whatever computes them.

Shapes: T time steps, B batch, C channels. T and B are folded into the leading dimension, as in the network.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from lasnn.network.units import NormSpike

# PyTorch's operations, as they are named below its functions and modules. Those that move, copy or pick values, or add
# values of one tensor up: of spikes they make spikes.
KEEP = frozenset(
    [
        "view",
        "_unsafe_view",
        "_reshape_alias",
        "clone",
        "alias",
        "detach",
        "lift_fresh",
        "_to_copy",
        "t",
        "transpose",
        "permute",
        "expand",
        "squeeze",
        "unsqueeze",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "unbind",
        "flip",
        "roll",
        "repeat",
        "unfold",
        "im2col",
        "col2im",
        "index",
        "index_select",
        "constant_pad_nd",
        "reflection_pad1d",
        "reflection_pad2d",
        "reflection_pad3d",
        "replication_pad1d",
        "replication_pad2d",
        "replication_pad3d",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d",
        "_upsample_nearest_exact3d",
        "channel_shuffle",
        "native_channel_shuffle",
        "pixel_shuffle",
        "pixel_unshuffle",
        "sum",
    ]
)
JOIN = ("cat", "stack")
VIEWS = ("view", "_unsafe_view", "_reshape_alias")
LARGEST = (
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "amax",
    "max",
)
AVERAGE_POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d", "avg_pool2")
MEANS = (*AVERAGE_POOLS, "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "mean")


@dataclass(frozen=True)
class Signal:
    """What is known of a tensor that is computed from the images.

    Args:
        constant: it is the same at each of several steps; its leading dimension is B, not T*B.
        spikes_per_one: how many spikes a value of 1 stands for; None: it holds real values.
        numbers: where that is not the same for all values, or some are negative, the number of spikes that each stands
            for, in units of `spikes_per_one`.
        moved: something else may come before step and image.
        encoded: it is made of the encoder's spikes alone, which are there whatever the neurons do.
        why: which operation made it real values, for people; "" where they are the encoder's, or a layer's current.
    """

    constant: bool
    spikes_per_one: float | None = None
    numbers: Tensor | None = None
    moved: bool = False
    encoded: bool = False
    why: str = ""


class Counter(Protocol):
    """What a trace tells of."""

    notes: dict[str, str]
    """By layer, what could not be told."""

    def count_layer(self, op: Any, name: str, args: tuple, kwargs: dict, output: Any) -> str:
        """A convolution, a product, or another operation that PyTorch's counter knows; returns `Signal.why`."""

    def count_sum(self, output: Tensor, constant: bool) -> None:
        """A sum of signals that are not both spikes."""


class SignalTrace(TorchDispatchMode):
    """Follows through a network what is computed from the images, and tells its counter of layers and sums.

    It sees PyTorch's operations one by one, so that it does not matter whether a network calls modules, functions or
    operators. What the forward hooks of a module compute is no part of the network, and is not seen.
    """

    def __init__(self, network: nn.Module, counter: Counter):
        super().__init__()
        self.network, self.counter = network, counter
        self.signals = WeakTensorKeyDictionary()
        # The name of what is made of parameters and buffers alone: the first one's.
        self.weights = WeakTensorKeyDictionary()
        self._learnt = {name for name, _ in network.named_parameters()}
        for name, tensor in (*network.named_buffers(), *network.named_parameters()):
            self.weights[tensor] = name
        # The modules that run, the outermost first.
        self.running: list[tuple[str, nn.Module]] = []
        self._paused = False

    @property
    def place(self) -> str:
        return self.running[-1][0] or "the network"

    def inside(self, *kinds: type) -> bool:
        return any(isinstance(module, kinds) for _, module in self.running)

    def known(self, values: Iterable[Any]) -> list[Signal]:
        return [self.signals[x] for x in tensors_of(values) if x in self.signals]

    def enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: object) -> None:
            if module is self.network:
                # An exception may have left the others.
                self.running, self._paused = [], False
            self.running.append((name, module))

        return hook

    def pause(self, *_: object) -> None:
        self._paused = True

    def leave(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        self._paused = False
        if self.running:
            self.running.pop()
        lost = isinstance(output, Tensor) and output not in self.signals and output not in self.weights
        known = self.known(inputs)
        if lost and known:
            # As what a hook put in the output's place.
            self.signals[output] = Signal(all(it.constant for it in known), why=type(module).__name__)

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not self.running or self._paused:
            return op(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            # There functions arrive whole.
            with self:
                output = op.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        given = tensors_of((*args, *kwargs.values()))
        name = op.overloadpacket.__name__
        # Of these only the shape is taken.
        known = [] if name.endswith("_like") or name.startswith("new_") else self.known(given)
        if not known:
            output = op(*args, **kwargs)
            names = [self.weights[x] for x in given if x in self.weights]
            for one in tensors_of([output]):
                if names and one not in self.weights:
                    self.weights[one] = names[0]
            return output
        written = args[0] if name.endswith("_") and not name.endswith("__") else None
        before = self.signals.get(written) if isinstance(written, Tensor) else None
        if before is not None and before.spikes_per_one is not None and before.numbers is None:
            # Its values are about to change.
            self.signals[written] = replace(before, numbers=written.clone())
        output = op(*args, **kwargs)
        self._follow(op, name.removesuffix("_"), args, kwargs, output, known)
        if isinstance(written, Tensor) and written._base is not None:
            self._written_in_part(written, written._base)
        return output

    def _follow(self, op: Any, name: str, args: tuple, kwargs: dict, output: Any, known: list[Signal]) -> None:
        """Note what an operation makes of signals."""
        # Those of the largest are followed by their places.
        made = tensors_of([output])[: 1 if name in LARGEST else None]
        # What is the same at each step may have been written out for all of them.
        longer = name in ("repeat", "expand", "cat", "stack") and made[0].shape[:1] != tensors_of(args)[0].shape[:1]
        constant = all(it.constant for it in known) and not longer
        spikes, why = None, next((it.why for it in known if it.spikes_per_one is None), f"{name} in {self.place}")
        if op.overloadpacket in flop_registry or "dot_product_attention" in name:
            why = self.counter.count_layer(op, name, args, kwargs, output)
        else:
            spikes = self._spikes_of(op, name, args, kwargs, output)
            if spikes is None and name in ("add", "sub") and len(known) == 2:
                self.counter.count_sum(output, constant)
            of = [self.weights.get(x) for x in tensors_of((*args, *kwargs.values()))]
            of = [weight for weight in of if weight in self._learnt]
            cheap = name in KEEP or name in (*JOIN, "copy") or torch.Tag.pointwise in op.tags
            if of and not cheap and not ("norm" in name or "prelu" in name or self.inside(NormSpike)):
                self.counter.notes[of[0].removesuffix(".weight")] = f"not counted: {name} is not known"
        if spikes is None:
            for one in made:
                self.signals[one] = Signal(constant, why=why)
            return
        scale, numbers = spikes
        moved = any(it.moved for it in known) or moves_rows(name, args, kwargs)
        each = numbers if isinstance(numbers, list | tuple) else [numbers] * len(made)
        for one, number in zip(made, each, strict=True):
            self.signals[one] = Signal(constant, scale, number, moved, all(it.encoded for it in known))

    def _spikes_of(self, op: Any, name: str, args: tuple, kwargs: dict, output: Any) -> tuple[float, Any] | None:
        """`spikes_per_one` and `numbers` of what an operation makes, a list where of several; None: real values."""
        x, *rest = args
        other = rest[0] if rest and isinstance(rest[0], Tensor) else None
        parts = [x]
        if name in ("add", "sub"):
            parts = [x, *rest[:1]]
        elif name in JOIN:
            # Zeros that fill up channels are no spikes.
            parts = [one for one in x if one in self.signals or bool(one.any())]
        elif name == "copy" or (name == "mul" and other in self.signals):
            parts, other = [other], x
        found = [self.signals.get(one) if isinstance(one, Tensor) else None for one in parts]
        if any(it is None or it.spikes_per_one is None for it in found):
            return None
        scale, plain = found[0].spikes_per_one, all(it.numbers is None for it in found)
        equal = plain and all(it.spikes_per_one == scale for it in found)
        counts = parts[0] if plain else found[0].numbers
        if name in ("add", "sub"):
            if equal and name == "add" and kwargs.get("alpha", 1) == 1:
                return scale, None
            # Weighted or taken away, each spike remains one.
            return 1.0, self._counts(parts[0]) + self._counts(parts[1])
        if name in JOIN:
            return (scale, None) if equal else (1.0, op([self._counts(one) for one in x], *rest, **kwargs))
        if name == "copy":
            return scale, None if plain else counts.expand(output.shape)
        if name in ("mul", "div"):
            # By what the images do not enter into: it can be taken into the weights of the layer behind.
            if kwargs:
                # It rounds.
                return None
            if isinstance(other, Tensor):
                return None if other in self.signals else (scale, counts * other.ne(0))
            if not (plain and rest[0] > 0):
                return (scale, counts) if rest[0] else None
            return (scale / rest[0] if name == "mul" else scale * rest[0]), None
        if name == "neg":
            return scale, counts
        if sum(one in self.signals for one in tensors_of((*args, *kwargs.values()))) > 1:
            return None
        if name in VIEWS:
            return scale, None if plain else counts.reshape(output.shape)
        if name in KEEP:
            filled = name == "constant_pad_nd" and len(rest) > 1 and rest[1] != 0
            if filled or not tensors_of([output])[0].is_floating_point():
                return None
            return scale, None if plain else op(counts, *rest, **kwargs)
        if name in LARGEST:
            # One that is negative may be less than none.
            [values, *_], [chosen, *_] = tensors_of([output]), tensors_of([op(counts, *rest, **kwargs)])
            return scale, None if plain else chosen * values.ne(0)
        if name in MEANS:
            summed = summed_by(name, args, output)
            if isinstance(summed, Tensor):
                return scale, op(counts, *rest, **kwargs) * summed
            return scale * summed, None if plain else op(counts, *rest, **kwargs)
        return None

    def _counts(self, x: Tensor) -> Tensor:
        """How many spikes each value stands for; what is no signal holds zeros."""
        signal = self.signals.get(x)
        return x if signal is None else (x if signal.numbers is None else signal.numbers) * signal.spikes_per_one

    def _written_in_part(self, part: Tensor, whole: Tensor) -> None:
        """Note of a tensor what a part written into it is, where the rest is the same or was not known."""
        new, old = self.signals[part], self.signals.get(whole)
        fits = whole not in self.weights if old is None else old.spikes_per_one == new.spikes_per_one
        if not fits or new.numbers is not None or (old is not None and old.numbers is not None):
            new = Signal(new.constant, why=f"a part written in place in {self.place}")
        self.signals[whole] = new


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments or results, those in lists too."""
    flat = [one for value in values for one in (value if isinstance(value, list | tuple) else (value,))]
    return [one for one in flat if isinstance(one, Tensor)]


def absolute_if_signed(spikes: Tensor) -> Tensor | None:
    """How many spikes each value is where some are negative; None: as many as its value says."""
    return spikes.detach().abs() if bool((spikes < 0).any()) else None


def moves_rows(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether an operation may put something else before step and image, which the leading dimension holds."""
    if name in ("t", "transpose"):
        first, second = args[1:3] if name == "transpose" else (0, 1)
        return first != second and 0 in (first % args[0].ndim, second % args[0].ndim)
    if name == "permute":
        return args[1][0] % args[0].ndim != 0
    if name in JOIN:
        return (args[1] if len(args) > 1 else kwargs.get("dim", 0)) in (0, -args[0][0].ndim - (name == "stack"))
    if name in ("sum", "mean", "amax", "max"):
        over = args[1] if len(args) > 1 else None
        return over is None or bool({0, -args[0].ndim} & {*(over if isinstance(over, list | tuple) else (over,))})
    return False


def summed_by(name: str, args: tuple, output: Tensor) -> float | Tensor:
    """By how much the mean that an operation takes is smaller than the sum; a tensor of the output's sides where the
    windows of a pool differ in size, as at the edge.
    """
    if name == "avg_pool2":
        return 4
    if name == "mean":
        return args[0].numel() / output.numel()
    dimensions = int(name[-2])
    shapes = list(zip(args[0].shape[-dimensions:], output.shape[-dimensions:], strict=True))
    if "adaptive" in name:
        sides = [_adaptive_windows(*shape) for shape in shapes]
    else:
        kernel, stride, padding, _, padded, divisor = [*args[1:], *(None, None, False, True, None)[len(args) - 2 :]]
        if divisor:
            return divisor
        each = (_of_each(one, dimensions) for one in (kernel, stride or kernel, padding or 0))
        sides = [_windows(*shape, *how, padded) for shape, *how in zip(shapes, *each, strict=True)]
    windows = math.prod(side.view(-1, *(1,) * place) for place, side in enumerate(reversed(sides)))
    return windows.to(output) if windows.min() < windows.max() else float(windows.max())


def _adaptive_windows(size: int, out: int) -> Tensor:
    """How many inputs each output of an adaptive pool takes the mean of, in one dimension."""
    place = torch.arange(out)
    return -(-(place + 1) * size // out) - place * size // out


def _windows(size: int, out: int, kernel: int, stride: int, padding: int, padded: bool) -> Tensor:
    """The same of an average pool; zeros of the padding count if `padded`."""
    first = torch.arange(out) * stride - padding
    last = (first + kernel).clamp(max=size + padding)
    return last - first if padded else last.clamp(max=size) - first.clamp(min=0)


def _of_each(value: int | list[int], dimensions: int) -> list[int]:
    """An option of a pool, given for all dimensions or for each."""
    value = [value] if isinstance(value, int) else value
    return [*value] * (dimensions // len(value))
