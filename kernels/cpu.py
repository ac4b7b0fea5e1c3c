"""The CPU path: in place, without a graph over time, with a hand-written backward pass.

Each op is cut into blocks of elements that go through all their steps while they are in cache. A pass over
memory is what costs, so the common cases (tau = 2, hard reset to 0, fp32) are arranged to need few: 3 a step
forward, 3 + 7 backward. README.md derives the formulas.
"""

from collections.abc import Callable, Sequence
from math import isfinite, nan, pi, prod

import torch
from torch import Tensor

from lasnn.kernels.layout import (
    empty_images,
    empty_step,
    empty_steps,
    in_order,
    memory_format,
    state_dtype,
    step_strides,
    stretches,
)

# Elements a thread gets of a block: fewer cost more in calls, more fall out of cache (measured).
BLOCK = 65536
# The same for passes that hold a plane or two, not every step's.
WIDE = 4 * BLOCK


class Dynamics:
    """What one step does: h = v - (v - v_rest) decay + gain x, s = [h >= threshold], then the reset.

    The constants are 0-d tensors of the state's type: with Python numbers each op would first convert them.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        learnt_decay: Tensor | None,
        decay: float,
        threshold: float,
        decay_input: bool,
        v_reset: float | None,
        surrogate: str,
        alpha: float,
        detach_reset: bool,
    ):
        self.decay = decay if learnt_decay is None else learnt_decay.item()
        self.threshold, self.v_reset, self.alpha = threshold, v_reset, alpha
        self.decay_input, self.detach_reset = decay_input, detach_reset
        self.v_rest = 0.0 if v_reset is None else v_reset
        self.surrogate_, self.combine = SURROGATES[surrogate]
        self.decay_, self.keep_, self.threshold_, self.v_rest_ = (
            torch.scalar_tensor(value, dtype=dtype) for value in (self.decay, 1 - self.decay, threshold, self.v_rest)
        )
        # (1 - decay) v is exact for these, so that one fused pass rounds once, as the definition does.
        self.one_pass = self.v_rest == 0 and self.decay in (0.0, 0.5) and not decay_input

    def charge(self, v: Tensor, x: Tensor, scratch: Tensor, out: Tensor, careful: bool) -> None:
        """h, rounded as the definition rounds it. Both passes call this, so that they agree bit for bit."""
        if self.one_pass and not careful:
            torch.add(x, v, alpha=1 - self.decay, out=out)
            return
        if self.v_rest == 0:
            torch.mul(v, self.decay_, out=scratch)
        else:
            torch.sub(v, self.v_rest_, out=scratch).mul_(self.decay_)
        torch.sub(v, scratch, out=out)
        out.add_(torch.mul(x, self.decay_, out=scratch) if self.decay_input else x)

    def fire(self, h: Tensor, out: Tensor, careful: bool) -> None:
        torch.ge(h, self.threshold_, out=out)
        if careful:
            out.masked_fill_(h.isnan(), nan)

    def reset(self, h: Tensor, s: Tensor, out: Tensor, careful: bool) -> None:
        if self.v_reset is None:
            torch.sub(h, s, alpha=self.threshold, out=out)
        elif careful:
            torch.add((1 - s) * h, s, alpha=self.v_reset, out=out)
        else:
            # (1 - s) h + s v_reset for a finite h; any other h leaves NaN, which no later step loses.
            torch.addcmul(h, h, s, value=-1, out=out)
            if self.v_reset:
                out.add_(s, alpha=self.v_reset)

    def start(self, v: Tensor, v0: Tensor | None) -> None:
        if v0 is None:
            v.fill_(self.v_rest)
        else:
            v.copy_(v0)


# A surrogate turns u = h - threshold, in place, into the w of its derivative: scale * w, or scale / w.


def atan_(u: Tensor, alpha: float) -> tuple[Tensor, float]:
    k = (pi / 2 * alpha) ** -2
    return u.mul_(u).add_(k), alpha / 2 * k


def sigmoid_(u: Tensor, alpha: float) -> tuple[Tensor, float]:
    u.mul_(alpha).sigmoid_()
    return torch.addcmul(u, u, u, value=-1, out=u), alpha


def triangle_(u: Tensor, alpha: float) -> tuple[Tensor, float]:
    return u.abs_().neg_().add_(1 / alpha).clamp_(min=0), alpha**2


def rectangle_(u: Tensor, alpha: float) -> tuple[Tensor, float]:
    return u.abs_().lt_(1 / (2 * alpha)), alpha


def fast_sigmoid_(u: Tensor, alpha: float) -> tuple[Tensor, float]:
    return u.abs_().add_(1 / alpha).square_(), alpha**-2


# name: (the function, how w enters)
SURROGATES: dict[str, tuple[Callable[[Tensor, float], tuple[Tensor, float]], Callable]] = {
    "atan": (atan_, torch.addcdiv),
    "sigmoid": (sigmoid_, torch.addcmul),
    "triangle": (triangle_, torch.addcmul),
    "rectangle": (rectangle_, torch.addcmul),
    "fast-sigmoid": (fast_sigmoid_, torch.addcdiv),
}


class Blocks:
    """The elements of a step, cut into blocks that stay in cache from the first time step to the last."""

    def __init__(self, x: Tensor):
        self.strides = step_strides(x)
        self.size = x.shape[1:].numel()
        self.width = min(self.size, BLOCK * torch.get_num_threads())

    def __call__(self, steps: Tensor) -> list[tuple[Tensor, ...]]:
        """[T, ...] as one tuple of T vectors for each block: views, unless the memory order is another."""
        steps = in_order(steps, self.strides)
        plane = steps.as_strided((len(steps), self.size), (steps.stride(0), 1))
        return [block.unbind() for block in plane.split(self.width, dim=1)]

    def optional(self, step: Tensor | None) -> list[Tensor] | list[None]:
        """The same for one step, [...], or None for each block where there is none."""
        if step is None:
            return [None] * -(-self.size // self.width)
        return [block for (block,) in self(step[None])]


def run(
    d: Dynamics,
    timesteps: int,
    current: Callable[[int], Tensor],
    spikes: Sequence[Tensor],
    v: Tensor,
    start: Tensor | None,
    borders: Sequence[Tensor],
    buffer: Tensor,
) -> None:
    """One block through all its steps: spikes, v and the states at the borders of the stretches, in place."""
    _, length = stretches(timesteps)
    h, s, scratch = buffer
    cast = spikes[0].dtype != v.dtype
    # Any h that is not finite leaves a v_last that is not: only then is the exact but slower form needed.
    for careful in (False, True):
        d.start(v, start)
        for t in range(timesteps):
            if t and t % length == 0:
                borders[t // length - 1].copy_(v)
            if not cast:
                s = spikes[t]
            d.charge(v, current(t), scratch, out=h, careful=careful)
            d.fire(h, out=s, careful=careful)
            d.reset(h, s, out=v, careful=careful)
            if cast:
                spikes[t].copy_(s)
        if isfinite(v.sum().item()):
            break


def run_backward(
    d: Dynamics,
    timesteps: int,
    current: Callable[[int], Tensor],
    incoming: Sequence[Tensor] | None,
    outs: Sequence[Tensor] | None,
    deliver: Callable[[int, Tensor], None],
    gv: Tensor,
    start: Tensor | None,
    borders: Sequence[Tensor],
    buffer: Tensor,
    held: Tensor,
) -> float:
    """One block backward through all its steps; returns 1/tau's gradient where it is learnt.

    `gv` holds the gradient of the last v and ends with that of the first. The gradient of the current at step t goes
    to `deliver(t, gradient)`, in the buffer `outs[t]` where there is one; `current(t)` is called once a step, and
    before `deliver(t, ...)` of its stretch.
    """
    _, length = stretches(timesteps)
    v, spare, u, gs = buffer
    hs, ss, *vs = held
    cast = incoming is not None and incoming[0].dtype != v.dtype
    grad_decay = 0.0
    for first in reversed(range(0, timesteps, length)):
        count = min(length, timesteps - first)
        # h and the spikes again, by the forward pass's own code
        for careful in (False, True):
            d.start(v, borders[first // length - 1] if first else start)
            for i in range(count):
                if vs:
                    vs[0][i].copy_(v)
                d.charge(v, current(first + i), u, out=hs[i], careful=careful)
                d.fire(hs[i], out=ss[i], careful=careful)
                d.reset(hs[i], ss[i], out=v, careful=careful)
            if isfinite(v.sum().item()):
                break

        for i in reversed(range(count)):
            t, h = first + i, hs[i]
            if incoming is None:
                grad_s = gs.zero_()
            else:
                grad_s = gs.copy_(incoming[t]) if cast else incoming[t]
            if not d.detach_reset and d.v_reset is None:
                grad_s = torch.sub(grad_s, gv, alpha=d.threshold, out=gs)
            elif not d.detach_reset:
                fall = torch.sub(h, d.v_rest_, out=u) if d.v_reset else h
                grad_s = torch.addcmul(grad_s, gv, fall, value=-1, out=gs)
            if d.v_reset is not None:
                gv.addcmul_(gv, ss[i], value=-1)
            w, scale = d.surrogate_(torch.sub(h, d.threshold_, out=u), d.alpha)
            gh = d.combine(gv, grad_s, w, value=scale, out=spare if outs is None else outs[t])
            torch.mul(gh, d.keep_, out=gv)
            if vs:
                grad_decay += d.v_rest * gh.sum().item() - gh.flatten().dot(vs[0][i].flatten()).item()
                if d.decay_input:
                    grad_decay += gh.flatten().dot(current(t).flatten()).item()
            deliver(t, gh.mul_(d.decay_) if d.decay_input else gh)
    return grad_decay


def lif_forward(
    x: Tensor, v0: Tensor | None, learnt_decay: Tensor | None, timesteps: int, *options
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes, v_last, the state at the start of every stretch of time but the first)."""
    dtype = state_dtype(x.dtype)
    spikes, v_last = empty_steps(x, timesteps, x.dtype), empty_step(x, dtype)
    borders = empty_steps(x, stretches(timesteps)[0] - 1, dtype)
    blocks = Blocks(x)
    if blocks.size == 0:
        return spikes, v_last, borders
    d = Dynamics(dtype, learnt_decay, *options)
    buffer = torch.empty((4, blocks.width), dtype=dtype)
    for xs, outs, v, start, kept in zip(
        blocks(x), blocks(spikes), blocks.optional(v_last), blocks.optional(v0), blocks(borders), strict=True
    ):
        *used, now = buffer[:, : len(v)]
        run(d, timesteps, Current(xs, now), outs, v, start, kept, used)
    return spikes, v_last, borders


