"""What a spiking network does on images: accuracy, firing rate and operations, after every time step.

Shapes: T time steps, B batch, K classes.
"""

import math
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lasnn.data import Batches, Images
from lasnn.errors import MachineError
from lasnn.network import NormSpike, Student, Teacher
from lasnn.random import generator

# Energy of one 32-bit operation in a 45 nm process, in pJ (Horowitz, ISSCC 2014), as SNN papers count it.
PJ_ADD = 0.9
PJ_MULTIPLY_ADD = 4.6

POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.AdaptiveMaxPool2d)
SAME = (nn.Identity, nn.Flatten, nn.Dropout)


class Counter:
    """Counts spikes and synaptic operations in forward passes, by hooks that live as long as the `with` block.

    A layer fed by spikes costs one addition for each connection that a spike meets; connections that end in the
    padding do not exist. An average pool is linear: a spike that enters it costs what it would cost in the layer
    behind the pool. A layer fed by anything else costs its multiply-additions, once where its input is constant in
    time and T times where it is not.
    """

    def __init__(self, student: Student, timesteps: int):
        self.student = student
        self.timesteps = timesteps
        self.images = 0
        self.spikes: dict[str, Tensor] = {}
        self.neurons: dict[str, int] = {}
        self.additions = torch.zeros(timesteps, dtype=torch.float64)
        self.multiply_additions = torch.zeros(timesteps, dtype=torch.float64)
        # How many spikes a value of 1 stands for, by the identity of the tensors of the current pass. The reference
        # is weak, so that features are freed as ever; it also tells a tensor from a later one with the same identity.
        self._marked: dict[int, tuple[float, weakref.ref]] = {}
        self._fanout: dict[tuple, Tensor] = {}
        self._hooks: list = []

    def __enter__(self) -> "Counter":
        network = self.student.network
        self._hooks.append(network.stem.register_forward_pre_hook(self._enter))
        for name, module in network.named_modules():
            if isinstance(module, NormSpike):
                hook = self._count_spikes(name)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                hook = self._count_operations
            elif isinstance(module, (*POOLS, *SAME)):
                hook = self._pass_on
            else:
                continue
            self._hooks.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._marked.clear()
        clock = self.student.network.clock
        # A run that is made in pieces sees its images in each of them.
        self.images += clock.batch if clock.start == 0 else 0
        if getattr(self.student.encoder, "spiking", False):
            self._mark(inputs[0], 1.0)

    def _mark(self, x: Tensor, spikes_per_one: float) -> None:
        self._marked[id(x)] = (spikes_per_one, weakref.ref(x))

    def _spikes_per_one(self, x: Tensor) -> float | None:
        """How many spikes a value of 1 in `x` stands for; None where `x` is not made of spikes."""
        scale, reference = self._marked.get(id(x), (None, None))
        return scale if reference is not None and reference() is x else None

    def _count_spikes(self, name: str):
        def hook(unit: NormSpike, _: object, spikes: Tensor) -> None:
            # A converted network's spikes carry their layer's threshold, and count as one.
            spikes_per_one = 1 / getattr(unit.neuron, "amplitude", 1.0)
            count = self.spikes.setdefault(name, torch.zeros(self.timesteps, dtype=torch.float64))
            count[self._now] += spikes_per_one * self._by_step(spikes)
            self.neurons[name] = spikes[0].numel()
            self._mark(spikes, spikes_per_one)

        return hook

    def _pass_on(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        scale = self._spikes_per_one(inputs[0])
        if scale is None:
            return
        if isinstance(module, nn.AvgPool2d):
            size = module.kernel_size
            scale *= size * size if isinstance(size, int) else size[0] * size[1]
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            scale *= inputs[0][0, 0].numel() / output[0, 0].numel()
        self._mark(output, scale)

    def _count_operations(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        spikes = self._spikes_per_one(x)
        if spikes is not None:
            fanout = self._fanout_of(layer, x, output)
            # Summed over images and channels first, so that nothing of the feature's size is made.
            by_pixel = self.student.network.clock.unfold(x).sum((1, 2), dtype=torch.float64)
            if by_pixel.ndim == 1:
                by_pixel = by_pixel[:, None]
            self.additions[self._now] += spikes * (by_pixel * fanout).flatten(1).sum(1).cpu()
            return
        weight = layer.weight[0].numel()
        clock = self.student.network.clock
        if x.shape[0] != clock.batch:
            self.multiply_additions[self._now] += output.numel() * weight / clock.steps
        elif clock.start == 0:
            self.multiply_additions[0] += output.numel() * weight

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
        x = self.student.network.clock.unfold(x)
        sums = x.flatten(1).sum(1, dtype=torch.float64).cpu()
        steps = self.student.network.clock.steps
        return sums if len(sums) == steps else sums.repeat(steps)

    @property
    def _now(self) -> slice:
        """The steps that the current pass makes; all of them unless the run is made in pieces."""
        clock = self.student.network.clock
        return slice(clock.start, clock.start + clock.steps)

    def after(self, steps: int) -> dict[str, Any]:
        """Firing rates and energy of a run of the first `steps` steps."""
        rates = {
            name: float(count[:steps].sum()) / (steps * self.images * self.neurons[name])
            for name, count in self.spikes.items()
        }
        spikes = sum(float(count[:steps].sum()) for count in self.spikes.values())
        additions = float(self.additions[:steps].sum()) / self.images
        multiply_additions = float(self.multiply_additions[:steps].sum()) / self.images
        return {
            "firing_rate": spikes / (steps * self.images * max(1, sum(self.neurons.values()))),
            "firing_rate_by_layer": rates,
            "energy_uj": 1e-6 * (PJ_ADD * additions + PJ_MULTIPLY_ADD * multiply_additions),
            "operations": {"additions": additions, "multiply_additions": multiply_additions},
        }


@torch.no_grad()
def measure(
    student: Student, images: Images, timesteps: Sequence[int], *, batch_size: int, seed: int
) -> list[dict[str, Any]]:
    """Accuracy, firing rate and energy of a student at each of several T.

    With a causal encoder one pass of the longest run serves all: the logits after t steps are those of a run of t.

    Args:
        student: in eval mode.
        images: test images, on the student's device.
        timesteps: the values of T.
        batch_size: images a batch.
        seed: keys the encoder's random numbers.

    Returns:
        One dict for each T, in the order given: `timesteps`, `images`, `accuracy` (a fraction), `firing_rate` (spikes
        per neuron and step), `firing_rate_by_layer`, `energy_uj` (per image), `operations` (per image).

    Raises:
        MachineError: the spikes are not finite numbers.
    """
    causal = student.encoder.causal
    results: dict[int, dict[str, Any]] = {}
    for longest in [max(timesteps)] if causal else sorted(set(timesteps)):
        steps = sorted(set(timesteps)) if causal else [longest]
        student.timesteps = longest
        correct = torch.zeros(longest, dtype=torch.int64)
        with Counter(student, longest) as counter:
            for index, (batch, labels) in enumerate(_batches(images, batch_size, seed)):
                draws = generator(seed, "evaluate", index, device=batch.device)
                logits, _ = student.steps(batch, generator=draws)
                after = logits.float().cumsum(0)
                correct += reduce((after.argmax(-1) == labels).long(), "t b -> t", "sum").cpu()
        total = counter.after(longest)["firing_rate"]
        if not math.isfinite(total):
            raise MachineError("the student's spikes are not finite numbers: its training diverged; lower the rate")
        for t in steps:
            results[t] = {
                "timesteps": t,
                "images": len(images),
                "accuracy": int(correct[t - 1]) / len(images),
                **counter.after(t),
            }
    return [results[t] for t in timesteps]


@torch.no_grad()
def accuracy(student: Student, images: Images, *, batch_size: int, seed: int) -> float:
    """Fraction of the images that the student classifies correctly at its T; the same draws as `measure`."""
    correct = 0
    for index, (batch, labels) in enumerate(_batches(images, batch_size, seed)):
        draws = generator(seed, "evaluate", index, device=batch.device)
        logits, _ = student.steps(batch, generator=draws)
        correct += int((logits.float().sum(0).argmax(-1) == labels).sum())
    return correct / len(images)


@torch.no_grad()
def teacher_accuracy(teacher: Teacher, images: Images, *, batch_size: int) -> float:
    """Fraction of the images that the teacher classifies correctly."""
    batches = _batches(images, batch_size, 0)
    return sum(int((teacher(batch).argmax(-1) == labels).sum()) for batch, labels in batches) / len(images)


@torch.no_grad()
def teacher_energy_uj(teacher: Teacher, image: tuple[int, int, int]) -> float:
    """Energy of the teacher's multiply-additions for one image, in µJ; an operation count, without memory access."""
    device = next(teacher.parameters()).device
    with FlopCounterMode(display=False) as flops:
        teacher(torch.zeros(1, *image, device=device))
    return 1e-6 * PJ_MULTIPLY_ADD * flops.get_total_flops() / 2


@torch.no_grad()
def images_per_second(student: Student, images: Images, *, batch_size: int, seconds: float = 1.0) -> float:
    """Throughput of inference at the student's T, nothing else running: after one batch to warm up, for `seconds`."""
    cuda = images.device.type == "cuda"
    done, start = 0, None
    while True:
        for batch, _ in _batches(images, batch_size, 0):
            student.steps(batch)
            if cuda:
                torch.cuda.synchronize()
            if start is None:
                start = time.perf_counter()
                continue
            done += len(batch)
            spent = time.perf_counter() - start
            if spent >= seconds:
                return done / spent


def _batches(images: Images, batch_size: int, seed: int) -> Batches:
    return Batches(images, batch_size, seed=seed, epoch=0, shuffle=False)
