"""What users call: arguments checked, then the op.

Shapes: T time steps, B batch, C channels, H x W pixels, N = H*W; `...` any shape, also none.
"""

from inspect import signature
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from lasnn.kernels import ops
from lasnn.kernels.batch_norm import BatchNorm2d, BatchStatistics, NormLif, pool_over_group
from lasnn.kernels.checks import (
    check_images,
    check_residual,
    check_state,
    check_tensor,
    dynamics,
    number,
    positive,
    unknown,
    whole_steps,
)
from lasnn.kernels.layout import memory_format, state_dtype

TEMPORAL = ("rate", "step", "map")


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
    """Leaky integrate-and-fire over all time steps: spikes and the last membrane potential.

        h[t] = v[t-1] - (v[t-1] - v_rest) / tau + gain * x[t]     gain = 1 / tau if decay_input else 1
        s[t] = 1 where h[t] >= threshold, NaN where h[t] is NaN
        v[t] = (1 - s[t]) * h[t] + s[t] * v_reset                 hard reset; h[t] - threshold * s[t] if soft

    Args:
        x: input current, [T, ...], or [1, ...] with `timesteps` for a current that is constant in time: it is
            read once and its gradient summed over time. fp32, bf16 or fp16; on the CPU also fp64. Any
            strides; spikes keep the memory order of x's steps.
        v0: membrane potential before the first step, [...], in fp32 (fp64 with fp64). None: v_rest.
        tau: membrane time constant, in steps, at least 1 (below, the leak would carry v past rest);
            `math.inf` is integrate-and-fire. A tensor with one element is learnt: it gets a gradient, and its
            value is not checked, which would wait for the GPU.
        threshold: potential at which the neuron fires, above 0.
        decay_input: whether the input is divided by tau as well.
        v_reset: potential after a spike, and v_rest, below threshold. None: soft reset (v falls by threshold)
            and v_rest = 0.
        surrogate: what stands in for the derivative of the spike, at u = h - threshold:
            "atan" alpha/2 / (1 + (pi/2 alpha u)^2); "sigmoid" alpha sig(alpha u) (1 - sig(alpha u));
            "triangle" alpha max(0, 1 - alpha |u|); "rectangle" alpha where |u| < 1 / (2 alpha);
            "fast-sigmoid" 1 / (1 + alpha |u|)^2, not scaled by alpha (SuperSpike).
        alpha: sharpness of the surrogate, above 0, in units of 1/potential.
        detach_reset: leave the reset's dependence on the spike out of the gradient.
        timesteps: T, where x has one step; otherwise x's own length.

    Returns:
        spikes: [T, ...], 0 or 1, in x's dtype.
        v_last: [...], the membrane potential after the last step, fp32 (fp64 for fp64): the next call's `v0`.

    Raises:
        TypeError: x, v0 or tau is no tensor, or no number, of a kind that is taken.
        ValueError: a shape, a device or an option does not fit.

    Source: the discrete LIF of SpikingJelly (Fang et al., Science Advances 9, 2023), which fires at
    h >= threshold; fast sigmoid: SuperSpike (Zenke and Ganguli, Neural Computation 30, 2018).
    """
    check_tensor("lif", x)
    if x.dim() < 1:
        raise ValueError("lif: x has no time dimension; give it [T, ...], for one step x.unsqueeze(0)")
    if x.shape[0] < 1:
        raise ValueError("lif: x has 0 time steps; T must be at least 1")
    timesteps = x.shape[0] if timesteps is None else whole_steps("lif", timesteps)
    if x.shape[0] not in (1, timesteps):
        raise ValueError(
            f"lif: x has {x.shape[0]} steps but timesteps is {timesteps}; give x [1, ...], constant in time, "
            f"or [{timesteps}, ...]"
        )

    if v0 is not None:
        check_state("lif", v0, x, "x", x.shape[1:])
    learnt_decay, options = dynamics(
        "lif",
        x,
        tau=tau,
        threshold=threshold,
        decay_input=decay_input,
        v_reset=v_reset,
        surrogate=surrogate,
        alpha=alpha,
        detach_reset=detach_reset,
    )
    spikes, v_last, _ = ops.lif(x, v0, learnt_decay, timesteps, *options)
    return spikes, v_last


