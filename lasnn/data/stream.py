"""Images that do not fit the device: they stay in memory or on disk, and batches come to the device ahead of their use.

Worker processes gather or decode the next batches, pinned memory lets their copy run beside the computation. What is
streamed is what would have been resident, byte for byte: order and augmentation are those of `Batches`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lasnn import processes
from lasnn.data.dataset import Images
from lasnn.data.workers import Source, read_ahead, read_now
from lasnn.errors import UserError

# Of the memory that is free: the rest is for activations, which need most of it.
SHARE = 0.5


class InMemory:
    """Images in the host's memory."""

    def __init__(self, images: Images):
        self.images = images
        self.labels = images.labels
        self.shape = images.shape

    def read(self, chosen: Sequence[int]) -> Tensor:
        return self.images.pixels[list(chosen)]

    def fingerprint(self) -> str:
        return self.images.fingerprint()


class Streamed:
    """Images that come to the device batch by batch; it stands in for `Images`.

    Args:
        source: where they are.
        device: where the batches shall be.
        workers: processes that read ahead; 0 reads when a batch is needed.
    """

    def __init__(self, source: Source, device: torch.device, workers: int):
        self.source = source
        self.device = device
        self.workers = workers
        self.labels = source.labels
        self.shape = source.shape

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def batches(self, chosen: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels uint8 [b, C, H, W] and labels [b] of each of several choices of images, on the device.

        Raises:
            UnreadableBatch: an image cannot be read (any more).
            BatchLost: the machine failed, or a worker was killed.
        """
        pinned = self.device.type == "cuda"
        ahead = read_ahead(self.source, [index.tolist() for index in chosen], self.workers, pinned)
        with closing(ahead):
            for pixels, labels in ahead:
                yield pixels.to(self.device, non_blocking=pinned), labels.to(self.device, non_blocking=pinned)


def place(
    splits: Sequence[Images | Source], device: torch.device, *, residence: str, workers: int, copies: int = 0
) -> tuple[list[Images | Streamed], str]:
    """Put the splits of a data set on the device if they fit, otherwise stream them.

    Args:
        residence: "auto" keeps them on the device if they take at most half of its free memory; "device", "stream".
        copies: of how many further images there will be room needed.

    Returns:
        The splits, and a line that says what was chosen and why.

    Raises:
        UserError: an image cannot be read any more, or a source of the user's own fails.
        MachineError: the machine failed to read one.
    """
    needed = sum(prod(split.shape) for split in splits) + copies * prod(splits[0].shape[1:])
    free = free_bytes(device)
    size = f"{needed / 2**20:,.0f} MiB of images, {free / 2**20:,.0f} MiB free on {device}"
    if residence == "device" or (residence == "auto" and needed <= SHARE * free):
        why = "" if residence == "auto" else ', as data.residence = "device" says'
        return [_resident(split).to(device) for split in splits], f"images   on the device{why} ({size})"
    why = f", as more than {SHARE:.0%} would be taken" if residence == "auto" else ', as data.residence = "stream" says'
    streamed = [Streamed(InMemory(split) if isinstance(split, Images) else split, device, workers) for split in splits]
    return streamed, f"images   streamed by {workers} worker processes{why} ({size})"


def _resident(split: Images | Source) -> Images:
    """Images in memory; those of a source are known by its fingerprint, as they are where they are streamed."""
    if isinstance(split, Images):
        return split
    keys = split.keys() if hasattr(split, "keys") else None
    return Images(read_now(split, range(len(split.labels))), split.labels, split.fingerprint(), keys)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, to each process that is on it; on a CPU what the system says is available, or
    the limit of a container or batch job leaves.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min([available, *limits_left()]) // processes.local_count()


def limits_left(mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes that the memory limit of each control group (Linux, version 2) around this process leaves."""
    try:
        [inside] = [line.removeprefix("0::/") for line in own.read_text().splitlines() if line.startswith("0::/")]
    except (OSError, ValueError):
        return
    group = mounted / inside
    for folder in (group, *group.parents):
        try:
            limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
            # Pages of files are given back when they are needed.
            lines = (folder / "memory.stat").read_text().splitlines()
            cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        except (OSError, ValueError):
            # No limit ("max"), or no such group.
            continue
        yield max(0, limit - used + cached)


def check_labels(labels: Tensor, classes: int, what: str) -> None:
    """Check that labels are from 0 to `classes` - 1.

    Raises:
        UserError: they are not.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(f"{what} labels run from {low} to {high}; {classes} classes")