class Current:
    """A block's input by step, in the state's type; one step of it where it is constant in time."""

    def __init__(self, xs: Sequence[Tensor], now: Tensor):
        self.xs, self.now = xs, now

    def __call__(self, t: int) -> Tensor:
        x = self.xs[t if len(self.xs) > 1 else 0]
        return x if x.dtype == self.now.dtype else self.now.copy_(x)


def lif_backward(
    grad_spikes: Tensor | None,
    grad_v_last: Tensor | None,
    x: Tensor,
    v0: Tensor | None,
    learnt_decay: Tensor | None,
    borders: Tensor,
    timesteps: int,
    *options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of v0 and of the learnt decay (the last two empty where there is none)."""
    dtype = state_dtype(x.dtype)
    grad_x = empty_steps(x, len(x), x.dtype)
    grad_v0 = x.new_empty(0, dtype=dtype) if v0 is None else empty_step(x, dtype)
    grad_decay = 0.0
    blocks = Blocks(x)
    if blocks.size:
        d = Dynamics(dtype, learnt_decay, *options)
        # Several steps of gradient for one of x are added up.
        total = len(x) < timesteps
        in_place = not total and x.dtype == dtype
        buffer = torch.empty((7, blocks.width), dtype=dtype)
        held = torch.empty((2 if learnt_decay is None else 3, stretches(timesteps)[1], blocks.width), dtype=dtype)
        none = [None] * -(-blocks.size // blocks.width)

        for xs, incoming, grad_end, start, kept, outs, out_v0 in zip(
            blocks(x),
            none if grad_spikes is None else blocks(grad_spikes),
            blocks.optional(grad_v_last),
            blocks.optional(v0),
            blocks(borders),
            blocks(grad_x),
            none if v0 is None else blocks.optional(grad_v0),
            strict=True,
        ):
            *used, now, sums, gv = buffer[:, : len(xs[0])]
            gv.zero_() if grad_end is None else gv.copy_(grad_end)
            if total:
                sums.zero_()

            def deliver(t, gradient, outs=outs, sums=sums):
                if total:
                    sums.add_(gradient)
                elif not in_place:
                    outs[t].copy_(gradient)

            grad_decay += run_backward(
                d,
                timesteps,
                Current(xs, now),
                incoming,
                outs if in_place else None,
                deliver,
                gv,
                start,
                kept,
                used,
                held[:, :, : len(gv)],
            )
            if total:
                outs[0].copy_(sums)
            if out_v0 is not None:
                out_v0.copy_(gv)
    return grad_x, grad_v0, x.new_full(() if learnt_decay is not None else (0,), grad_decay, dtype=dtype)


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
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    learnt_decay: Tensor | None,
    eps: float,
    timesteps: int,
    constant: bool,
    *options,
) -> tuple[Tensor, Tensor]:
    """(spikes, the state at the start of every stretch of time but the first)."""
    dtype = state_dtype(y.dtype)
    batch = len(y) if constant else len(y) // timesteps
    spikes = empty_images(y, timesteps * batch, y.dtype)
    borders = empty_images(y, (stretches(timesteps)[0] - 1) * batch, dtype)
    images = Images(y, batch)
    d = Dynamics(dtype, learnt_decay, *options)
    mean, _, scale, bias = affine(statistics, weight, bias, eps)
    scratch = Scratch(6, images.width, dtype)
    for part, ys, residuals, outs, kept in zip(
        images.parts, images(y), images(residual), images(spikes), images(borders), strict=True
    ):
        *used, v, now, centred = scratch(part.shape)
        current = Normalised(ys, residuals, part.of(mean, scale, bias), now, [centred])
        run(d, timesteps, once(current) if constant else current, outs, v, None, kept, used)
    return spikes, borders


def once(current: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """The same for every step, computed at the first call."""
    first = current(0)
    return lambda t: first


def norm_lif_sums(
    grad_spikes: Tensor,
    y: Tensor,
    residual: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    learnt_decay: Tensor | None,
    borders: Tensor,
    write: bool,
    eps: float,
    timesteps: int,
    constant: bool,
    *options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sums of g and of g*z by channel, g, the gradient of the learnt decay)."""
    dtype = state_dtype(y.dtype)
    images = Images(y, len(y) if constant else len(y) // timesteps)
    g = empty_images(y, len(y), y.dtype) if write else y.new_empty(0)
    d = Dynamics(dtype, learnt_decay, *options)
    mean, rstd, scale, bias = affine(statistics, weight, bias, eps)
    sums, grad_decay = torch.zeros((2, y.shape[1]), dtype=torch.float64), 0.0
    length = stretches(timesteps)[1]
    in_place = write and not constant and y.dtype == dtype
    planes = 3 if learnt_decay is None else 4
    scratch = Scratch(8 + planes * length, images.width, dtype)
    for part, ys, residuals, incoming, outs, kept in zip(
        images.parts, images(y), images(residual), images(grad_spikes), images(g), images(borders), strict=True
    ):
        views = scratch(part.shape)
        *used, now, gv, total, product = views[:8]
        centred, *held = (views[8 + i * length :][:length] for i in range(planes))
        current = Normalised(ys, residuals, part.of(mean, scale, bias), now, centred)
        for tensor in (gv, total, product):
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
            incoming,
            outs if in_place else None,
            deliver,
            gv,
            None,
            kept,
            used,
            held,
        )
        if constant:
            torch.mul(total, centred[0], out=product)
            if write:
                outs[0].copy_(total)
        sums[0, part.channels] += part.sum(total)
        sums[1, part.channels] += part.sum(product)
    sums[1] *= rstd
    return sums.to(dtype), g, y.new_full(() if learnt_decay is not None else (0,), grad_decay, dtype=dtype)


def norm_lif_grad(
    grad_spikes: Tensor,
    y: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    learnt_decay: Tensor | None,
    borders: Tensor,
    means: Tensor | None,
    eps: float,
    timesteps: int,
    *options,
) -> Tensor:
    """y's gradient, through a g of its own."""
    _, g, _ = norm_lif_sums(
        grad_spikes, y, None, statistics, weight, bias, learnt_decay, borders, True, eps, timesteps, False, *options
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
