"""How a step is timed on a CPU and on a GPU, how fast memory is copied, and what a forward pass keeps."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# What a step gets at most, however short it is.
MOST_ROUNDS = 200


class Times(NamedTuple):
    """Milliseconds over `runs` runs: median, 10 % and 90 % quantile; `host`, those in which a GPU's step is issued."""

    median: float
    low: float
    high: float
    runs: int
    host: float | None


def take_turns(
    steps: Mapping[str, Callable[[int], object]], device: torch.device, *, seconds: float, rounds: int
) -> dict[str, Times]:
    """Time steps one after the other, round by round, so that a slow spell of the machine meets all of them.

    Args:
        steps: functions of the round's number, by name.
        device: where they run.
        seconds: how long rounds are begun.
        rounds: how many there are at least.
    """
    for step in steps.values():
        step(0)
    host = {name: issue_ms(step, device) if device.type == "cuda" else None for name, step in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    begun, number = time.perf_counter(), 0
    while number < rounds or (number < MOST_ROUNDS and time.perf_counter() - begun < seconds):
        for name, step in steps.items():
            samples[name].append(gpu_ms(step, number, host[name]) if device.type == "cuda" else cpu_ms(step, number))
        number += 1
    return {name: Times(*quantiles(ms), number, host[name]) for name, ms in samples.items()}


def turns(steps: Mapping[str, Callable[[int], object]], device: torch.device, *, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of whole steps in each round, as a user waits for them: on a GPU its host's part too."""
    samples: dict[str, list[float]] = {name: [] for name in steps}

    def waited(step: Callable[[int], object], number: int) -> None:
        step(number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for number in range(-1, rounds):
        for name, step in steps.items():
            ms = cpu_ms(lambda number, step=step: waited(step, number), number + 1)
            # The first round loads code.
            if number >= 0:
                samples[name].append(ms)
    return samples


def quantiles(ms: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10 % and 90 % quantile."""
    wanted = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    middle, low, high = torch.tensor(ms, dtype=torch.float64).quantile(wanted).tolist()
    return middle, low, high


def cpu_ms(step: Callable[[int], object], number: int) -> float:
    """Milliseconds of one run."""
    begun = time.perf_counter()
    step(number)
    return 1e3 * (time.perf_counter() - begun)


def issue_ms(step: Callable[[int], object], device: torch.device) -> float:
    """Milliseconds that the host needs to issue a step, the least of three."""
    found = []
    for number in range(3):
        torch.cuda.synchronize(device)
        found.append(cpu_ms(step, number))
    torch.cuda.synchronize(device)
    return min(found)


def gpu_ms(step: Callable[[int], object], number: int, host: float) -> float:
    """Milliseconds of one run on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The GPU waits until the host has issued the step; else gaps between launches would count as the kernels' time.
    # 2e6 cycles are a millisecond at 2 GHz.
    torch.cuda._sleep(int(1.5 * host * 2e6))
    start.record()
    step(number)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_gb_per_s(device: torch.device, size: int) -> float:
    """Bandwidth of a copy of `size` bytes in GB/s, read and write counted; the median of the rounds."""
    # Random numbers: a copy of zeros can be faster than that of data.
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    times = take_turns({"copy": lambda _: target.copy_(source)}, device, seconds=0.5, rounds=10)["copy"]
    return 2 * size / times.median / 1e6


def kept_bytes(forward: Callable[[], object]) -> int:
    """Bytes that a forward pass keeps for the backward pass: every storage once, its input included."""
    kept = {}

    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # Held until the end, so that no later tensor takes its address.
        kept[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        forward()
    return sum(storage.nbytes() for storage in kept.values())
