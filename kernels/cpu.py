"""The CPU path: in place, without a graph over time, with a hand-written backward pass.

Each op is cut into blocks of elements that go through all their steps while they are in cache. A pass over
memory is what costs, so the common cases (tau = 2, hard reset to 0, fp32) are arranged to need few: 3 a step
forward, 3 + 7 backward. README.md derives the formulas.
"""

from collections.abc import Callable
from math import isfinite, nan, pi

import torch
from torch import Tensor

from lasnn.kernels.layout import empty_step, empty_steps, in_order, state_dtype, step_strides, stretches

# Elements a thread gets of a block: fewer cost more in calls, more fall out of cache (measured).
BLOCK = 65536


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


def lif_forward(
    x: Tensor, v0: Tensor | None, learnt_decay: Tensor | None, timesteps: int, *options
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes, v_last, the state at the start of every stretch of time but the first)."""
    dtype = state_dtype(x.dtype)
    count, length = stretches(timesteps)
    spikes, v_last = empty_steps(x, timesteps, x.dtype), empty_step(x, dtype)
    borders = empty_steps(x, count - 1, dtype)
    blocks = Blocks(x)
    if blocks.size == 0:
        return spikes, v_last, borders
    d = Dynamics(dtype, learnt_decay, *options)
    cast, constant = x.dtype != dtype, len(x) == 1
    buffer = torch.empty((4, blocks.width), dtype=dtype)

    for xs, outs, v, start, kept in zip(
        blocks(x), blocks(spikes), blocks.optional(v_last), blocks.optional(v0), blocks(borders), strict=True
    ):
        h, s, current, scratch = buffer[:, : len(v)].unbind()
        # Any h that is not finite leaves a v_last that is not: only then is the exact but slower form needed.
        for careful in (False, True):
            d.start(v, start)
            for t in range(timesteps):
                if t and t % length == 0:
                    kept[t // length - 1].copy_(v)
                if t == 0 or not constant:
                    now = current.copy_(xs[t]) if cast else xs[t]
                if not cast:
                    s = outs[t]
                d.charge(v, now, scratch, out=h, careful=careful)
                d.fire(h, out=s, careful=careful)
                d.reset(h, s, out=v, careful=careful)
                if cast:
                    outs[t].copy_(s)
            if isfinite(v.sum().item()):
                break
    return spikes, v_last, borders


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
    _, length = stretches(timesteps)
    grad_x = empty_steps(x, len(x), x.dtype)
    grad_v0 = x.new_empty(0, dtype=dtype) if v0 is None else empty_step(x, dtype)
    grad_decay = 0.0
    blocks = Blocks(x)
    if blocks.size:
        d = Dynamics(dtype, learnt_decay, *options)
        learnt, cast, constant = learnt_decay is not None, x.dtype != dtype, len(x) == 1
        in_place = not (cast or constant or d.decay_input)
        buffer = torch.empty((6, blocks.width), dtype=dtype)
        held = torch.empty((3 if learnt else 2, length, blocks.width), dtype=dtype)
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
            v, gv, spare, u, gs, total = buffer[:, : len(xs[0])].unbind()
            hs, ss, *vs = (plane.unbind() for plane in held[:, :, : len(v)].unbind())
            gv.zero_() if grad_end is None else gv.copy_(grad_end)
            if constant:
                total.zero_()

            for first in reversed(range(0, timesteps, length)):
                steps = min(length, timesteps - first)
                # h and the spikes again, by the forward pass's own code
                for careful in (False, True):
                    d.start(v, kept[first // length - 1] if first else start)
                    for i in range(steps):
                        now = xs[0 if constant else first + i]
                        if learnt:
                            vs[0][i].copy_(v)
                        d.charge(v, gs.copy_(now) if cast else now, u, out=hs[i], careful=careful)
                        d.fire(hs[i], out=ss[i], careful=careful)
                        d.reset(hs[i], ss[i], out=v, careful=careful)
                    if isfinite(v.sum().item()):
                        break

                for i in reversed(range(steps)):
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
                    gh = d.combine(gv, grad_s, w, value=scale, out=outs[t] if in_place else spare)
                    torch.mul(gh, d.keep_, out=gv)

                    if learnt:
                        grad_decay += d.v_rest * gh.sum().item() - torch.dot(gh, vs[0][i]).item()
                        if d.decay_input:
                            now = xs[0 if constant else t]
                            grad_decay += torch.dot(gh, gs.copy_(now) if cast else now).item()
                    if constant:
                        total.add_(gh)
                    elif not in_place:
                        outs[t].copy_(gh.mul_(d.decay_) if d.decay_input else gh)

            if constant:
                outs[0].copy_(total.mul_(d.decay_) if d.decay_input else total)
            if out_v0 is not None:
                out_v0.copy_(gv)
    return grad_x, grad_v0, x.new_full(() if learnt_decay is not None else (0,), grad_decay, dtype=dtype)


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