# The options of `lif` that are the neuron's, with their defaults.
LIF_OPTIONS = {
    name: parameter.default
    for name, parameter in signature(lif).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "timesteps"
}


@overload
def norm_lif(
    y: Tensor,
    norm: nn.BatchNorm2d,
    residual: Tensor | None = None,
    *,
    v0: Tensor | None = None,
    return_state: Literal[False] = False,
    timesteps: int,
    constant: bool = False,
    **lif_options: Any,
) -> tuple[Tensor, BatchStatistics | None]: ...


@overload
def norm_lif(
    y: Tensor,
    norm: nn.BatchNorm2d,
    residual: Tensor | None = None,
    *,
    v0: Tensor | None = None,
    return_state: Literal[True],
    timesteps: int,
    constant: bool = False,
    **lif_options: Any,
) -> tuple[Tensor, Tensor, BatchStatistics | None]: ...


def norm_lif(
    y: Tensor,
    norm: nn.BatchNorm2d,
    residual: Tensor | None = None,
    *,
    v0: Tensor | None = None,
    return_state: bool = False,
    timesteps: int,
    constant: bool = False,
    **lif_options: Any,
) -> tuple[Tensor, BatchStatistics | None] | tuple[Tensor, Tensor, BatchStatistics | None]:
    """Batch norm, an optional residual and leaky integrate-and-fire over all time steps, fused.

        x = (y - mean) / sqrt(var + eps) * weight + bias + residual
        spikes, v_last = lif(x, v0, ...)

    In training mean and var are those of y over T*B*H*W, otherwise the running ones. Only y, the residual and what
    has C elements are kept for the backward pass, with one fp32 state of [B, C, H, W] for each segment of 8 steps
    after the first. Arithmetic is fp32 whatever y's type, so that the unit runs under autocast as it is.

    `norm` is only read. The batch's statistics are returned: `update_running_statistics` takes them, once however often
    a pass is repeated (as in activation checkpointing), and `pool_statistics` makes one batch of several time chunks.

    Args:
        y: the convolution's output, [T*B, C, H, W] with time outermost, contiguous or channels_last; fp32, bf16 or
            fp16; on the CPU also fp64.
        norm: gives weight, bias, eps, momentum, the running statistics, and by its mode whether to use them. A
            `lasnn.kernels.BatchNorm2d` with a group has mean and var of all the group's processes, n-weighted.
        residual: added before the neuron, like y in shape, type and memory order; or [B, C, H, W] if only one of the
            two is constant in time, which costs a copy of that one for each step.
        v0: membrane potential before the first step, [B, C, H, W], in fp32 (fp64 with fp64), copied where it lies in
            another memory order than y. None: v_rest.
        return_state: also return the membrane potential after the last step, the next call's `v0`.
        timesteps: T.
        constant: y is [B, C, H, W], the same at every step: it is normalised once, with its own statistics, and read
            once. Its gradient is the sum over time.
        lif_options: tau, threshold, decay_input, v_reset, surrogate, alpha, detach_reset, as in `lif`.

    Returns:
        spikes: [T*B, C, H, W], 0 or 1, in y's type and memory order.
        v_last: only with `return_state`, [B, C, H, W], fp32 (fp64 for fp64), in y's memory order.
        batch: mean and variance of the batch, and over how many elements a channel (of all the group's processes);
            None where the running statistics were used, and for y without elements.

    Raises:
        TypeError: an argument is not of a kind that is taken.
        ValueError: a shape, a memory order, a device or an option does not fit.

    Source: batch normalisation (Ioffe and Szegedy, ICML 2015) as `torch.nn.BatchNorm2d` defines it, over time and
    batch as in threshold-dependent batch norm (Zheng et al., AAAI 2021) without its scaling; the LIF is `lif`'s.
    """
    check_tensor("norm_lif", y, "y")
    order = check_images("norm_lif", y, "y")
    timesteps = whole_steps("norm_lif", timesteps)
    if type(norm) not in (nn.BatchNorm2d, BatchNorm2d):
        raise TypeError(f"norm_lif: norm must be an nn.BatchNorm2d, got {type(norm).__name__}")
    if y.shape[1] != norm.num_features:
        raise ValueError(f"norm_lif: y has {y.shape[1]} channels but norm has {norm.num_features}")
    if not constant and y.shape[0] % timesteps:
        raise ValueError(
            f"norm_lif: y's leading dimension is T*B, but timesteps = {timesteps} does not divide {y.shape[0]}; "
            "an input of shape [B, C, H, W] that is the same at every step needs constant=True"
        )
    batch_size = y.shape[0] if constant else y.shape[0] // timesteps
    count = y.shape[0] * y.shape[2] * y.shape[3]
    if residual is not None:
        check_residual("norm_lif", residual, y, order, timesteps, batch_size)
        if residual.shape[0] != y.shape[0]:
            # Repeating what is constant changes neither its mean nor its variance.
            if constant:
                y, constant = torch.cat([y] * timesteps), False
            else:
                residual = torch.cat([residual] * timesteps)
    state = state_dtype(y.dtype)
    if v0 is not None:
        check_state("norm_lif", v0, y, "y", (batch_size, *y.shape[1:]))
        v0 = v0.contiguous(memory_format=order)
    for name, value in (*norm.named_parameters(), *norm.named_buffers()):
        if value.device != y.device:
            raise ValueError(f"norm_lif: norm.{name} is on {value.device} but y is on {y.device}")
    for name in lif_options.keys() - LIF_OPTIONS.keys():
        raise TypeError(f"norm_lif: {unknown('option', name, tuple(LIF_OPTIONS))}")
    learnt_decay, options = dynamics("norm_lif", y, **{**LIF_OPTIONS, **lif_options})

    uses_batch = norm.training or norm.running_mean is None
    # Of the processes that share a batch.
    group = getattr(norm, "group", None) if uses_batch else None
    if uses_batch:
        statistics, batch = batch_statistics(y, count, group)
    else:
        statistics, batch = torch.stack([norm.running_mean, norm.running_var]).to(state), None
    weight, bias = (None if p is None else p.to(state) for p in (norm.weight, norm.bias))
    # A repeated y counts as often as it is read, whatever its variance was over.
    n = y.shape[0] * y.shape[2] * y.shape[3] if uses_batch else 0
    inputs = (y, residual, v0, statistics, weight, bias, learnt_decay, n, norm.eps, timesteps, bool(constant))
    inputs += (bool(return_state), *options)
    spikes, v_last, _ = ops.norm_lif(*inputs) if group is None else NormLif.apply(*inputs, group)
    return (spikes, v_last, batch) if return_state else (spikes, batch)


