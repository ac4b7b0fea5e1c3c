"""What a spiking network does on images: accuracy, firing rate and operations, after every time step.

Shapes: T time steps, B batch, C channels, H x W pixels, K classes.
"""

import math
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lasnn import distributed
from lasnn.data import Batches, Images
from lasnn.errors import MachineError
from lasnn.network import NormSpike, Student, Teacher
from lasnn.random import generator

# Energy of one 32-bit operation in a 45 nm process, in pJ (Horowitz, ISSCC 2014), as SNN papers count it.
PJ_ADD = 0.9
PJ_MULTIPLY_ADD = 4.6
# Of the calibration error, as in Guo et al. (ICML 2017).
CONFIDENCE_BINS = 15

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
        # The step at which each neuron first spiked, on any image; `timesteps` where it never did.
        self.first: dict[str, Tensor] = {}
        # Of each layer, by step.
        self.additions: dict[str, Tensor] = {}
        self.multiply_additions: dict[str, Tensor] = {}
        # Additions of all layers for each step and image of the current batch, [T, B].
        self.batch_additions = torch.zeros(timesteps, 0, dtype=torch.float64)
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
                hook = self._count_operations(name)
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
        if clock.start == 0:
            # A run that is made in pieces sees its images in each of them.
            self.images += clock.batch
            self.batch_additions = torch.zeros(self.timesteps, clock.batch, dtype=torch.float64)
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
            fired = self.student.network.clock.unfold(spikes).detach().ne(0).any(1)
            step = torch.where(fired.any(0), fired.int().argmax(0) + self._now.start, self.timesteps)
            self.first[name] = torch.minimum(self.first.get(name, step), step)
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

    def _count_operations(self, name: str):
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0]
            clock = self.student.network.clock
            spikes = self._spikes_per_one(x)
            if spikes is not None:
                fanout = self._fanout_of(layer, x, output)
                # Summed over channels first, so that nothing of the feature's size is made.
                by_pixel = clock.unfold(x).sum(2, dtype=torch.float64)
                if by_pixel.ndim == 2:
                    by_pixel = by_pixel[..., None]
                by_image = spikes * (by_pixel * fanout).flatten(2).sum(2).cpu()
                self.batch_additions[self._now] += by_image
                self._count(self.additions, name)[self._now] += by_image.sum(1)
                return
            multiply_additions = output.numel() * layer.weight[0].numel()
            count = self._count(self.multiply_additions, name)
            if x.shape[0] != clock.batch:
                count[self._now] += multiply_additions / clock.steps
            elif clock.start == 0:
                count[0] += multiply_additions

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
        x = self.student.network.clock.unfold(x)
        sums = x.flatten(1).sum(1, dtype=torch.float64).cpu()
        steps = self.student.network.clock.steps
        return sums if len(sums) == steps else sums.repeat(steps)

    @property
    def _now(self) -> slice:
        """The steps that the current pass makes; all of them unless the run is made in pieces."""
        clock = self.student.network.clock
        return slice(clock.start, clock.start + clock.steps)

    def join(self) -> None:
        """Take in what the other processes have counted of their images."""
        counts = ("spikes", "additions", "multiply_additions")
        own = {name: getattr(self, name) for name in ("images", *counts)}
        every = distributed.gathered({**own, "first": {name: step.cpu() for name, step in self.first.items()}})
        self.images = sum(part["images"] for part in every)
        for name in counts:
            setattr(self, name, _merged([part[name] for part in every], torch.add))
        self.first = _merged([part["first"] for part in every], torch.minimum)

    def after(self, steps: int) -> dict[str, Any]:
        """Firing rates, silent fractions and energy of a run of the first `steps` steps."""
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
        return {
            "firing_rate": sum(spikes.values()) / (steps * self.images * total),
            "firing_rate_by_layer": {name: spikes[name] / (steps * self.images * neurons[name]) for name in spikes},
            "silent": sum(silent.values()) / total,
            "silent_by_layer": {name: silent[name] / neurons[name] for name in silent},
            "energy_uj": 1e-6 * sum(pj.values()),
            "energy_uj_by_layer": {name: 1e-6 * value for name, value in pj.items()},
            "operations": {kind: sum(counts.values()) for kind, counts in operations.items()},
        }

    def energy_by_image(self) -> Tensor:
        """Energy in µJ of the first 1, 2, ..., T steps of each image of the current batch, [T, B]."""
        analog = sum(self.multiply_additions.values(), torch.zeros(self.timesteps, dtype=torch.float64)) / self.images
        pj = PJ_ADD * self.batch_additions + PJ_MULTIPLY_ADD * analog[:, None]
        return 1e-6 * pj.cumsum(0)


def _merged(parts: Sequence[dict[str, Tensor]], how: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: reduce(how, [part[name] for part in parts if name in part]) for name in names}


