"""The energy of an attention map on the CPU: a few images at a time, in place, while they are in cache."""

import torch
from torch import Tensor

from lasnn.kernels.cpu.neuron import BLOCK
from lasnn.kernels.layout import empty_step, empty_steps, state_dtype


def magnitude_to_power_(x: Tensor, power: float) -> Tensor:
    """|x|^power, in place."""
    if power == 2:
        return x.mul_(x)
    return x.abs_() if power == 1 else x.abs_().pow_(power)


def slope_(x: Tensor, power: float) -> Tensor:
    """Derivative of |x|^power, in place; +1 at 0 for power 1."""
    if power == 2:
        return x.mul_(2)
    sign = torch.ge(x, 0, out=torch.empty_like(x)).mul_(2 * power).sub_(power)
    return sign if power == 1 else x.abs_().pow_(power - 1).mul_(sign)


def batches(x: Tensor) -> list[slice]:
    """The batch in slices whose step fits in cache."""
    count = max(1, BLOCK * torch.get_num_threads() // max(1, x.shape[2:].numel()))
    return [slice(start, start + count) for start in range(0, x.shape[1], count)]


def mean_step(x: Tensor, out: Tensor) -> Tensor:
    """Mean over time of x [T, ...] into `out`, in the state's type."""
    out.copy_(x[0])
    for step in x[1:]:
        out.add_(step)
    return out.div_(len(x)) if len(x) > 1 else out


def attention_forward(x: Tensor, power: float, temporal: str) -> Tensor:
    """The energy f: [B, H, W], or [T, B, H, W] for "step"."""
    steps, batch, _, height, width = x.shape
    dtype = state_dtype(x.dtype)
    f = torch.empty((steps if temporal == "step" else 1, batch, height, width), dtype=dtype)
    if x.numel() == 0:
        return f.zero_() if temporal == "step" else f.zero_()[0]
    for part in batches(x):
        xs = x[:, part]
        scratch = empty_step(xs, dtype)
        if temporal == "rate":
            torch.sum(magnitude_to_power_(mean_step(xs, scratch), power), 1, out=f[0, part])
            continue
        total = None
        for t, step in enumerate(xs):
            energy = magnitude_to_power_(scratch.copy_(step), power)
            if temporal == "step":
                torch.sum(energy, 1, out=f[t, part])
            else:
                total = energy.clone() if total is None else total.add_(energy)
        if temporal == "map":
            torch.sum(total.div_(steps), 1, out=f[0, part])
    return f if temporal == "step" else f[0]


def attention_backward(grad: Tensor, x: Tensor, power: float, temporal: str) -> Tensor:
    """Gradient of x, in its memory order; for "rate" one step of it, [1, ...], since all are equal."""
    steps, dtype = len(x), state_dtype(x.dtype)
    grad_x = empty_steps(x, 1 if temporal == "rate" else steps, x.dtype)
    if x.numel() == 0:
        return grad_x
    for part in batches(x):
        xs = x[:, part]
        scratch = empty_step(xs, dtype)
        if temporal == "rate":
            slope = slope_(mean_step(xs, scratch), power)
            grad_x[0, part].copy_(slope.mul_(grad[part].unsqueeze(1).div(steps)))
            continue
        for t, step in enumerate(xs):
            slope = slope_(scratch.copy_(step), power)
            g = grad[t, part] if temporal == "step" else grad[part].div(steps)
            grad_x[t, part].copy_(slope.mul_(g.unsqueeze(1)))
    return grad_x