def batch_statistics(y: Tensor, count: int, group: Any) -> tuple[Tensor, BatchStatistics | None]:
    """Mean and variance by channel, [2, C], of y or of all the group's processes' y; and the same for the caller."""
    if count == 1 and group is None:
        raise ValueError("norm_lif: the variance of one value a channel is not defined; give more than one image")
    statistics = ops.norm_statistics(y.detach())
    if group is not None:
        batch = pool_over_group(BatchStatistics(*statistics, count), group)
        return torch.stack(batch[:2]), batch
    return statistics, BatchStatistics(*statistics, count) if count else None


def folded(norm: nn.BatchNorm2d, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, scale and bias, each [C, 1, 1], with which `norm_lif` in evaluation computes (y - mean) * scale + bias."""
    mean, scale = norm.running_mean.to(dtype), (norm.running_var.to(dtype) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = norm.weight.to(dtype) * scale
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.to(dtype)
    return mean[:, None, None], scale[:, None, None], bias[:, None, None]


def energy_map(x: Tensor, power: float = 2, temporal: str = "rate") -> Tensor:
    """How active a feature is at each pixel: f = sum over channels of |.|^power.

    "rate" is f of the mean of x over time, "map" the mean over time of f[t], "step" f[t], step by step. For power 1 the
    derivative of |.| at 0 is +1 by definition, so that silent neurons, whose value is never negative, get a gradient;
    for a larger power they get none.

    Args:
        x: feature, [T, B, C, H, W]; fp32, bf16 or fp16; on the CPU also fp64. Any strides.
        power: exponent, at least 1.
        temporal: "rate", "step" or "map".

    Returns:
        [B, H, W], or [T, B, H, W] for "step", in fp32 (fp64 for fp64).

    Raises:
        TypeError: x is no tensor of a dtype that is taken, or power no number.
        ValueError: a shape, a device or an option does not fit.
    """
    check_tensor("energy_map", x)
    if x.dim() != 5:
        raise ValueError(
            f"energy_map: x must be [T, B, C, H, W], got {list(x.shape)}; a feature without time is x.unsqueeze(0)"
        )
    if x.shape[0] < 1:
        raise ValueError("energy_map: x has 0 time steps; T must be at least 1")
    power = number("energy_map", "power", power)
    if not power >= 1:
        raise ValueError(f"energy_map: power must be at least 1, got {power}")
    if temporal not in TEMPORAL:
        raise ValueError(unknown("temporal", temporal, TEMPORAL))
    return ops.attention(x, power, temporal)


def attention_map(x: Tensor, power: float = 2, temporal: str = "rate", *, eps: float = 1e-3) -> Tensor:
    """Where a feature is active: its spatial attention map, of unit norm.

    With `energy_map`'s f and Q(f) = f / max(||f||_2, eps) over the H*W pixels: "rate" is Q of the mean of x over time,
    "map" Q of the mean over time of f[t], "step" Q(f[t]), step by step.

    Where the norm is below eps, as for a map that is silent, Q is f / eps: its gradient stays within df/dx / eps.

    Args:
        x: feature, [T, B, C, H, W]; fp32, bf16 or fp16; on the CPU also fp64. Any strides.
        power: exponent, at least 1.
        temporal: "rate", "step" or "map".
        eps: smallest norm divided by, above 0.

    Returns:
        [B, H*W], or [T, B, H*W] for "step", in fp32 (fp64 for fp64).

    Raises:
        TypeError: x is no tensor of a dtype that is taken, or power or eps no number.
        ValueError: a shape, a device or an option does not fit.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017; the readings over time
    and the bound on the norm are this library's.
    """
    eps = positive("attention_map", "eps", eps)
    f = energy_map(x, power, temporal).flatten(-2)
    return f / torch.linalg.vector_norm(f, dim=-1, keepdim=True).clamp_min(eps)


def avg_pool2(x: Tensor) -> Tensor:
    """Average pooling over 2 x 2 pixels: what `torch.nn.functional.avg_pool2d(x, 2)` gives, to the last bit, several
    times as fast on contiguous images on a CPU; on a GPU, and in channels_last, it is that function.

    Args:
        x: images [N, C, H, W]; fp32, bf16 or fp16; on the CPU also fp64.

    Returns:
        [N, C, H // 2, W // 2], in x's memory order; an odd last row or column is left out.

    Raises:
        TypeError: x is no tensor of a dtype that is taken.
        ValueError: it is not four-dimensional, or a side is shorter than 2.
    """
    check_tensor("avg_pool2", x)
    if x.dim() != 4 or min(x.shape[2:]) < 2:
        raise ValueError(f"avg_pool2: x must be [N, C, H, W] with sides of at least 2, got {list(x.shape)}")
    return ops.avg_pool2(x if memory_format(x) else x.contiguous())
