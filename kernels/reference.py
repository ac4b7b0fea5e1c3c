"""The definition of every op, in plain PyTorch under autograd: the oracle of the tests, and nothing else.

Shapes: T time steps, B batch, C channels, H x W pixels; `...` any shape. No run uses this file, so that a
fast path is never tested against itself. Arguments are those of the public functions, and are not checked
here.
"""

from math import pi

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from lasnn.kernels.batch_norm import BatchStatistics

SURROGATES = {
    "atan": lambda u, alpha: alpha / 2 / (1 + (pi / 2 * alpha * u) ** 2),
    "sigmoid": lambda u, alpha: alpha * torch.sigmoid(alpha * u) * (1 - torch.sigmoid(alpha * u)),
    "triangle": lambda u, alpha: alpha * (1 - alpha * u.abs()).clamp(min=0),
    "rectangle": lambda u, alpha: alpha * (u.abs() < 1 / (2 * alpha)).to(u.dtype),
    "fast-sigmoid": lambda u, alpha: 1 / (1 + alpha * u.abs()) ** 2,
}


class Fire(torch.autograd.Function):
    """1 where h >= threshold, NaN where h is NaN; its derivative is the surrogate's."""

    @staticmethod
    def forward(ctx, h: Tensor, threshold: float, surrogate: str, alpha: float) -> Tensor:
        ctx.save_for_backward(h)
        ctx.options = threshold, surrogate, alpha
        return (h >= threshold).to(h.dtype).masked_fill(h.isnan(), float("nan"))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (h,) = ctx.saved_tensors
        threshold, surrogate, alpha = ctx.options
        return gradient * SURROGATES[surrogate](h - threshold, alpha), None, None, None


def lif(
    x: Tensor,
    v0: Tensor | None = None,
    *,
    tau: float | Tensor = 2.0,
    threshold: float = 1.0,
    decay_input: bool = False,
    v_reset: float | None = 0.0,
    surrogate: str = "atan",
    alpha: float = 2.0,
    detach_reset: bool = False,
    timesteps: int | None = None,
) -> tuple[Tensor, Tensor]:
    state = torch.promote_types(x.dtype, torch.float32)
    current = x.to(state).expand(timesteps or len(x), *x.shape[1:])
    decay = 1 / (tau.to(state) if isinstance(tau, Tensor) else tau)
    v_rest = 0.0 if v_reset is None else v_reset
    v = torch.full_like(current[0], v_rest) if v0 is None else v0

    spikes = []
    for current_t in current:
        h = v - (v - v_rest) * decay + (decay * current_t if decay_input else current_t)
        s = Fire.apply(h, threshold, surrogate, alpha)
        fired = s.detach() if detach_reset else s
        v = h - threshold * fired if v_reset is None else (1 - fired) * h + fired * v_reset
        spikes.append(s)
    return torch.stack(spikes).to(x.dtype), v


def norm_lif(
    y: Tensor,
    norm: nn.BatchNorm2d,
    residual: Tensor | None = None,
    *,
    v0: Tensor | None = None,
    return_state: bool = False,
    timesteps: int,
    constant: bool = False,
    **options,
) -> tuple[Tensor, BatchStatistics | None] | tuple[Tensor, Tensor, BatchStatistics | None]:
    state = torch.promote_types(y.dtype, torch.float32)
    wide = y.to(state)
    weight, bias = (None if p is None else p.to(state) for p in (norm.weight, norm.bias))
    if norm.training or norm.running_mean is None:
        x = nn.functional.batch_norm(wide, None, None, weight, bias, training=True, eps=norm.eps)
        values = rearrange(wide.detach(), "n c h w -> c (n h w)")
        batch = BatchStatistics(values.mean(1), values.var(1, correction=0), values.shape[1])
    else:
        mean, var = norm.running_mean.to(state), norm.running_var.to(state)
        x, batch = nn.functional.batch_norm(wide, mean, var, weight, bias, eps=norm.eps), None
    current = rearrange(x, "(t b) ... -> t b ...", t=1 if constant else timesteps)
    if residual is not None:
        current = current + rearrange(residual.to(state), "(t b) ... -> t b ...", b=current.shape[1])
    spikes, v_last = lif(current, v0, timesteps=timesteps, **options)
    spikes = rearrange(spikes, "t b ... -> (t b) ...").to(y.dtype)
    return (spikes, v_last, batch) if return_state else (spikes, batch)


class MagnitudeToPower(torch.autograd.Function):
    """|x|^power. For power 1 the derivative at 0 is +1, so that a silent neuron is reached."""

    @staticmethod
    def forward(ctx, x: Tensor, power: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.power = power
        return x.abs() ** power

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (x,) = ctx.saved_tensors
        sign = torch.where(x < 0, -1.0, 1.0)
        return gradient * ctx.power * x.abs() ** (ctx.power - 1) * sign, None


def attention_map(x: Tensor, power: float = 2, temporal: str = "rate", *, eps: float = 1e-3) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if temporal == "rate":
        x = reduce(x, "t b c h w -> b c h w", "mean")
    f = reduce(MagnitudeToPower.apply(x, power), "... c h w -> ... h w", "sum")
    if temporal == "map":
        f = reduce(f, "t b h w -> b h w", "mean")
    f = rearrange(f, "... h w -> ... (h w)")
    return f / f.norm(dim=-1, keepdim=True).clamp(min=eps)
