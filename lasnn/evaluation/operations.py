"""Spikes and synaptic operations of a spiking network, counted by hooks."""

import math
import weakref
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lasnn import processes
from lasnn.evaluation.energy import (
    LayerSize,
    LayerTraffic,
    always,
    by_spikes,
    has_bias,
    in_each_precision,
    memory_accesses,
    multiply_additions_of,
)
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import Add, NormSpike, Product

# Energy of one 32-bit operation in a 45 nm process, in pJ (Horowitz, ISSCC 2014), as SNN papers count it.
PJ_ADD = 0.9
PJ_MULTIPLY_ADD = 4.6

POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.AdaptiveMaxPool2d)
SAME = (nn.Identity, nn.Flatten, nn.Dropout)


class OperationCounter:
    """Counts spikes and synaptic operations in forward passes, by hooks that live as long as the `with` block.

    A layer fed by spikes costs one addition for each connection that a spike meets; connections that end in the
    padding do not exist. An average pool is linear: a spike that enters it costs what it would cost in the layer
    behind the pool. A sum of spikes, where a shortcut adds them, is so many spikes. In a product of queries, keys and
    values a key's spike costs one for each value's spike of its head and pixel, a query's one for each of the head's
    channels. A layer fed by anything else costs its multiply-additions, once where its input is constant in time and T
    times where it is not; currents that a shortcut carries and adds cost nothing until a layer reads them.
    """

    def __init__(self, student: Student, timesteps: int):
        self.student = student
        self.timesteps = timesteps
        self.images = 0
        self.spikes: dict[str, Tensor] = {}
        # The step at which each neuron first spiked, on any image; `timesteps` where it never did.
        self.first: dict[str, Tensor] = {}
        # Of each layer, by step.
        self.additions: dict[str, Tensor] = {}
        self.multiply_additions: dict[str, Tensor] = {}
        # Spikes that a layer reads, by step; of a neuron, those that a shortcut adds to its current.
        self.spikes_in: dict[str, Tensor] = {}
        self.sizes: dict[str, LayerSize] = {}
        # Additions of all layers for each step and image of the current batch, [T, B].
        self.batch_additions = torch.zeros(timesteps, 0, dtype=torch.float64)
        # How many spikes a value of 1 stands for, by the identity of the tensors of the current pass; where that is not
        # the same for all values, the number of spikes of each. The reference is weak, so that features are freed as
        # ever; it also tells a tensor from a later one with the same identity.
        self._marked: dict[int, tuple[weakref.ref, float, Tensor | None]] = {}
        self._fanout: dict[tuple, Tensor] = {}
        self._hooks: list = []

    def __enter__(self) -> "OperationCounter":
        network = self.student.network
        self._hooks.append(network.stem.register_forward_pre_hook(self._enter))
        for name, module in network.named_modules():
            if isinstance(module, NormSpike):
                self._hooks.append(module.register_forward_hook(self._count_spikes(name), with_kwargs=True))
                continue
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                hook = self._count_operations(name)
            elif isinstance(module, (*POOLS, *SAME)):
                hook = self._pass_on
            elif isinstance(module, Add):
                hook = self._add(name)
            elif isinstance(module, Product):
                hook = self._count_product(name)
            else:
                continue
            self._hooks.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._marked.clear()
        context = self.student.network.time
        if context.start == 0:
            # A run in time chunks sees its images in each of them.
            self.images += context.batch
            self.batch_additions = torch.zeros(self.timesteps, context.batch, dtype=torch.float64)
        if getattr(self.student.encoder, "spiking", False):
            self._mark(inputs[0], 1.0)

    def _mark(self, x: Tensor, spikes_per_one: float, numbers: Tensor | None = None) -> None:
        self._marked[id(x)] = (weakref.ref(x), spikes_per_one, numbers)

    def _spikes_in(self, x: Tensor) -> tuple[Tensor, float] | None:
        """Numbers of x's shape, and how many spikes a 1 of them stands for; None where x is not made of spikes."""
        reference, scale, numbers = self._marked.get(id(x), (None, 0.0, None))
        if reference is None or reference() is not x:
            return None
        return x if numbers is None else numbers, scale

    def _count_spikes(self, name: str):
        def hook(unit: NormSpike, inputs: tuple[Tensor, ...], named: dict[str, Tensor], spikes: Tensor) -> None:
            # A converted network's spikes carry their layer's threshold, and count as one.
            spikes_per_one = 1 / getattr(unit.neuron, "amplitude", 1.0)
            count = self.spikes.setdefault(name, torch.zeros(self.timesteps, dtype=torch.float64))
            count[self._now] += spikes_per_one * self._by_step(spikes)
            fired = self.student.network.time.unfold(spikes).detach().ne(0).any(1)
            step = torch.where(fired.any(0), fired.int().argmax(0) + self._now.start, self.timesteps)
            self.first[name] = torch.minimum(self.first.get(name, step), step)
            self._mark(spikes, spikes_per_one)
            residual = inputs[1] if len(inputs) > 1 else named.get("residual")
            added = None if residual is None else self._spikes_in(residual)
            if added is not None:
                self._count(self.spikes_in, name)[self._now] += added[1] * self._by_step(added[0])
            self.sizes[name] = LayerSize(
                "neuron",
                biases=has_bias(unit.norm, spikes),
                outputs=spikes[0].numel(),
                leak=bool(torch.as_tensor(getattr(unit.neuron, "time_constant", math.inf)).isfinite().any()),
                shortcut=residual is not None and added is None,
            )

        return hook

    def _pass_on(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found = self._spikes_in(inputs[0])
        if found is None:
            return
        numbers, scale = found
        if isinstance(module, nn.AvgPool2d):
            size = module.kernel_size
            scale *= size * size if isinstance(size, int) else size[0] * size[1]
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            scale *= inputs[0][0, 0].numel() / output[0, 0].numel()
        self._mark(output, scale, None if numbers is inputs[0] else module.forward(numbers))

    def _add(self, name: str):
        def hook(module: Add, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
            known = [self._spikes_in(x) for x in inputs]
            if any(found is None for found in known):
                self.sizes[name] = LayerSize.of(module, output[0].numel(), output[0].numel(), "values")
                return
            (x, x_scale), (y, y_scale) = known
            if x is inputs[0] and y is inputs[1] and x_scale == y_scale:
                self._mark(output, x_scale)
            else:
                # As where a converted network's layers each have a value of their own.
                self._mark(output, 1.0, module.forward(x * x_scale, y * y_scale))

        return hook

    def _count_operations(self, name: str):
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0]
            context = self.student.network.time
            found = self._spikes_in(x)
            constant = x.shape[0] == context.batch and self.timesteps > 1
            source = "spikes" if found is not None else "constant" if constant else "values"
            # The last of a run's time chunks may be a single step, which does not show whether its input is constant.
            size = self.sizes.setdefault(name, LayerSize.of(layer, x[0].numel(), output[0].numel(), source))
            if found is not None:
                numbers, scale = found
                fanout = self._fanout_of(layer, x, output)
                # Summed over channels first, so that nothing of the feature's size is made.
                by_pixel = context.unfold(numbers).sum(2, dtype=torch.float64)
                self._count(self.spikes_in, name)[self._now] += scale * by_pixel.flatten(1).sum(1).cpu()
                if by_pixel.ndim == 2:
                    by_pixel = by_pixel[..., None]
                by_image = scale * (by_pixel * fanout).flatten(2).sum(2).cpu()
                self.batch_additions[self._now] += by_image
                self._count(self.additions, name)[self._now] += by_image.sum(1)
                return
            multiply_additions = multiply_additions_of(layer, output)
            count = self._count(self.multiply_additions, name)
            if size.source == "values":
                count[self._now] += multiply_additions / context.steps
            elif context.start == 0:
                count[0] += multiply_additions

        return hook

    def _count_product(self, name: str):
        def hook(module: Product, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
            known = [self._spikes_in(x) for x in inputs]
            real = any(found is None for found in known)
            self.sizes[name] = LayerSize.of(
                module, inputs[0][0].numel(), output[0].numel(), "values" if real else "spikes"
            )
            if real:
                count = multiply_additions_of(module, output)
                self._count(self.multiply_additions, name)[self._now] += count / self.student.network.time.steps
                return
            # Spikes of each head at each pixel, [T, B, heads, pixels].
            queries, keys, values = (
                scale * self.student.network.time.unfold(x).unflatten(2, (module.heads, -1)).sum(3, dtype=torch.float64)
                for x, scale in known
            )
            # A spike of a key is added up for each value's that it meets, then a row of them for each query's.
            met = (keys * values).flatten(2).sum(2) + queries.flatten(2).sum(2) * (output.shape[1] // module.heads)
            by_image = met.cpu()
            read = sum(x.flatten(1).sum(1) for x in (queries, keys, values))
            self._count(self.spikes_in, name)[self._now] += read.cpu()
            self.batch_additions[self._now] += by_image
            self._count(self.additions, name)[self._now] += by_image.sum(1)

        return hook

    def _count(self, counts: dict[str, Tensor], name: str) -> Tensor:
        return counts.setdefault(name, torch.zeros(self.timesteps, dtype=torch.float64))

    def _fanout_of(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Connections that each input of a layer has: [H, W] for a convolution, [] for a linear layer."""
        if isinstance(layer, nn.Linear):
            return torch.tensor(float(layer.out_features), dtype=torch.float64, device=x.device)
        key = (id(layer), x.shape[-2:])
        if key not in self._fanout:
            # The transposed convolution of ones counts, at each input, the outputs that read it.
            ones = torch.ones(1, 1, *output.shape[-2:], dtype=torch.float64, device=x.device)
            kernel = torch.ones(1, 1, *layer.kernel_size, dtype=torch.float64, device=x.device)
            options = {"stride": layer.stride, "dilation": layer.dilation}
            reads = F.conv_transpose2d(ones, kernel, **options)
            # PyTorch's own padding of each side, last dimension first; layer.padding may be a word.
            left, _, top, _ = layer._reversed_padding_repeated_twice
            height, width = x.shape[-2:]
            # A stride may leave the last rows unread; they count zero.
            reads = F.pad(reads, (0, max(0, left + width - reads.shape[-1]), 0, max(0, top + height - reads.shape[-2])))
            reads = reads[0, 0, top : top + height, left : left + width]
            self._fanout[key] = reads * (layer.out_channels // layer.groups)
        return self._fanout[key]

    def _by_step(self, x: Tensor) -> Tensor:
        """Sum over everything but time: [T*B, ...] -> [T], in fp64 on the CPU."""
        x = self.student.network.time.unfold(x)
        sums = x.flatten(1).sum(1, dtype=torch.float64).cpu()
        steps = self.student.network.time.steps
        return sums if len(sums) == steps else sums.repeat(steps)

    @property
    def _now(self) -> slice:
        """The steps that the current pass makes; all of them unless the run is in time chunks."""
        context = self.student.network.time
        return slice(context.start, context.start + context.steps)

    def join(self) -> None:
        """Take in what the other processes have counted of their images."""
        counts = ("spikes", "additions", "multiply_additions", "spikes_in")
        own = {name: getattr(self, name) for name in ("images", *counts)}
        first = {name: step.cpu() for name, step in self.first.items()}
        every = processes.all_gather({**own, "first": first, "sizes": self.sizes})
        self.images = sum(part["images"] for part in every)
        for name in counts:
            setattr(self, name, merge_by_name([part[name] for part in every], torch.add))
        self.first = merge_by_name([part["first"] for part in every], torch.minimum)
        self.sizes = {name: size for part in every for name, size in part["sizes"].items()}

    def after(self, steps: int) -> dict[str, Any]:
        """Firing rates, silent fractions, energy and memory accesses of a run of the first `steps` steps."""
        spikes = {name: float(count[:steps].sum()) for name, count in self.spikes.items()}
        neurons = {name: first.numel() for name, first in self.first.items()}
        silent = {name: int((first >= steps).sum()) for name, first in self.first.items()}
        operations = {
            kind: {name: float(count[:steps].sum()) / self.images for name, count in counts.items()}
            for kind, counts in (("additions", self.additions), ("multiply_additions", self.multiply_additions))
        }
        pj = dict.fromkeys([*operations["multiply_additions"], *operations["additions"]], 0.0)
        for kind, each in (("additions", PJ_ADD), ("multiply_additions", PJ_MULTIPLY_ADD)):
            for name, count in operations[kind].items():
                pj[name] += each * count
        total = max(1, sum(neurons.values()))
        layers = self.layers(steps)
        return {
            "firing_rate": sum(spikes.values()) / (steps * self.images * total),
            "firing_rate_by_layer": {name: spikes[name] / (steps * self.images * neurons[name]) for name in spikes},
            "silent": sum(silent.values()) / total,
            "silent_by_layer": {name: silent[name] / neurons[name] for name in silent},
            "energy_uj": 1e-6 * sum(pj.values()),
            "energy_uj_by_layer": {name: 1e-6 * value for name, value in pj.items()},
            "operations": {kind: sum(counts.values()) for kind, counts in operations.items()},
            "energy_with_memory": in_each_precision(layers),
            "memory_accesses": memory_accesses(layers),
        }

    def layers(self, steps: int) -> dict[str, LayerTraffic]:
        """What each layer does for an image in a run of the first `steps` steps, in the order of the network."""

        def mean(counts: dict[str, Tensor], name: str) -> float:
            return float(counts[name][:steps].sum()) / self.images if name in counts else 0.0

        found = {}
        for name, size in self.sizes.items():
            spikes = [mean(counts, name) for counts in (self.spikes_in, self.additions, self.spikes)]
            rest = always(size, mean(self.multiply_additions, name), steps)
            found[name] = LayerTraffic(size, by_spikes(size, *spikes), rest)
        return found

    def energy_by_image(self) -> Tensor:
        """Energy in µJ of the first 1, 2, ..., T steps of each image of the current batch, [T, B]."""
        analog = sum(self.multiply_additions.values(), torch.zeros(self.timesteps, dtype=torch.float64)) / self.images
        pj = PJ_ADD * self.batch_additions + PJ_MULTIPLY_ADD * analog[:, None]
        return 1e-6 * pj.cumsum(0)


def merge_by_name(parts: Sequence[dict[str, Tensor]], how: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: reduce(how, [part[name] for part in parts if name in part]) for name in names}


@torch.no_grad()
def dense_operations(run: Callable[[Tensor], Any], image: tuple[int, int, int], device: torch.device) -> float:
    """Multiply-additions of all convolutions and linear layers for one image, as if no value were 0.

    Args:
        run: what takes the image, as a teacher or a student's `steps`.
        image: C, H, W.
        device: where it runs.
    """
    with FlopCounterMode(display=False) as flops:
        run(torch.zeros(1, *image, device=device))
    return flops.get_total_flops() / 2


def teacher_energy_uj(teacher: Teacher, image: tuple[int, int, int]) -> float:
    """Energy of the teacher's multiply-additions for one image, in µJ; an operation count, without memory access."""
    return 1e-6 * PJ_MULTIPLY_ADD * dense_operations(teacher, image, next(teacher.parameters()).device)
