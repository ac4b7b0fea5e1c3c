"""Batches that are read ahead, in processes of their own or in this one, and every way in which that can fail.

Whatever ends an epoch, the processes end with it: when its iterator is closed or dropped, and at the latest before
Python's own end, which would wait for them. They ignore the signals that ask a run to stop, for the run goes on to the
end of a step: a terminal, a batch system or an init system sends them to every process of a job.
"""

import atexit
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, ClassVar, NoReturn, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lasnn.errors import MachineError, UserError, out_of_memory

# Seconds that workers have to end by themselves; one that decodes, or waits for a dead disk, does not.
GRACE = 1.0
FEWER = "lower data.workers (0 reads without them)"


class Source(Protocol):
    """Images that can be read a few at a time."""

    labels: Tensor
    shape: tuple[int, int, int, int]

    def read(self, chosen: Sequence[int]) -> Tensor:
        """The pixels of some images, uint8 [n, C, H, W], on the CPU."""

    def fingerprint(self) -> str:
        """What tells these images from others, at little cost."""


class BatchFailed(Exception):
    """A batch could not be had: raised where the next one is asked for, so between two steps of a training."""


class UnreadableBatch(BatchFailed, UserError):
    """An image cannot be read (any more), or a source of the user's own fails."""


class BatchLost(BatchFailed, MachineError):
    """The machine failed to bring a batch: its disk, its memory, or a worker process that was killed."""


@dataclass(frozen=True)
class Failure:
    """An error as a value, which crosses from a worker to its run whole and without a stack."""

    problems: tuple[str, ...]
    users: bool = True

    def throw(self) -> NoReturn:
        raise (UnreadableBatch(*self.problems) if self.users else BatchLost("; ".join(self.problems)))


def read(source: Source, chosen: Sequence[int]) -> Tensor | Failure:
    """Some images' pixels, uint8 [n, C, H, W], or why they cannot be had."""
    try:
        pixels = source.read(chosen)
        wanted = (len(chosen), *source.shape[1:])
        if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or tuple(pixels.shape) != wanted:
            found = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
            return Failure((f"{_name(source)} read {found}; it must be torch.uint8 {list(wanted)}",))
        return pixels
    except UserError as error:
        return Failure(error.problems)
    except MachineError as error:
        return Failure((str(error),), users=False)
    except Exception as error:
        if said := out_of_memory(error):
            return Failure((said,), users=False)
        if type(source).__module__.startswith("lasnn."):
            # A mistake of lasnn's own, whose stack is wanted.
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Failure((f"{_name(source)} failed: {reason}{_where(source, error)}",))


def read_now(source: Source, chosen: Sequence[int]) -> Tensor:
    """Some images' pixels, uint8 [n, C, H, W].

    Raises:
        UnreadableBatch: an image cannot be read.
        BatchLost: the machine failed.
    """
    found = read(source, chosen)
    return found.throw() if isinstance(found, Failure) else found


def _name(source: Source) -> str:
    return f"the images' source {type(source).__name__}"


def _where(source: Source, error: BaseException) -> str:
    """The line of the source's own file that an error comes from, as ` (file:line)`; empty if there is none."""
    file = getattr(sys.modules.get(type(source).__module__), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({file}:{lines[-1]})" if lines else ""


class _Choices(Dataset):
    """Whole batches as the items of a data loader; a failure is an item too."""

    def __init__(self, source: Source, chosen: list[list[int]], shared: bool):
        self.source = source
        self.chosen = chosen
        self.shared = shared

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, batch: int) -> tuple[Tensor | Failure, Tensor]:
        index = self.chosen[batch]
        if not index:
            # Another process has them all.
            return torch.empty(0, *self.source.shape[1:], dtype=torch.uint8), self.source.labels[:0]
        pixels, labels = read(self.source, index), self.source.labels[index]
        if isinstance(pixels, Failure) or not self.shared:
            return pixels, labels
        try:
            # Here, not when the batch is sent: an error there is printed by the worker, and the run waits for ever.
            return pixels.share_memory_(), labels.share_memory_()
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            return Failure((f"no shared memory for a batch ({reason}): enlarge /dev/shm, or {FEWER}",), False), labels


