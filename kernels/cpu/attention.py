"""The energy of an attention map on the CPU."""

import torch
from torch import Tensor

from lasnn.kernels.cpu import neuron, threads
from lasnn.kernels.layout import empty_steps, in_order, memory_format, state_dtype, step_strides


def ordered(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """x with steps that are contiguous or channels_last, itself where they are; and which of the two."""
    order = memory_format(x[0])
    if order is None:
        x, order = x.contiguous(), torch.contiguous_format
    return in_order(x, step_strides(x)), order


def cut(x: Tensor, order: torch.memory_format) -> neuron.Cut:
    """How a step of x [T, B, C, H, W] lies in memory."""
    _, batch, channels, height, width = x.shape
    if order is torch.channels_last:
        return neuron.Cut.of(batch * height * width, 1, channels, neuron.loops().LINE)
    return neuron.Cut.of(batch, height * width, channels, neuron.loops().LINE)


def attention_forward(x: Tensor, power: float, temporal: str) -> Tensor:
    """The energy f: [B, H, W], or [T, B, H, W] for "step"."""
    steps, batch, _, height, width = x.shape
    dtype = state_dtype(x.dtype)
    f = torch.zeros((steps if temporal == "step" else 1, batch, height, width), dtype=dtype)
    if x.numel():
        loop = neuron.loops()
        x, order = ordered(x)
        lines = cut(x, order)
        parts = min(batch if order is torch.contiguous_format else lines.groups, lines.parts(steps))
        # Each step alone is a run of one.
        for xs, out in zip(x.split(1), f, strict=True) if temporal == "step" else ((x, f),):
            given = (len(xs), xs.data_ptr(), xs.stride(0), int(temporal == "rate"), out.data_ptr())

            def work(first: int, last: int, numbers=(parts, *lines, *given)) -> None:
                loop.energy(first, last, numbers, power, neuron.like(x.dtype), neuron.scratch(dtype))

            threads.run(work, parts, lines.size * len(xs))
    return f if temporal == "step" else f[0]


def attention_backward(grad: Tensor, x: Tensor, power: float, temporal: str) -> Tensor:
    """Gradient of x, in its memory order; for "rate" one step of it, [1, ...], since all are equal."""
    steps, dtype = len(x), state_dtype(x.dtype)
    grad_x = empty_steps(x, 1 if temporal == "rate" else steps, x.dtype)
    if x.numel() == 0:
        return grad_x
    loop = neuron.loops()
    xs, order = ordered(x)
    out = grad_x if memory_format(x[0]) is order else torch.empty(grad_x.shape, dtype=x.dtype)
    lines = cut(xs, order)
    parts = lines.parts(steps)
    each = temporal == "step"
    for step, f, into in zip(xs.split(1), grad, out.split(1), strict=True) if each else ((xs, grad, out),):
        f = f.contiguous()
        given = (len(step), step.data_ptr(), step.stride(0), int(temporal == "rate"), f.data_ptr(), into.data_ptr())

        def work(first: int, last: int, numbers=(parts, *lines, *given)) -> None:
            loop.energy_backward(first, last, numbers, power, neuron.like(x.dtype), neuron.scratch(dtype))

        threads.run(work, parts, lines.size * len(step))
    return grad_x if out is grad_x else grad_x.copy_(out)
