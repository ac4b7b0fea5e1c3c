"""What the neuron's CPU paths share: a step's dynamics, and the two passes of a block over its time steps.

Each op is cut into blocks of elements that go through all their steps while they are in cache. A pass over
memory is what costs, so the common cases (tau = 2, hard reset to 0, fp32) are arranged to need few: 3 a step
forward, 3 + 7 backward. README.md derives the formulas.
"""

from collections.abc import Callable, Sequence
from math import isfinite, nan, pi

import torch
from torch import Tensor

from lasnn.kernels.layout import segments

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

    def charge(self, v: Tensor, x: Tensor, scratch: Tensor, out: Tensor, propagate_nan: bool) -> None:
        """h, rounded as the definition rounds it. Both passes call this, so that they agree bit for bit."""
        if self.one_pass and not propagate_nan:
            torch.add(x, v, alpha=1 - self.decay, out=out)
            return
        if self.v_rest == 0:
            torch.mul(v, self.decay_, out=scratch)
        else:
            torch.sub(v, self.v_rest_, out=scratch).mul_(self.decay_)
        torch.sub(v, scratch, out=out)
        out.add_(torch.mul(x, self.decay_, out=scratch) if self.decay_input else x)

    def fire(self, h: Tensor, out: Tensor, propagate_nan: bool) -> None:
        torch.ge(h, self.threshold_, out=out)
        if propagate_nan:
            out.masked_fill_(h.isnan(), nan)

    def reset(self, h: Tensor, s: Tensor, out: Tensor, propagate_nan: bool) -> None:
        if self.v_reset is None:
            torch.sub(h, s, alpha=self.threshold, out=out)
        elif propagate_nan:
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


def run(
    d: Dynamics,
    timesteps: int,
    current: Callable[[int], Tensor],
    spikes: Sequence[Tensor],
    v: Tensor,
    start: Tensor | None,
    saved_states: Sequence[Tensor],
    buffer: Tensor,
) -> None:
    """One block through all its steps: spikes, v and the states between the segments, in place."""
    _, length = segments(timesteps)
    h, s, scratch = buffer
    cast = spikes[0].dtype != v.dtype
    # Any h that is not finite leaves a v_last that is not: only then is the exact but slower form needed.
    for propagate_nan in (False, True):
        d.start(v, start)
        for t in range(timesteps):
            if t and t % length == 0:
                saved_states[t // length - 1].copy_(v)
            if not cast:
                s = spikes[t]
            d.charge(v, current(t), scratch, out=h, propagate_nan=propagate_nan)
            d.fire(h, out=s, propagate_nan=propagate_nan)
            d.reset(h, s, out=v, propagate_nan=propagate_nan)
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
    saved_states: Sequence[Tensor],
    buffer: Tensor,
    planes: Sequence[Sequence[Tensor]],
) -> float:
    """One block backward through all its steps; returns 1/tau's gradient where it is learnt.

    `gv` holds the gradient of the last v and ends with that of the first. The gradient of the current at step t goes
    to `deliver(t, gradient)`, in the buffer `outs[t]` where there is one; `current(t)` is called once a step, and
    before `deliver(t, ...)` of its segment. `planes` hold a segment's h and spikes and, for a learnt decay, its v.
    """
    _, length = segments(timesteps)
    v, spare, u, gs = buffer
    hs, ss, *vs = planes
    cast = incoming is not None and incoming[0].dtype != v.dtype
    grad_decay = 0.0
    for first in reversed(range(0, timesteps, length)):
        count = min(length, timesteps - first)
        # h and the spikes again, by the forward pass's own code
        for propagate_nan in (False, True):
            d.start(v, saved_states[first // length - 1] if first else start)
            for i in range(count):
                if vs:
                    vs[0][i].copy_(v)
                d.charge(v, current(first + i), u, out=hs[i], propagate_nan=propagate_nan)
                d.fire(hs[i], out=ss[i], propagate_nan=propagate_nan)
                d.reset(hs[i], ss[i], out=v, propagate_nan=propagate_nan)
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
