"""Batch norm, an optional residual and LIF on the CPU: what is normalised goes through its steps while in cache."""

import numpy as np
import torch
from torch import Tensor

from lasnn.kernels.cpu import neuron, threads
from lasnn.kernels.dynamics import Dynamics
from lasnn.kernels.layout import empty_images, memory_format, segments, state_dtype


def cut(y: Tensor, images: int, width: int) -> neuron.Cut:
    """How `images` of y lie in memory, in lines of at most `width` elements."""
    channels, pixels = y.shape[1], y.shape[2:].numel()
    if memory_format(y) is torch.channels_last:
        return neuron.Cut.of(images * pixels, 1, channels, width)
    return neuron.Cut.of(images, pixels, channels, width)


def affine(statistics: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """Mean, 1 / deviation, scale and bias, each [C]."""
    mean, var = statistics
    rstd = (var + eps).rsqrt()
    return mean, rstd, rstd if weight is None else weight * rstd, torch.zeros_like(mean) if bias is None else bias


def norm_statistics(y: Tensor) -> Tensor:
    """Mean and variance over n of each channel, [2, C], in one read: sums about a pivot that is near the mean."""
    dtype, channels = state_dtype(y.dtype), y.shape[1]
    if y.numel() == 0:
        return torch.zeros((2, channels), dtype=dtype)
    loop = neuron.loops()
    lines = cut(y, len(y), loop.WIDE)
    parts = lines.parts(1)
    pivot = y[:1].to(dtype).mean((0, 2, 3)).numpy()
    sums, numbers = np.zeros((parts, 2, channels)), (parts, *lines, y.data_ptr())

    def work(first: int, last: int) -> None:
        loop.moments(first, last, numbers, pivot, sums.reshape(-1), neuron.like(y.dtype), neuron.scratch(dtype))

    threads.run(work, parts, lines.size)
    # Values that are no numbers pass through in silence, as in PyTorch.
    with np.errstate(all="ignore"):
        mean, square = sums.sum(0) / (y.numel() // channels)
        return torch.from_numpy(np.stack([mean + pivot, square - mean * mean])).to(dtype)


def norm_lif_forward(
    y: Tensor,
    residual: Tensor | None,
    v0: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    learnt_decay: Tensor | None,
    count: int,
    eps: float,
    timesteps: int,
    constant: bool,
    return_state: bool,
    *options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes, v_last or nothing, the state at the start of every segment of time but the first)."""
    dtype = state_dtype(y.dtype)
    batch = len(y) if constant else len(y) // timesteps
    spikes = empty_images(y, timesteps * batch, y.dtype)
    v_last = empty_images(y, batch, dtype) if return_state else y.new_empty(0, dtype=dtype)
    saved_states = empty_images(y, (segments(timesteps)[0] - 1) * batch, dtype)
    if y.numel():
        lines = cut(y, batch, neuron.loops().LINE)
        mean, _, scale, bias = affine(statistics, weight, bias, eps)
        neuron.forward(
            lines,
            timesteps,
            Dynamics(*options),
            torch.cat([mean, scale, bias]).numpy(),
            y,
            0 if constant else lines.size,
            residual,
            v0,
            learnt_decay,
            spikes,
            v_last if return_state else None,
            saved_states,
        )
    return spikes, v_last, saved_states


def norm_lif_sums(
    grad_spikes: Tensor | None,
    grad_v_last: Tensor | None,
    y: Tensor,
    residual: Tensor | None,
    v0: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    learnt_decay: Tensor | None,
    saved_states: Tensor,
    write: bool,
    eps: float,
    timesteps: int,
    constant: bool,
    *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sums of g and of g*z by channel, g, the gradients of v0 and of the learnt decay)."""
    dtype = state_dtype(y.dtype)
    batch = len(y) if constant else len(y) // timesteps
    g = empty_images(y, len(y), y.dtype) if write else y.new_empty(0)
    grad_v0 = y.new_empty(0, dtype=dtype) if v0 is None else empty_images(y, batch, dtype)
    sums, grad_decay = np.zeros((2, y.shape[1])), 0.0
    if y.numel():
        lines = cut(y, batch, neuron.loops().LINE)
        mean, rstd, scale, bias = affine(statistics, weight, bias, eps)
        sums, grad_decay = neuron.backward(
            lines,
            timesteps,
            Dynamics(*options),
            torch.cat([mean, scale, bias]).numpy(),
            y,
            0 if constant else lines.size,
            residual,
            v0,
            learnt_decay,
            saved_states,
            grad_spikes,
            lines.size,
            grad_v_last,
            constant,
            g if write else None,
            None if v0 is None else grad_v0,
            True,
        )
        with np.errstate(all="ignore"):
            sums[1] *= rstd.numpy()
    grad_decay = y.new_full(() if learnt_decay is not None else (0,), grad_decay, dtype=dtype)
    return torch.from_numpy(sums).to(dtype), g, grad_v0, grad_decay


def norm_lif_grad(
    grad_spikes: Tensor | None,
    grad_v_last: Tensor | None,
    y: Tensor,
    v0: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    learnt_decay: Tensor | None,
    saved_states: Tensor,
    means: Tensor | None,
    eps: float,
    timesteps: int,
    *options,
) -> Tensor:
    """y's gradient, through a g of its own."""
    _, g, _, _ = norm_lif_sums(
        grad_spikes,
        grad_v_last,
        y,
        None,
        v0,
        statistics,
        weight,
        bias,
        learnt_decay,
        saved_states,
        True,
        eps,
        timesteps,
        False,
        *options,
    )
    norm_grad_(g, y, statistics, weight, means, eps)
    return g


def norm_grad(
    grad: Tensor, y: Tensor, statistics: Tensor, weight: Tensor | None, means: Tensor | None, eps: float
) -> Tensor:
    """y's gradient, weight / deviation * (g - mean of g - z * mean of g*z)."""
    grad_y = empty_images(y, len(y), y.dtype)
    norm_grad_into(grad_y, grad, y, statistics, weight, means, eps)
    return grad_y


def norm_grad_(
    grad: Tensor, y: Tensor, statistics: Tensor, weight: Tensor | None, means: Tensor | None, eps: float
) -> None:
    """The same in the place of g."""
    norm_grad_into(grad, grad, y, statistics, weight, means, eps)


def norm_grad_into(grad_y, grad, y, statistics, weight, means, eps) -> None:
    if y.numel() == 0:
        return
    dtype, loop = state_dtype(y.dtype), neuron.loops()
    mean, rstd, scale, _ = affine(statistics, weight, None, eps)
    # mean of g + z * mean of g*z, as slope * y + offset
    slope = torch.zeros_like(mean) if means is None else rstd * means[1]
    offset = torch.zeros_like(mean) if means is None else means[0] - mean * slope
    parameters = torch.cat([slope, scale, offset]).numpy()
    lines = cut(y, len(y), loop.WIDE)
    parts = lines.parts(1)
    numbers = (parts, *lines, grad.data_ptr(), y.data_ptr(), int(means is not None), grad_y.data_ptr())

    def work(first: int, last: int) -> None:
        loop.norm_backward(first, last, numbers, parameters, neuron.like(y.dtype), neuron.scratch(dtype))

    threads.run(work, parts, lines.size)