class Tally:
    """Right and wrong answers after a number of steps, as they come in batch by batch."""

    def __init__(self, classes: int):
        # Rows are the true classes, columns the answers.
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        # Answers, sum of their confidence, right ones.
        self.bins = torch.zeros(3, CONFIDENCE_BINS, dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits [B, K] and labels [B]."""
        confidence, answer = logits.softmax(-1).max(-1)
        labels, answer, confidence = labels.cpu(), answer.cpu(), confidence.cpu()
        self.confusion += (
            (labels * len(self.confusion) + answer).bincount(minlength=self.confusion.numel()).view_as(self.confusion)
        )
        # A bin holds its upper end, as in the paper.
        bins = (confidence * CONFIDENCE_BINS).ceil().long().clamp(1, CONFIDENCE_BINS) - 1
        for row, weights in zip(self.bins, (torch.ones_like(confidence), confidence, answer == labels), strict=True):
            row.index_add_(0, bins, weights.double())

    def __add__(self, other: "Tally") -> "Tally":
        both = Tally(len(self.confusion))
        both.confusion, both.bins = self.confusion + other.confusion, self.bins + other.bins
        return both

    def result(self) -> dict[str, Any]:
        """Accuracy, by class too (None for a class without images), calibration error and confusion."""
        images, right = self.confusion.sum(1), self.confusion.diagonal()
        _, confidence, correct = self.bins
        return {
            "accuracy": int(right.sum()) / int(images.sum()),
            "accuracy_by_class": [
                int(r) / int(n) if n else None for r, n in zip(right.tolist(), images.tolist(), strict=True)
            ],
            "calibration_error": float((confidence - correct).abs().sum() / images.sum()),
            "confusion": self.confusion.tolist(),
        }


class Exit:
    """Early exit: an image is done at the first step after which the student's confidence is at least `threshold`.

    The steps after it are not counted, though they were made: accuracy and energy are those of a run that stops.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.images = self.correct = self.steps = 0
        self.energy_uj = 0.0

    def add(self, mean_logits: Tensor, labels: Tensor, energy_uj: Tensor) -> None:
        """Count a batch: logits [T, B, K], the mean of the first 1 to T steps; labels [B]; energy [T, B]."""
        confidence, answer = mean_logits.softmax(-1).max(-1)
        sure = confidence >= self.threshold
        sure[-1] = True
        last = sure.int().argmax(0)[None]
        self.images += len(labels)
        self.correct += int((answer.gather(0, last)[0] == labels).sum())
        self.steps += int(last.sum()) + len(labels)
        self.energy_uj += float(energy_uj.gather(0, last.cpu()).sum())

    def __add__(self, other: "Exit") -> "Exit":
        both = Exit(self.threshold)
        for name in ("images", "correct", "steps", "energy_uj"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def result(self) -> dict[str, float]:
        """Threshold, mean steps used, accuracy, energy an image."""
        return {
            "threshold": self.threshold,
            "mean_steps": self.steps / self.images,
            "accuracy": self.correct / self.images,
            "energy_uj": self.energy_uj / self.images,
        }


@torch.no_grad()
def measure(
    student: Student,
    images: Images,
    timesteps: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    draw: int = 0,
    early_exit: float | None = None,
    watch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> list[dict[str, Any]]:
    """Accuracy, firing rate and energy of a student at each of several T.

    With a causal encoder one pass of the longest run serves all: the logits after t steps are those of a run of t.

    Args:
        student: in eval mode.
        images: test images, on the student's device.
        timesteps: the values of T.
        batch_size: images a batch.
        seed: keys the encoder's random numbers.
        draw: further random numbers of the same seed, for an encoder that draws.
        early_exit: stop an image as soon as the largest class probability reaches this; for causal encoders.
        watch: called with each batch of each run: the mean logits of its first 1 to T steps [T, B, K], the labels [B]
            and the energy in µJ of these steps [T, B].

    Returns:
        One dict for each T, in the order given: `timesteps`, `images`, `accuracy` (a fraction), `accuracy_by_class`,
        `calibration_error` (expected, 15 bins), `confusion` (rows: true classes), `firing_rate` (spikes per neuron and
        step), `silent` (the fraction of neurons that spike on no image) and both by layer, `energy_uj` (per image; also
        by layer), `operations` (per image), with `early_exit` also `exit`: its `threshold`, `mean_steps`, `accuracy`
        and `energy_uj`.

    Raises:
        ValueError: `early_exit` with an encoder that is not causal.
        MachineError: the spikes are not finite numbers.
    """
    causal = student.encoder.causal
    if early_exit is not None and not causal:
        raise ValueError("early exit needs a causal encoder")
    results: dict[int, dict[str, Any]] = {}
    for longest in [max(timesteps)] if causal else sorted(set(timesteps)):
        steps = sorted(set(timesteps)) if causal else [longest]
        student.timesteps = longest
        tallies: dict[int, Tally] = {}
        exits = {} if early_exit is None else {t: Exit(early_exit) for t in steps}
        with Counter(student, longest) as counter:
            for index, batch, labels, place in _batches(images, batch_size):
                logits, _ = student.steps(batch, generator=_draws(seed, index, batch.device, draw), **place)
                counted = torch.arange(1, longest + 1, device=batch.device)[:, None, None]
                means = logits.float().cumsum(0) / counted
                for t in steps:
                    tallies.setdefault(t, Tally(logits.shape[-1])).add(means[t - 1], labels)
                energy = counter.energy_by_image() if exits or watch else None
                for t, early in exits.items():
                    early.add(means[:t], labels, energy[:t])
                if watch is not None:
                    watch(means, labels, energy)
        counter.join()
        every = distributed.gathered((tallies, exits))
        tallies = _merged([part for part, _ in every], add)
        exits = _merged([part for _, part in every], add)
        total = counter.after(longest)["firing_rate"]
        if not math.isfinite(total):
            raise MachineError("the student's spikes are not finite numbers: its training diverged; lower the rate")
        for t in steps:
            results[t] = {
                "timesteps": t,
                "images": len(images),
                **tallies[t].result(),
                **counter.after(t),
                **({"exit": exits[t].result()} if exits else {}),
            }
    return [results[t] for t in timesteps]


def _draws(seed: int, index: int, device: torch.device, draw: int = 0) -> torch.Generator:
    """The random numbers of a batch in evaluation; draw 0 is that of the training's own evaluations."""
    return generator(seed, "evaluate", index, *([draw] if draw else []), device=device)


@torch.no_grad()
def accuracy(student: Student, images: Images, *, batch_size: int, seed: int) -> float:
    """Fraction of the images that the student classifies correctly at its T; the same draws as `measure`."""
    correct = 0
    for index, batch, labels, place in _batches(images, batch_size):
        logits, _ = student.steps(batch, generator=_draws(seed, index, batch.device), **place)
        correct += int((logits.float().sum(0).argmax(-1) == labels).sum())
    return sum(distributed.gathered(correct)) / len(images)


@torch.no_grad()
def teacher_accuracy(teacher: Teacher, images: Images, *, batch_size: int) -> float:
    """Fraction of the images that the teacher classifies correctly."""
    batches = _batches(images, batch_size)
    correct = sum(int((teacher(batch).argmax(-1) == labels).sum()) for _, batch, labels, _ in batches)
    return sum(distributed.gathered(correct)) / len(images)


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


@torch.no_grad()
def speed(run: Callable[[Tensor], Any], images: Images, *, batch_size: int, seconds: float = 0.4) -> dict[str, float]:
    """How fast a network is on this machine, nothing else running.

    Args:
        run: what takes images [B, C, H, W] in [0, 1].
        images: those that are run, on the network's device.
        batch_size: images a batch, for the throughput and the memory.
        seconds: how long the throughput, and then the latency, is measured for, at least one run each.

    Returns:
        `images_per_second`; `latency_ms`, the median at batch 1; `peak_memory_mib` during one batch: what PyTorch had
        allocated on a GPU, otherwise the memory of this whole process.
    """
    cuda = images.device.type == "cuda"

    def timed(batch: Tensor) -> float:
        begin = time.perf_counter()
        run(batch)
        if cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - begin

    batches = [
        batch for batch, _ in Batches(_first(images, 4 * batch_size), batch_size, seed=0, epoch=0, shuffle=False)
    ]
    forget_peak(images.device)
    timed(batches[0])
    memory = peak_memory(images.device)
    done, spent = 0, 0.0
    while spent < seconds:
        for batch in batches:
            spent += timed(batch)
            done += len(batch)
            if spent >= seconds:
                break
    one, latencies = batches[0][:1], []
    timed(one)
    while sum(latencies) < seconds and len(latencies) < 100:
        latencies.append(timed(one))
    return {
        "images_per_second": done / spent,
        "latency_ms": 1e3 * statistics.median(latencies),
        "peak_memory_mib": memory / 2**20,
    }


def _first(images: Images, count: int) -> Images:
    """The first images, on the device, whether all are resident or not."""
    count = min(count, len(images))
    [(pixels, labels)] = images.batches([torch.arange(count)])
    return Images(pixels, labels)


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            # A container may forbid it: the peak is then that of the process so far, which the bound still holds for.
            return


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that PyTorch had allocated, otherwise the most that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    # macOS counts bytes, other systems kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _batches(images: Images, batch_size: int) -> Iterator[tuple[int, Tensor, Tensor, dict[str, int]]]:
    """Number, images and labels of each batch in order; where processes share it, which of its images they are."""
    batches = Batches(images, batch_size, seed=0, epoch=0, shuffle=False, share=distributed.share)
    for index, (batch, labels) in enumerate(batches):
        total = batches.images_in(index)
        if len(labels) == total:
            yield index, batch, labels, {}
        elif len(labels):
            yield index, batch, labels, {"first": distributed.share(total).start, "total": total}
