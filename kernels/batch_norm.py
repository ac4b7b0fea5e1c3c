"""Batch norm over the batch of several processes, and what becomes of a batch's statistics.

Shapes: N images of this process, C channels, H x W pixels, P processes.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lasnn.kernels import ops
from lasnn.kernels.layout import memory_format, state_dtype


class BatchStatistics(NamedTuple):
    """What a batch norm has found in a batch: no gradient goes through it.

    Fields:
        mean: [C].
        variance: [C], over n, not n - 1.
        count: n, how many elements a channel has; over a process group a tensor [], which no CPU waits for.
    """

    mean: Tensor
    variance: Tensor
    count: int | Tensor


@torch.no_grad()
def update_running_statistics(norm: nn.BatchNorm2d, batch: BatchStatistics | None) -> None:
    """Update `norm`'s running statistics in place by a training batch's, by nn.BatchNorm2d's rule.

    The running variance takes the batch's over n - 1. A momentum of None averages over all batches alike.

    Args:
        batch: what `norm_lif` returned. None changes nothing, nor does anything where `norm` tracks no statistics.
    """
    if batch is None or norm.running_mean is None:
        return
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:
        momentum = 1 / norm.num_batches_tracked.to(norm.running_mean.dtype)
    unbiased = batch.variance * (batch.count / (batch.count - 1))
    norm.running_mean.lerp_(batch.mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)


def pool_statistics(batches: Sequence[BatchStatistics]) -> BatchStatistics:
    """The statistics of several batches taken as one, as of the time chunks of a run: n-weighted, in fp64.

    The variance is that within the batches and that between their means. A batch without elements counts for nothing,
    whatever its mean and variance.

    Source: Chan, Golub & LeVeque, The American Statistician 37, 1983.
    """
    means, variances, counts = zip(*batches, strict=True)
    mean, variance = torch.stack(means).double(), torch.stack(variances).double()
    n = torch.stack([torch.as_tensor(count, dtype=torch.float64, device=mean.device) for count in counts])[:, None]
    mean, variance = (torch.where(n > 0, value, 0.0) for value in (mean, variance))
    share = n / n.sum()
    pooled_mean = (share * mean).sum(0)
    pooled_variance = (share * (variance + (mean - pooled_mean).square())).sum(0)
    dtype = means[0].dtype
    return BatchStatistics(pooled_mean.to(dtype), pooled_variance.to(dtype), sum(counts))


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that, once `group` is a process group, has the statistics of all its processes' images.

    Forward and backward pass, running statistics and state dict are then those of one process with all the images,
    however they are shared out; a process may have none. (torch's SyncBatchNorm does not run on CPUs.) In evaluation,
    and without a group, it is `torch.nn.BatchNorm2d`. Every process of the group must make each training pass.
    """

    group: "dist.ProcessGroup | None" = None
    # Elements of a channel that all processes together had in the last such pass.
    count: Tensor | int = 0

    def __getstate__(self) -> dict:
        # A process group belongs to its process: copies are without.
        return {name: value for name, value in self.__dict__.items() if name != "group"}

    def forward(self, y: Tensor) -> Tensor:
        if self.group is None or not (self.training or self.running_mean is None):
            return super().forward(y)
        self._check_input_dim(y)
        if memory_format(y) is None:
            y = y.contiguous()
        own = BatchStatistics(*ops.norm_statistics(y.detach()), y.numel() // y.shape[1])
        batch = pool_over_group(own, self.group)
        self.count = batch.count
        update_running_statistics(self, batch)
        return _Normalise.apply(y, self.weight, self.bias, torch.stack(batch[:2]), self.eps, self.group)


def pool_over_group(batch: BatchStatistics, group: "dist.ProcessGroup") -> BatchStatistics:
    """The statistics of all processes' images together, equal on all of them; this process may have none."""
    own = _counted(torch.stack(batch[:2]), batch.count)
    every = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(every, own, group=group)
    dtype = batch.mean.dtype
    pooled = pool_statistics([BatchStatistics(*message[1:].unflatten(0, (2, -1)), message[0]) for message in every])
    return BatchStatistics(pooled.mean.to(dtype), pooled.variance.to(dtype), pooled.count)


def normalised_mean(y: Tensor, norm: nn.BatchNorm2d, batch: BatchStatistics | None, timesteps: int) -> Tensor:
    """The mean over time of what a batch norm makes of y, in the memory of one time step.

    The norm is linear in y once its statistics are known, so that the mean is normalised in the place of each step.
    Gradients are those of the mean of all normalised steps: through the statistics too, of all the group's processes.

    Args:
        y: [T*B, C, H, W] with time outermost; any strides.
        norm: gives weight, bias, eps and, where there is no batch, the running statistics; it is only read.
        batch: y's own statistics, as `norm_lif` returned them; None for the running ones.
        timesteps: T.

    Returns:
        [B, C, H, W], in fp32 (fp64 for fp64).
    """
    state = state_dtype(y.dtype)
    statistics = torch.stack((norm.running_mean, norm.running_var) if batch is None else batch[:2]).to(state)
    weight, bias = (None if p is None else p.to(state) for p in (norm.weight, norm.bias))
    group = None if batch is None else getattr(norm, "group", None)
    return _NormalisedMean.apply(y, weight, bias, statistics, norm.eps, timesteps, batch is not None, group)


def mean_over(sums: Tensor, count: int, group: "dist.ProcessGroup") -> Tensor:
    """The means of what all processes have summed over `count` elements each."""
    total = _counted(sums, count)
    dist.all_reduce(total, group=group)
    return (total[1:] / total[0]).view_as(sums).to(sums.dtype)


def _counted(values: Tensor, count: int) -> Tensor:
    """A count and values as one message, in fp64."""
    first = torch.full((1,), float(count), dtype=torch.float64, device=values.device)
    return torch.cat([first, values.flatten().double()])


class _Normalise(torch.autograd.Function):
    """(y - mean) / sqrt(var + eps) * weight + bias where mean and variance are those of a group's images."""

    @staticmethod
    def forward(ctx, y, weight, bias, statistics, eps, group):
        ctx.save_for_backward(y, weight, bias, statistics)
        ctx.eps, ctx.group = eps, group
        return F.batch_norm(y, *statistics, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx, grad):
        y, weight, bias, statistics = ctx.saved_tensors
        grad = grad.contiguous(memory_format=memory_format(y))
        mean, var = statistics[:, :, None, None]
        g = grad.to(statistics.dtype)
        z = (y.to(statistics.dtype) - mean) * (var + ctx.eps).rsqrt()
        sums = torch.stack([g.sum((0, 2, 3)), (g * z).sum((0, 2, 3))])
        # Every process takes part in the exchange, whether it needs the result or not.
        means = mean_over(sums, y.numel() // y.shape[1], ctx.group)
        grad_y = ops.norm_grad(grad, y, statistics, weight, means, ctx.eps) if ctx.needs_input_grad[0] else None
        grad_weight = None if weight is None else sums[1].to(weight.dtype)
        grad_bias = None if bias is None else sums[0].to(bias.dtype)
        return grad_y, grad_weight, grad_bias, None, None, None


class _NormalisedMean(torch.autograd.Function):
    """mean_t of (y[t] - mean) / sqrt(var + eps) * weight + bias; mean and variance are y's own where `of_batch`."""

    @staticmethod
    def forward(ctx, y, weight, bias, statistics, eps, timesteps, of_batch, group):
        ctx.save_for_backward(y, weight, bias, statistics)
        ctx.eps, ctx.timesteps, ctx.of_batch, ctx.group = eps, timesteps, of_batch, group
        mean = y.unflatten(0, (timesteps, -1)).mean(0, dtype=statistics.dtype)
        return F.batch_norm(mean, *statistics, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx, grad):
        y, weight, bias, statistics = ctx.saved_tensors
        mean, var = statistics[:, :, None, None]
        scale = (var + ctx.eps).rsqrt()
        z = (y.unflatten(0, (ctx.timesteps, -1)).to(grad.dtype) - mean) * scale
        sums = torch.stack([grad.sum((0, 2, 3)), (grad * z.mean(0)).sum((0, 2, 3))])
        g = grad
        if ctx.of_batch:
            count = grad.numel() // grad.shape[1]
            # Every process takes part in the exchange, whether it needs the result or not.
            means = sums / max(count, 1) if ctx.group is None else mean_over(sums, count, ctx.group)
            g = grad - means[0][:, None, None] - z * means[1][:, None, None]
        scale = scale if weight is None else scale * weight[:, None, None]
        grad_y = (g * (scale / ctx.timesteps)).expand_as(z).flatten(0, 1).to(y.dtype)
        grad_weight = None if weight is None else sums[1]
        grad_bias = None if bias is None else sums[0]
        return grad_y, grad_weight, grad_bias, None, None, None, None, None


class NormLif(torch.autograd.Function):
    """`ops.norm_lif` where mean and variance are those of a group's images."""

    @staticmethod
    def forward(ctx, *inputs_and_group):
        *inputs, group = inputs_and_group
        outputs = spikes, v_last, saved_states = ops.norm_lif(*inputs)
        ops.norm_lif_setup_context(ctx, inputs, outputs)
        ctx.mean_over = partial(mean_over, group=group)
        ctx.mark_non_differentiable(saved_states)
        return spikes, v_last, saved_states

    @staticmethod
    def backward(ctx, *gradients):
        return *ops.norm_lif_gradient(ctx, *gradients), None