def read_ahead(
    source: Source, chosen: Sequence[Sequence[int]], workers: int, pin: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels uint8 [b, C, H, W] and labels [b] of each of several choices of images, on the CPU.

    Args:
        workers: processes that read ahead; 0 reads when a batch is asked for.
        pin: in memory that a GPU can copy from by itself.

    Raises:
        UnreadableBatch: an image cannot be read.
        BatchLost: the machine failed, or a worker was killed.
    """
    choices = _Choices(source, [list(index) for index in chosen], shared=workers > 0)
    loader = DataLoader(
        choices, batch_size=None, num_workers=min(workers, len(choices)), pin_memory=pin, worker_init_fn=_begin_worker
    )
    running = _Running(loader)
    try:
        while (item := running.next()) is not None:
            pixels, labels = item
            if isinstance(pixels, Failure):
                pixels.throw()
            yield pixels, labels
    finally:
        running.end()


class _Running:
    """One pass of a data loader, and its processes."""

    live: ClassVar["WeakSet[_Running]"] = WeakSet()

    def __init__(self, loader: DataLoader):
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if main and hasattr(signal, "SIGCHLD") else None
        self.processes: list[Any] = []
        self.live.add(self)
        try:
            self.batches = iter(loader)
        except OSError as error:
            raise BatchLost(f"the worker processes cannot be started ({error.strerror}): {FEWER}") from error
        finally:
            if before is not None:
                # PyTorch's handler would raise at any line of a step when a worker dies; so it comes to light when the
                # next batch is asked for.
                signal.signal(signal.SIGCHLD, before)
        self.processes = list(getattr(self.batches, "_workers", []))

    def next(self) -> tuple[Any, Tensor] | None:
        """The next item; None after the last."""
        try:
            return next(self.batches, None)
        except (OSError, EOFError, RuntimeError) as error:
            # What the reading itself raises comes as a value, so this is the machinery, or a mistake of lasnn's own.
            if not self.processes or "Original Traceback" in str(error):
                raise
            raise BatchLost(self._lost(error)) from error

    def _lost(self, error: BaseException) -> str:
        if isinstance(error, (OSError, EOFError)):
            # A broken connection can come to light before the end of the process behind it.
            ended = wait([process.sentinel for process in self.processes], timeout=GRACE)
            for process in self.processes:
                if process.sentinel in ended:
                    process.join(GRACE)
        codes = [code for process in self.processes if (code := process.exitcode)]
        if codes:
            how = f"by {signal.Signals(-codes[0]).name}" if codes[0] < 0 else f"with exit code {codes[0]}"
            return (
                f"a worker process that reads images ahead ended {how}: likely the machine's memory, or its shared "
                f"memory (/dev/shm), is full; {FEWER}"
            )
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"the worker processes that read images ahead failed ({reason[:300]}); {FEWER}"

    def end(self) -> None:
        """End the processes, whatever they are doing."""
        self.live.discard(self)
        # PyTorch asks them and waits. Within the grace its thread that fills pinned memory has ended, which would wait
        # for ever for the rest of what a killed process was sending; then there is nothing left to wait for.
        killer = threading.Timer(GRACE, self.kill)
        killer.start()
        try:
            getattr(self.batches, "_shutdown_workers", self.kill)()
        finally:
            killer.cancel()
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            with suppress(OSError, ValueError):
                process.kill()


@atexit.register
def _kill_all() -> None:
    """Before Python waits for the processes: the stack of an error may still hold the iterator that would end them."""
    for running in list(_Running.live):
        running.kill()


def _begin_worker(_: int) -> None:
    """A worker leaves signals to its run, which ends it."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
