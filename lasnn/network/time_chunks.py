"""Training over a long T in the memory of a few steps: chunks of time that are computed again in the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lasnn.kernels import BatchStatistics, pool_statistics, update_running_statistics
from lasnn.network.time import TimeContext


def recompute(module: nn.Module, time: TimeContext, function: Callable, *inputs):
    """`function(*inputs)`, computed again in the backward pass instead of keeping what is in between.

    What layers draw of their own accord is drawn alike, and the batch norms of `module`, which the function runs,
    update their running statistics in the first pass alone.
    """

    @contextmanager
    def second_pass() -> Iterator[None]:
        with keep_running_statistics(module), time.collect_statistics():
            yield

    return checkpoint(function, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), second_pass()))


@contextmanager
def keep_running_statistics(module: nn.Module) -> Iterator[list[_BatchNorm]]:
    """Within the block the batch norms that train update copies of their running statistics, which are then dropped.

    Yields these batch norms.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
    names = ("running_mean", "running_var", "num_batches_tracked")
    kept = [[getattr(norm, name) for name in names] for norm in norms]
    for norm, values in zip(norms, kept, strict=True):
        for name, value in zip(names, values, strict=True):
            setattr(norm, name, value.clone())
    try:
        yield norms
    finally:
        for norm, values in zip(norms, kept, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(norm, name, value)


@contextmanager
def pool_running_statistics(module: nn.Module, time: TimeContext) -> Iterator[None]:
    """The running statistics are updated once, at the end, by those of all passes in the block together.

    As if all their elements had been normalised at once: the variance within the passes and that between them.
    """
    with ExitStack() as stack:
        norms = stack.enter_context(keep_running_statistics(module))
        collected = stack.enter_context(time.collect_statistics())

        def collect(norm: _BatchNorm, inputs: tuple[Tensor, ...], _: object) -> None:
            """Of a norm that is not a unit's, as a shortcut's: its running statistics are these at a momentum of 1."""
            count = inputs[0].numel() // inputs[0].shape[1] if getattr(norm, "group", None) is None else norm.count
            mean, unbiased = norm.running_mean.double(), norm.running_var.double()
            batch = BatchStatistics(mean.clone(), unbiased * ((count - 1) / count), count)
            collected.setdefault(norm, []).append(batch)

        for norm in norms:
            stack.callback(norm.register_forward_hook(collect).remove)
            stack.callback(setattr, norm, "momentum", norm.momentum)
            norm.momentum = 1.0
        yield
    for norm, batches in collected.items():
        update_running_statistics(norm, pool_statistics(batches))


def even_chunks(timesteps: int, most: int) -> tuple[int, int]:
    """T in chunks of at most `most` steps, as even as can be: how many, and how long (the last may be shorter)."""
    count = -(-timesteps // most)
    return count, -(-timesteps // count)
