"""How fast a network is on this machine, and how much memory it takes."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lasnn.data import Batches, Images


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
