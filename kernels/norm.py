"""Batch norm over the batch of several processes.

Shapes: N images of this process, C channels, H x W pixels, P processes.
"""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lasnn.kernels import ops
from lasnn.kernels.layout import memory_format


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
        statistics, count = merged(ops.norm_statistics(y.detach()), y.numel() // y.shape[1], self.group)
        self.count = count
        if self.running_mean is not None:
            mean, var = updated(self, statistics, count)
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
            self.num_batches_tracked.add_(1)
        return _Normalise.apply(y, self.weight, self.bias, statistics, self.eps, self.group)


def updated(norm: nn.BatchNorm2d, statistics: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
    """`norm`'s running mean and variance after a batch, by nn.BatchNorm2d's rule: the variance over n - 1."""
    mean, var = statistics.to(norm.running_mean.dtype)
    momentum = norm.momentum
    if momentum is None:
        momentum = 1 / (norm.num_batches_tracked + 1).to(mean.dtype)
    return (
        torch.lerp(norm.running_mean, mean, momentum),
        torch.lerp(norm.running_var, var * (count / (count - 1)), momentum),
    )


def merged(statistics: Tensor, count: int, group: "dist.ProcessGroup") -> tuple[Tensor, Tensor]:
    """Mean and variance (over n) of all processes' elements together, [2, C], and how many they are, [].

    Weighted by n (Chan, Golub & LeVeque, The American Statistician 37, 1983), in fp64; equal on all processes.

    Args:
        statistics: those of this process's `count` elements of a channel, [2, C]; anything where it has none.
    """
    own = _counted(statistics, count)
    every = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(every, own, group=group)
    every = torch.stack(every)
    n, mean, var = every[:, :1], *every[:, 1:].unflatten(1, (2, -1)).unbind(1)
    mean, var = (torch.where(n > 0, value, 0.0) for value in (mean, var))
    share = n / n.sum()
    middle = (share * mean).sum(0)
    spread = (share * (var + (mean - middle).square())).sum(0)
    return torch.stack([middle, spread]).to(statistics.dtype), n.sum()


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


class NormLif(torch.autograd.Function):
    """`ops.norm_lif` where mean and variance are those of a group's images."""

    @staticmethod
    def forward(ctx, *inputs_and_group):
        *inputs, group = inputs_and_group
        spikes, borders = ops.norm_lif(*inputs)
        ops.norm_lif_setup_context(ctx, inputs, (spikes, borders))
        ctx.mean_over = partial(mean_over, group=group)
        ctx.mark_non_differentiable(borders)
        return spikes, borders

    @staticmethod
    def backward(ctx, *gradients):
        return *ops.norm_lif_gradient(ctx, *gradients), None
