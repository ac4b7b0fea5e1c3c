"""One run in several processes, as torchrun starts them. In one process every function here is a plain no-op.

torchrun tells a process by environment variables which one it is. The main process, number 0, is the one that writes
and prints. What the processes tell each other about the run goes over the CPU (gloo), so that it does not wait for a
GPU; gradients and batch norms' statistics go over NCCL on GPUs.
"""

import atexit
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasnn.errors import UserError

T = TypeVar("T")

# Longer than any download or evaluation that one process does while others wait: it ends what hangs.
TIMEOUT = timedelta(hours=2)

# Where processes leave word for each other, beside the process group.
_store: "dist.Store | None" = None


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def restarted() -> bool:
    """Whether torchrun has started the processes again after one failed (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def join() -> None:
    """Join the processes that torchrun started, once, until the program ends; on GPUs each process takes its own.

    Raises:
        UserError: there are more processes on this machine than GPUs, or the environment is only half torchrun's.
    """
    global _store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is set, but {', '.join(missing)} not; start several processes with torchrun")
    store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # After a restart the store may be the one that the processes before left their addresses in.
    _store = dist.PrefixStore(f"lasnn-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    local, gpus = _local_rank(), torch.cuda.device_count()
    if gpus:
        if local >= gpus:
            raise UserError(f"{local_count()} processes but {gpus} GPUs on this machine; --nproc-per-node {gpus}")
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)


def launcher() -> list[str]:
    """The words that start lasnn as this process was started."""
    if world_size() == 1:
        return ["lasnn"]
    nodes = ["--nnodes", str(world_size() // local_count())] if world_size() != local_count() else []
    return ["torchrun", *nodes, "--nproc-per-node", str(local_count()), "-m", "lasnn"]


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_count() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def broadcast_from_main(function: Callable[[], T]) -> T:
    """What `function` returns in the main process, which alone calls it."""
    if world_size() == 1:
        return function()
    box = [function() if is_main() else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def broadcast_parameters(module: nn.Module) -> None:
    """Give `module` the main process's parameters and buffers."""
    if world_size() > 1:
        for value in module.state_dict().values():
            dist.broadcast(value, src=0)


def all_gather(value: T) -> list[T]:
    """Every process's value, in their order; tensors in it must be on the CPU."""
    if world_size() == 1:
        return [value]
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, value)
    return every


def all_reduce_max(*values: int) -> list[int]:
    """The highest of all processes' values, each for itself; no GPU is waited for."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of all processes' tensors."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def gather_images(x: Tensor, total: int, dim: int = 0) -> Tensor:
    """All processes' images along `dim`, `total` of them, of which this process has its `local_slice`.

    Its gradient is summed over the processes, all of which run its backward pass: where each computes the same loss of
    all images, and DistributedDataParallel averages what the parameters get of it, they have its gradient.
    """
    return x if world_size() == 1 else _GatherImages.apply(x, total, dim)


class _GatherImages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, total: int, dim: int) -> Tensor:
        ctx.total, ctx.dim = total, dim
        counts = [len(range(total)[local_slice(total, number)]) for number in range(world_size())]
        # A collective wants one size; at most one image is added.
        shape = list(x.shape)
        shape[dim] = max(counts)
        own = x.new_zeros(shape)
        own.narrow(dim, 0, x.shape[dim]).copy_(x)
        every = [torch.empty_like(own) for _ in counts]
        dist.all_gather(every, own)
        return torch.cat([one.narrow(dim, 0, count) for one, count in zip(every, counts, strict=True)], dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        summed = all_reduce_sum(gradient.contiguous())
        own = range(ctx.total)[local_slice(ctx.total)]
        return summed.narrow(ctx.dim, own.start, len(own)), None, None


def barrier() -> None:
    """Return once all processes are here."""
    all_reduce_max(0)


@contextmanager
def main_process_context(context: AbstractContextManager[T]) -> Iterator[T]:
    """Enter `context` in the main process alone; every process gets what it yields."""
    with ExitStack() as stack:
        yield broadcast_from_main(lambda: stack.enter_context(context))


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process go first, then one on each other machine, then the rest: what they find on disk is whole."""
    turn = 0 if is_main() else 1 if _local_rank() == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(turn, 2):
        barrier()


def local_slice(count: int, number: int | None = None) -> slice:
    """Which of `count` things, as a batch's images, are this process's, or that of a number; they differ by one at
    most.
    """
    number = rank() if number is None else number
    return slice(number * count // world_size(), (number + 1) * count // world_size())


def reports_failure(text: str) -> bool:
    """Whether this process is the one to tell the user of a failure: the first that fails.

    The others fail because of it, or in the same way. `text` is what torchrun's own report will show.
    """
    if _store is None:
        return True
    # The others may not come to take leave, and the process ends anyway.
    atexit.unregister(dist.destroy_process_group)
    try:
        first = _store.add("failed", 1) == 1
    except RuntimeError:
        # Its keeper is gone, and was not able to speak.
        first = True
    if first and (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        report = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with open(file, "w", encoding="utf-8") as report_file:
            json.dump(report, report_file)
    return first


def connection_lost(error: BaseException) -> bool:
    """Whether an error is of the connection between the processes, as when one of them was killed."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
