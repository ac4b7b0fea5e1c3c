"""Batch norm, an optional residual and LIF on the CPU: a part of the images is normalised, and run, while in cache."""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from lasnn.kernels.cpu.neuron import BLOCK, Dynamics, run, run_backward
from lasnn.kernels.layout import empty_images, memory_format, segments, state_dtype

# Elements a thread gets of a pass that holds a plane or two, not every step's.
WIDE = 4 * BLOCK


class Part:
    """A block of a step of images: whole rows of a channel's pixels, or whole pixels (channels_last)."""

    def __init__(self, shape: tuple[int, ...], channels: slice, last: bool):
        self.shape, self.channels, self.last = shape, channels, last

    def of(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Tensors [C] as they broadcast with the block."""
        parameters = [parameter[self.channels] for parameter in parameters]
        return tuple(parameter if self.last else parameter[:, None] for parameter in parameters)

    def sum(self, block: Tensor) -> Tensor:
        """By channel; over images first, since rows of pixels may be short."""
        if self.last or block.dim() == 3:
            block = block.sum(0)
        return block if self.last else block.sum(-1)


class Images:
    """A step of images [B, C, H, W] cut into parts that stay in cache from the first time step to the last."""

    def __init__(self, y: Tensor, batch: int, block: int = BLOCK):
        self.batch, self.channels, self.pixels = batch, y.shape[1], y.shape[2:].numel()
        self.last = memory_format(y) is torch.channels_last
        image, width = self.channels * self.pixels, block * torch.get_num_threads()
        self.whole = self.last or image <= width
        # How many pixels (channels_last), images or channels of one image a part has.
        self.length = max(1, width // max(1, self.channels if self.last else image if self.whole else self.pixels))
        self.parts = [self.part(views[0].shape, first) for views, first in self.cut(y[:batch])]
        self.width = max((prod(part.shape) for part in self.parts), default=0)

    def part(self, shape: tuple[int, ...], first: int) -> Part:
        return Part(shape, slice(0, self.channels) if self.whole else slice(first, first + shape[0]), self.last)

    def cut(self, images: Tensor) -> list[tuple[tuple[Tensor, ...], int]]:
        """For each part, its view at each of the steps that `images` [steps*B, C, H, W] hold; and its first channel."""
        steps = len(images) // max(1, self.batch)
        if images.numel() == 0:
            return []
        if self.last:
            planes = [images.permute(0, 2, 3, 1).reshape(steps, -1, self.channels)]
        else:
            planes = [images.view(steps, self.batch, self.channels, self.pixels)]
            if not self.whole:
                planes = planes[0].unbind(1)
        return [
            (part.unbind(), 0 if self.whole else i * self.length)
            for plane in planes
            for i, part in enumerate(plane.split(self.length, dim=1))
        ]

    def __call__(self, images: Tensor | None) -> list[tuple[Tensor, ...]] | list[None]:
        """The views of `cut`; for a tensor that is absent or empty nothing for each part."""
        if images is None or images.numel() == 0:
            return [()] * len(self.parts)
        return [views for views, _ in self.cut(images)]

    def step(self, images: Tensor | None) -> list[Tensor | None]:
        """The view of one step, [B, C, H, W], for each part; None where it is absent or empty."""
        return [views[0] if views else None for views in self(images)]


class Scratch:
    """Memory for one part after another; its views are made anew only where the shape changes."""

    def __init__(self, count: int, width: int, dtype: torch.dtype):
        self.memory, self.shape = torch.empty((count, width), dtype=dtype), None

    def __call__(self, shape: tuple[int, ...]) -> list[Tensor]:
        if shape != self.shape:
            self.shape, size = shape, prod(shape)
            self.views = [plane[:size].view(shape) for plane in self.memory]
        return self.views


class Normalised:
    """A part's neuron input by step: batch norm and residual, rounded the same whenever it is asked for."""

    def __init__(self, ys, residuals, parameters: tuple[Tensor, ...], now: Tensor, centred: Sequence[Tensor]):
        self.ys, self.residuals, self.now, self.centred = ys, residuals, now, centred
        self.mean, self.scale, self.bias = parameters

    def __call__(self, t: int) -> Tensor:
        t = t if len(self.ys) > 1 else 0
        centred, now = self.centred[t % len(self.centred)], self.now
        # Products and sums one by one: fused, they would round by where an element lies in a thread's share.
        y = self.ys[t] if self.ys[t].dtype == now.dtype else centred.copy_(self.ys[t])
        torch.sub(y, self.mean, out=centred)
        torch.mul(centred, self.scale, out=now).add_(self.bias)
        return now.add_(self.residuals[t]) if self.residuals else now


def affine(statistics: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """Mean, 1 / deviation, scale and bias, each [C]."""
    mean, var = statistics
    rstd = (var + eps).rsqrt()
    return mean, rstd, rstd if weight is None else weight * rstd, torch.zeros_like(mean) if bias is None else bias


def norm_statistics(y: Tensor) -> Tensor:
    """Mean and variance over n of each channel, [2, C], in one read: sums about a pivot that is near the mean."""
    dtype = state_dtype(y.dtype)
    if y.numel() == 0:
        return torch.zeros((2, y.shape[1]), dtype=dtype)
    images = Images(y, len(y), WIDE)
    sums = torch.zeros((2, y.shape[1]), dtype=torch.float64)
    pivot = y[:1].to(dtype).mean((0, 2, 3))
    scratch = Scratch(1, images.width, dtype)
    for part, (block,) in zip(images.parts, images(y), strict=True):
        (centred,) = scratch(part.shape)
        block = block if y.dtype == dtype else centred.copy_(block)
        torch.sub(block, *part.of(pivot), out=centred)
        sums[0, part.channels] += part.sum(centred)
        sums[1, part.channels] += part.sum(centred.mul_(centred))
    mean, square = sums / (y.numel() // y.shape[1])
    return torch.stack([mean + pivot, square - mean.square()]).to(dtype)


def norm_lif_forward(
    y: Tensor,
    residual: Tensor | None,
    v0: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    learnt_decay: Tensor | None,
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
    images = Images(y, batch)
    d = Dynamics(dtype, learnt_decay, *options)
    mean, _, scale, bias = affine(statistics, weight, bias, eps)
    scratch = Scratch(6, images.width, dtype)
    for part, ys, residuals, outs, start, last, saved in zip(
        images.parts,
        images(y),
        images(residual),
        images(spikes),
        images.step(v0),
        images.step(v_last),
        images(saved_states),
        strict=True,
    ):
        *used, v, now, centred = scratch(part.shape)
        current = Normalised(ys, residuals, part.of(mean, scale, bias), now, [centred])
        v = v if last is None else last
        run(d, timesteps, once(current) if constant else current, outs, v, start, saved, used)
    return spikes, v_last, saved_states


def once(current: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """The same for every step, computed at the first call."""
    first = current(0)
    return lambda t: first


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
    images = Images(y, batch)
    g = empty_images(y, len(y), y.dtype) if write else y.new_empty(0)
    grad_v0 = y.new_empty(0, dtype=dtype) if v0 is None else empty_images(y, batch, dtype)
    d = Dynamics(dtype, learnt_decay, *options)
    mean, rstd, scale, bias = affine(statistics, weight, bias, eps)
    sums, grad_decay = torch.zeros((2, y.shape[1]), dtype=torch.float64), 0.0
    length = segments(timesteps)[1]
    in_place = write and not constant and y.dtype == dtype
    planes = 3 if learnt_decay is None else 4
    scratch = Scratch(8 + planes * length, images.width, dtype)
    for part, ys, residuals, incoming, grad_end, outs, start, out_v0, saved in zip(
        images.parts,
        images(y),
        images(residual),
        images(grad_spikes),
        images.step(grad_v_last),
        images(g),
        images.step(v0),
        images.step(grad_v0),
        images(saved_states),
        strict=True,
    ):
        views = scratch(part.shape)
        *used, now, gv, total, product = views[:8]
        centred, *segment = (views[8 + i * length :][:length] for i in range(planes))
        current = Normalised(ys, residuals, part.of(mean, scale, bias), now, centred)
        gv.zero_() if grad_end is None else gv.copy_(grad_end)
        for tensor in (total, product):
            tensor.zero_()

        def deliver(t, gradient, outs=outs, total=total, product=product, centred=centred):
            total.add_(gradient)
            if not constant:
                product.addcmul_(gradient, centred[t % length])
                if write and not in_place:
                    outs[t].copy_(gradient)

        grad_decay += run_backward(
            d,
            timesteps,
            once(current) if constant else current,
            incoming or None,
            outs if in_place else None,
            deliver,
            gv,
            start,
            saved,
            used,
            segment,
        )
        if constant:
            torch.mul(total, centred[0], out=product)
            if write:
                outs[0].copy_(total)
        if out_v0 is not None:
            out_v0.copy_(gv)
        sums[0, part.channels] += part.sum(total)
        sums[1, part.channels] += part.sum(product)
    sums[1] *= rstd
    grad_decay = y.new_full(() if learnt_decay is not None else (0,), grad_decay, dtype=dtype)
    return sums.to(dtype), g, grad_v0, grad_decay


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
    dtype = state_dtype(y.dtype)
    images = Images(y, len(y), WIDE)
    mean, rstd, scale, _ = affine(statistics, weight, None, eps)
    # mean of g + z * mean of g*z, as slope * y + offset
    slope = torch.zeros_like(mean) if means is None else rstd * means[1]
    offset = torch.zeros_like(mean) if means is None else means[0] - mean * slope
    scratch = Scratch(2, images.width, dtype)
    for part, (block,), (gradient,), (out,) in zip(images.parts, images(y), images(grad), images(grad_y), strict=True):
        mean_g, now = scratch(part.shape)
        a, b, c = part.of(slope, offset, scale)
        if y.dtype != dtype:
            block, gradient = mean_g.copy_(block), now.copy_(gradient)
        result = out if y.dtype == dtype else now
        if means is None:
            torch.mul(gradient, c, out=result)
        else:
            torch.mul(block, a, out=mean_g).add_(b)
            torch.sub(gradient, mean_g, out=result).mul_(c)
        if result is not out:
            out.copy_(result)
