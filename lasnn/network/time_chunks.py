"""Training over a long T in the memory of a few steps: chunks of time that are computed again in the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lasnn.kernels.norm import updated


def recompute(module: nn.Module, function: Callable, *inputs, **options):
    """`function(*inputs, **options)`, computed again in the backward pass instead of keeping what is in between.

    What layers draw of their own accord is drawn alike, and the batch norms of `module`, which the function runs,
    update their running statistics in the first pass alone.
    """

    def contexts():
        return nullcontext(), running_statistics_left(module)

    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts, **options)


@contextmanager
def running_statistics_left(module: nn.Module) -> Iterator[list[_BatchNorm]]:
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
def running_statistics_pooled(module: nn.Module) -> Iterator[None]:
    """The running statistics are updated once, at the end, by those of all passes in the block together.

    As if all their elements had been normalised at once: the variance within the passes and that between them.
    """
    passes: dict[_BatchNorm, list[tuple[int, Tensor, Tensor]]] = {}

    def collect(norm: _BatchNorm, inputs: tuple[Tensor, ...], _: object) -> None:
        count = inputs[0].numel() // inputs[0].shape[1] if getattr(norm, "group", None) is None else int(norm.count)
        mean, var = (value.to(torch.float64, copy=True) for value in (norm.running_mean, norm.running_var))
        passes.setdefault(norm, []).append((count, mean, var))

    with running_statistics_left(module) as norms:
        momenta = [norm.momentum for norm in norms]
        hooks = [norm.register_forward_hook(collect) for norm in norms]
        for norm in norms:
            # With a momentum of 1 a pass's running statistics are its own.
            norm.momentum = 1.0
        try:
            yield
        finally:
            for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
                norm.momentum = momentum
                hook.remove()
    for norm, seen in passes.items():
        total = sum(count for count, _, _ in seen)
        middle = sum(count * mean for count, mean, _ in seen) / total
        spread = sum((count - 1) * var + count * (mean - middle).square() for count, mean, var in seen) / total
        mean, var = updated(norm, torch.stack([middle, spread]), total)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.num_batches_tracked.add_(1)


def even_chunks(timesteps: int, most: int) -> tuple[int, int]:
    """T in chunks of at most `most` steps, as even as can be: how many, and how long (the last may be shorter)."""
    count = -(-timesteps // most)
    return count, -(-timesteps // count)
