"""Spikes and synaptic operations of a spiking network, counted while it runs.

Shapes: T time steps, B batch, C channels. T and B are folded into the leading dimension, as in the network.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode, flop_registry

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
from lasnn.evaluation.signals import Signal, SignalTrace, absolute_if_signed, tensors_of
from lasnn.network.student import TIME_CHUNK, Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import Add, NormSpike, Product, residual_of

# Energy of one 32-bit operation in a 45 nm process, in pJ (Horowitz, ISSCC 2014), as SNN papers count it.
PJ_ADD = 0.9
PJ_MULTIPLY_ADD = 4.6

# Where a layer's operation has its input and its weight, in one or the other order, and its bias.
LAYERS = {"convolution": (0, 1, 2), "mm": (0, 1, None), "bmm": (0, 1, None), "addmm": (1, 2, 0), "baddbmm": (1, 2, 0)}


class OperationCounter:
    """Counts spikes and synaptic operations in the forward passes of a `with` block.

    A layer fed by spikes costs one addition for each connection that a spike meets; connections that end in the
    padding do not exist. An average pool is linear: a spike that enters it costs what it would cost in the layer
    behind the pool. A sum of spikes, where a shortcut adds them, is so many spikes, and one of -1 counts as one of 1.
    In a product of queries, keys and values a key's spike costs one for each value's spike of its head and pixel, a
    query's one for each of the head's channels. A layer fed by anything else costs its multiply-additions, once where
    its input is constant in time and T times where it is not; currents that a shortcut carries and adds cost nothing
    until a layer reads them.

    Layers are convolutions and products with a matrix, whether a module computes them or a function; one without a
    module of its own is called after its weight. `notes` has, by layer, what could not be told: which operation made
    real values of the spikes that it would have read, that it is a product charged as one of real values, or that it
    was not counted.
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
        # The part of additions and spikes_in that the encoder's spikes cause, whatever the neurons do.
        self.additions_of_encoder: dict[str, Tensor] = {}
        self.spikes_in_of_encoder: dict[str, Tensor] = {}
        self.sizes: dict[str, LayerSize] = {}
        # Additions of all layers for each step and image of the current batch, [T, B].
        self.batch_additions = torch.zeros(timesteps, 0, dtype=torch.float64)
        self.notes: dict[str, str] = {}
        self._trace = SignalTrace(student.network, self)
        # How often what has no name of its own was met in the current pass, by what it is called after.
        self._met: dict[str, int] = {}
        self._reach: dict[tuple, Tensor] = {}
        self._hooks: list = []

    def __enter__(self) -> "OperationCounter":
        network, trace = self.student.network, self._trace
        self._hooks.append(network.stem.register_forward_pre_hook(self._enter))
        for name, module in network.named_modules():
            self._hooks.append(module.register_forward_pre_hook(trace.enter(name)))
            # Before and after all other hooks.
            self._hooks.append(module.register_forward_hook(trace.pause, prepend=True))
            if isinstance(module, NormSpike):
                self._hooks.append(module.register_forward_hook(self._count_spikes(name), with_kwargs=True))
            elif isinstance(module, Product):
                self._hooks.append(module.register_forward_hook(self._count_product(name)))
            self._hooks.append(module.register_forward_hook(trace.leave, always_call=True))
        trace.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._trace.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _enter(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._met.clear()
        context, images = self.student.network.time, inputs[0]
        if context.start == 0:
            # A run in time chunks sees its images in each of them.
            self.images += context.batch
            self.batch_additions = torch.zeros(self.timesteps, context.batch, dtype=torch.float64)
        # The last of a run's time chunks may be a single step, which does not show whether its input is constant.
        constant = self.timesteps > 1 and len(images) == context.batch
        constant = constant and (context.steps > 1 or getattr(self.student.encoder, "constant", False))
        if getattr(self.student.encoder, "spiking", False):
            self._trace.signals[images] = Signal(constant, 1.0, absolute_if_signed(images), encoded=True)
        else:
            self._trace.signals[images] = Signal(constant)

    def _spikes_in(self, x: Tensor) -> tuple[Tensor, float] | None:
        """Numbers of x's shape, and how many spikes a 1 of them stands for; None where x is not made of spikes."""
        signal = self._trace.signals.get(x)
        if signal is None or signal.spikes_per_one is None:
            return None
        return x if signal.numbers is None else signal.numbers, signal.spikes_per_one

    def _count_spikes(self, name: str):
        def hook(unit: NormSpike, inputs: tuple[Tensor, ...], named: dict[str, Tensor], spikes: Tensor) -> None:
            # A converted network's spikes carry their layer's threshold, and count as one.
            amplitude, emitted = getattr(unit.neuron, "amplitude", 1.0), spikes
            if isinstance(amplitude, Tensor):
                # Each channel's carry a value of their own.
                amplitude, numbers = 1.0, spikes.detach().ne(0).to(spikes.dtype)
            else:
                numbers = absolute_if_signed(spikes)
            spikes = spikes if numbers is None else numbers
            spikes_per_one = 1 / amplitude
            count = self.spikes.setdefault(name, torch.zeros(self.timesteps, dtype=torch.float64))
            count[self._now] += spikes_per_one * self._by_step(spikes)
            fired = self.student.network.time.unfold(spikes).detach().ne(0).any(1)
            step = torch.where(fired.any(0), fired.int().argmax(0) + self._now.start, self.timesteps)
            self.first[name] = torch.minimum(self.first.get(name, step), step)
            self._trace.signals[emitted] = Signal(False, spikes_per_one, numbers)
            residual = residual_of(inputs, named)
            added = None if residual is None else self._spikes_in(residual)
            if added is not None:
                read = added[1] * self._by_step(added[0])
                self._count(self.spikes_in, name)[self._now] += read
                if self._trace.signals[residual].encoded:
                    self._count(self.spikes_in_of_encoder, name)[self._now] += read
            self.sizes[name] = LayerSize(
                "neuron",
                biases=has_bias(unit.norm, spikes),
                outputs=spikes[0].numel(),
                leak=bool(torch.as_tensor(getattr(unit.neuron, "time_constant", math.inf)).isfinite().any()),
                shortcut=residual is not None and added is None,
            )

        return hook

    def count_layer(self, op: Any, name: str, args: tuple, kwargs: dict, output: Any) -> str:
        """Count a convolution, a product with a matrix, or another operation that PyTorch's counter of them knows.

        Returns:
            what its outputs are for people, as of a signal; "" is a current.
        """
        if self._trace.inside(Product):
            # Which is counted as a whole.
            return ""
        signals, context = self._trace.signals, self.student.network.time
        where, module = self._trace.running[-1]
        places = LAYERS.get(name, (0, 1, None))
        x, weight, bias = (None if place is None else (*args, None, None)[place] for place in places)
        both = x in signals and weight in signals
        if name not in LAYERS or both:
            return self._count_unknown(op, name, args, kwargs, output)
        swapped = x not in signals
        x, weight = (weight, x) if swapped else (x, weight)
        if x not in signals:
            # Only the bias, or what it is added to, is a signal.
            return f"{name} in {self._trace.place}"
        signal = signals[x]
        if isinstance(module, _ConvNd | nn.Linear):
            label, bias = where, module.bias
        else:
            label = self._trace.weights.get(weight) or self._numbered(name)
            label = label.removesuffix(".weight")
            bias = None if bias is None or bias in signals else bias
        real = signal.spikes_per_one is None
        rows = context.batch * (1 if signal.constant or len(x) == context.batch else context.steps)
        kernel = math.prod(weight.shape[2:]) if name == "convolution" else 0
        size = LayerSize(
            "convolution" if kernel else "linear",
            # A matrix may have been repeated for each image.
            weights=weight[0].numel() if name in ("bmm", "baddbmm") else weight.numel(),
            biases=0 if bias is None else bias.numel(),
            filters=output.shape[1] * kernel,
            inputs=x.numel() // rows,
            outputs=output.numel() // rows,
            source="spikes" if not real else "constant" if signal.constant else "values",
        )
        if self.sizes.setdefault(label, size).source == "spikes":
            # One that is also fed by real values has to read them.
            self.sizes[label] = replace(self.sizes[label], source=size.source)
        if real:
            if signal.why:
                self.notes[label] = f"fed by real values: {signal.why}"
            # A time chunk of one step does not show that it was written out for all.
            several = context.steps == 1 and self.sizes[label].source == "values"
            self._charge(label, dense(op, name, args, kwargs, output), signal.constant and not several)
        else:
            numbers = x if signal.numbers is None else signal.numbers
            # Summed over channels first, so that nothing of the feature's size is made.
            if kernel:
                reached, channels = self._outputs_reached(x, weight, output, *args[3:9]), 1
            else:
                reached, channels = weight.shape[-2 if swapped else -1], -2 if swapped else -1
            spikes = signal.spikes_per_one * numbers.sum(channels, dtype=torch.float64)
            self._count_additions(label, signal, spikes, spikes * reached)
        return ""

    def _count_unknown(self, op: Any, name: str, args: tuple, kwargs: dict, output: Any) -> str:
        """Charge a product of two signals, or what is not known well enough, as one of real values."""
        label = self._numbered(name)
        known = self._trace.known((*args, *kwargs.values()))
        constant = all(it.constant for it in known)
        context, [first, *_] = self.student.network.time, tensors_of([output])
        rows = context.batch * (1 if constant else context.steps)
        inputs, source = args[0].numel() // rows, "constant" if constant else "values"
        self.sizes[label] = LayerSize("product", inputs=inputs, outputs=first.numel() // rows, source=source)
        what = "a product of two signals" if len(known) > 1 else f"{name} is not known"
        self.notes[label] = f"charged as one of real values: {what}"
        self._charge(label, dense(op, name, args, kwargs, output), constant)
        return f"{name} in {self._trace.place}"

    def _numbered(self, name: str) -> str:
        """What to call an operation of a module that has no name of its own."""
        label = f"{self._trace.running[-1][0]}.{name.strip('_')}".removeprefix(".")
        self._met[label] = self._met.get(label, 0) + 1
        return label if self._met[label] == 1 else f"{label}{self._met[label]}"

    def _charge(self, label: str, multiply_additions: float, constant: bool) -> None:
        context, count = self.student.network.time, self._count(self.multiply_additions, label)
        if not constant:
            count[self._now] += multiply_additions / context.steps
        elif context.start == 0:
            count[0] += multiply_additions

    def _count_additions(self, label: str, signal: Signal, spikes: Tensor, additions: Tensor) -> None:
        """Count the spikes that a layer reads and the additions that they cause, both by place."""
        context = self.student.network.time
        steps = 1 if signal.constant else context.steps
        rows = steps * context.batch
        leading = next((size for size in spikes.shape if size > 1), 1)
        if signal.moved or leading % rows:
            self.notes[label] = "fed by spikes whose step and image cannot be told: spread evenly over both"
            read, by_image = (x.sum().expand(steps, context.batch) / rows for x in (spikes, additions))
        else:
            read, by_image = (x.reshape(steps, context.batch, -1).sum(2) for x in (spikes, additions))
        read, by_image = read.sum(1).cpu(), by_image.cpu()
        self.batch_additions[self._now] += by_image
        self._count(self.spikes_in, label)[self._now] += read
        self._count(self.additions, label)[self._now] += by_image.sum(1)
        if signal.encoded:
            self._count(self.spikes_in_of_encoder, label)[self._now] += read
            self._count(self.additions_of_encoder, label)[self._now] += by_image.sum(1)

    def count_sum(self, output: Tensor, constant: bool) -> None:
        """Note a sum of signals that are not both spikes; it costs nothing until a layer reads it but memory."""
        trace, context = self._trace, self.student.network.time
        where, module = trace.running[-1]
        if len(trace.running) == 1 or trace.inside(NormSpike, Product):
            return
        label = where
        if not isinstance(module, Add):
            label = self._numbered("add")
        outputs = output.numel() // (context.batch * (1 if constant else context.steps))
        self.sizes[label] = LayerSize("sum", inputs=outputs, outputs=outputs, source="values")

    def _count_product(self, name: str):
        def hook(module: Product, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
            known = [self._spikes_in(x) for x in inputs]
            real = any(found is None for found in known)
            if real:
                why = next((it.why for it in self._trace.known(inputs) if it.why), "")
                if why:
                    self.notes[name] = f"fed by real values: {why}"
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

    def _outputs_reached(self, x: Tensor, weight: Tensor, output: Tensor, *options: Any) -> Tensor:
        """Connections that each input of a convolution has, [H, W] of images.

        Args:
            x, weight, output: of the convolution.
            options: its stride, padding, dilation, whether it is transposed, its output padding and groups.
        """
        stride, padding, dilation, transposed, _, groups = options
        key = (x.shape[2:], weight.shape, output.shape[2:], repr(options), x.device)
        if key not in self._reach:
            sides = []
            for number, (size, out, kernel) in enumerate(
                zip(x.shape[2:], output.shape[2:], weight.shape[2:], strict=True)
            ):
                step, pad, apart = (one[number if len(one) > 1 else 0] for one in (stride, padding, dilation))
                # Each weight of the kernel ties an output to an input; transposed, the two have changed places.
                ours, theirs = (size, out) if transposed else (out, size)
                tied = torch.arange(ours)[:, None] * step + torch.arange(kernel) * apart - pad
                exists = (tied >= 0) & (tied < theirs)
                sides.append(exists.sum(1) if transposed else tied[exists].bincount(minlength=theirs))
            channels = weight.shape[1] if transposed else weight.shape[0] // groups
            reached = channels * reduce(lambda a, b: a[..., None] * b, sides)
            self._reach[key] = reached.to(x.device, torch.float64)
        return self._reach[key]

    def _by_step(self, x: Tensor) -> Tensor:
        """Sum over everything but time: [T*B, ...] -> [T], in fp64 on the CPU."""
        x = self.student.network.time.unfold(x.detach())
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
        counts += ("additions_of_encoder", "spikes_in_of_encoder")
        own = {name: getattr(self, name) for name in ("images", *counts)}
        first = {name: step.cpu() for name, step in self.first.items()}
        every = processes.all_gather({**own, "first": first, "sizes": self.sizes, "notes": self.notes})
        self.images = sum(part["images"] for part in every)
        for name in counts:
            setattr(self, name, merge_by_name([part[name] for part in every], torch.add))
        self.first = merge_by_name([part["first"] for part in every], torch.minimum)
        self.sizes = {name: size for part in every for name, size in part["sizes"].items()}
        self.notes = {name: note for part in every for name, note in part["notes"].items()}

    def after(self, steps: int) -> dict[str, Any]:
        """Firing rates, silent fractions, energy and memory accesses of a run of the first `steps` steps.

        `counting_notes` has `notes`.
        """
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
            "counting_notes": dict(self.notes),
        }

    def layers(self, steps: int) -> dict[str, LayerTraffic]:
        """What each layer does for an image in a run of the first `steps` steps, in the order of the network."""

        def mean(counts: dict[str, Tensor], name: str) -> float:
            return float(counts[name][:steps].sum()) / self.images if name in counts else 0.0

        found = {}
        for name, size in self.sizes.items():
            given = [mean(counts, name) for counts in (self.spikes_in_of_encoder, self.additions_of_encoder)]
            read, added = (mean(counts, name) for counts in (self.spikes_in, self.additions))
            rest = always(size, mean(self.multiply_additions, name), steps) + by_spikes(size, *given, 0.0)
            of_neurons = by_spikes(size, read - given[0], added - given[1], mean(self.spikes, name))
            found[name] = LayerTraffic(size, of_neurons, rest)
        return found

    def energy_by_image(self) -> Tensor:
        """Energy in µJ of the first 1, 2, ..., T steps of each image of the current batch, [T, B]."""
        analog = sum(self.multiply_additions.values(), torch.zeros(self.timesteps, dtype=torch.float64)) / self.images
        pj = PJ_ADD * self.batch_additions + PJ_MULTIPLY_ADD * analog[:, None]
        return 1e-6 * pj.cumsum(0)


def merge_by_name(parts: Sequence[dict[str, Tensor]], how: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: reduce(how, [part[name] for part in parts if name in part]) for name in names}


def dense(op: Any, name: str, args: tuple, kwargs: dict, output: Any) -> float:
    """Multiply-additions of an operation as if no value were 0."""
    if op.overloadpacket in flop_registry:
        return flop_registry[op.overloadpacket](*args, **kwargs, out_val=output) / 2
    # Attention that PyTorch does not count, as that of a CPU: each query with all keys, then all values of each.
    return (args[0].numel() + tensors_of([output])[0].numel()) * args[1].shape[-2]


@torch.no_grad()
def dense_operations(run: Callable[[Tensor], Any], image: tuple[int, int, int], device: torch.device) -> float:
    """Multiply-additions of all convolutions and linear layers for one image, as if no value were 0.

    What is the same at each step, as the first layer's current under direct encoding, is counted once, whatever T.

    Args:
        run: what takes the image, as a teacher or a student's `steps`.
        image: C, H, W.
        device: where it runs.
    """

    def count() -> float:
        with FlopCounterMode(display=False) as flops:
            run(torch.zeros(1, *image, device=device))
        return flops.get_total_flops() / 2

    student = getattr(run, "__self__", None)
    if not isinstance(student, Student) or student.timesteps <= TIME_CHUNK:
        return count()
    # A longer run is made in time chunks, each of which computes anew what is the same at each step. What a step adds
    # is the same for all.
    steps = student.timesteps
    try:
        student.timesteps = 1
        first = count()
        student.timesteps = 2
        return first + (steps - 1) * (count() - first)
    finally:
        student.timesteps = steps


def teacher_energy_uj(teacher: Teacher, image: tuple[int, int, int]) -> float:
    """Energy of the teacher's multiply-additions for one image, in µJ; an operation count, without memory access."""
    return 1e-6 * PJ_MULTIPLY_ADD * dense_operations(teacher, image, next(teacher.parameters()).device)
