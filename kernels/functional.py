"""What users call: arguments checked, then the op.

Shapes: T time steps, B batch, C channels, H x W pixels, N = H*W; `...` any shape, also none.
"""

from difflib import get_close_matches
from math import inf

import torch
from torch import Tensor

from lasnn.kernels import ops
from lasnn.kernels.layout import state_dtype

SURROGATES = ("atan", "sigmoid", "triangle", "rectangle", "fast-sigmoid")
TEMPORAL = ("rate", "step", "map")
DEVICES = ("cpu", "cuda", "meta")
HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


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
    if timesteps is None:
        timesteps = x.shape[0]
    elif isinstance(timesteps, bool) or not isinstance(timesteps, (int, torch.SymInt)):
        raise TypeError(f"lif: timesteps must be an integer, got {timesteps!r}")
    elif timesteps < 1:
        raise ValueError(f"lif: timesteps must be at least 1, got {timesteps}")
    elif x.shape[0] not in (1, timesteps):
        raise ValueError(
            f"lif: x has {x.shape[0]} steps but timesteps is {timesteps}; give x [1, ...], constant in time, "
            f"or [{timesteps}, ...]"
        )

    state = state_dtype(x.dtype)
    if v0 is not None:
        if not isinstance(v0, Tensor):
            raise TypeError(f"lif: v0 must be a tensor or None, got {type(v0).__name__}")
        if v0.dtype != state:
            raise TypeError(f"lif: v0 must be {state} for x in {x.dtype}, got {v0.dtype}; use v0.to({state})")
        if v0.shape != x.shape[1:]:
            raise ValueError(f"lif: v0 must have the shape of one step, {list(x.shape[1:])}, got {list(v0.shape)}")
        if v0.device != x.device:
            raise ValueError(f"lif: v0 is on {v0.device} but x is on {x.device}")

    threshold = positive("lif", "threshold", threshold)
    alpha = positive("lif", "alpha", alpha)
    if v_reset is not None:
        v_reset = number("lif", "v_reset", v_reset, "a number, or None for the soft reset")
        if not v_reset < threshold:
            raise ValueError(
                f"lif: v_reset must be below the threshold {threshold}, got {v_reset}: it would fire for ever"
            )
    if surrogate not in SURROGATES:
        raise ValueError(unknown("surrogate", surrogate, SURROGATES))
    decay, learnt_decay = 0.0, None
    if isinstance(tau, Tensor):
        if tau.numel() != 1 or not tau.is_floating_point():
            raise TypeError(
                f"lif: tau must hold one floating-point number, got {tau.dtype} {list(tau.shape)}; "
                "use a float or a 0-d tensor"
            )
        if tau.device != x.device:
            raise ValueError(f"lif: tau is on {tau.device} but x is on {x.device}")
        learnt_decay = tau.reshape(()).to(state).reciprocal()
    else:
        tau = number("lif", "tau", tau, "a number or a 0-d tensor", infinite=True)
        if not tau >= 1:
            raise ValueError(
                f"lif: tau must be at least 1 step, got {tau}: a shorter one would carry v past rest; "
                "math.inf is integrate-and-fire"
            )
        if decay_input and tau == inf:
            raise ValueError("lif: decay_input with tau = inf multiplies the input by 0; set decay_input=False")
        decay = 1 / tau

    spikes, v_last, _ = ops.lif(
        x,
        v0,
        learnt_decay,
        timesteps,
        decay,
        threshold,
        bool(decay_input),
        v_reset,
        surrogate,
        alpha,
        bool(detach_reset),
    )
    return spikes, v_last


def attention_map(x: Tensor, power: float = 2, temporal: str = "rate", *, eps: float = 1e-3) -> Tensor:
    """Where a feature is active: its spatial attention map, of unit norm.

    With the energy f = sum over channels of |.|^power and Q(f) = f / max(||f||_2, eps) over the H*W pixels:
    "rate" is Q of the mean of x over time, "map" Q of the mean over time of f[t], "step" Q(f[t]), step by
    step.

    Where the norm is below eps, as for a map that is silent, Q is f / eps: its gradient stays within df/dx /
    eps. For power 1 the derivative of |.| at 0 is +1 by definition, so that silent neurons, whose value is
    never negative, get a gradient; for a larger power they get none.

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
    check_tensor("attention_map", x)
    if x.dim() != 5:
        raise ValueError(
            f"attention_map: x must be [T, B, C, H, W], got {list(x.shape)}; a feature without time is x.unsqueeze(0)"
        )
    if x.shape[0] < 1:
        raise ValueError("attention_map: x has 0 time steps; T must be at least 1")
    power = number("attention_map", "power", power)
    if not power >= 1:
        raise ValueError(f"attention_map: power must be at least 1, got {power}")
    if temporal not in TEMPORAL:
        raise ValueError(unknown("temporal", temporal, TEMPORAL))
    eps = positive("attention_map", "eps", eps)

    f = ops.attention(x, power, temporal).flatten(-2)
    return f / torch.linalg.vector_norm(f, dim=-1, keepdim=True).clamp_min(eps)


def check_tensor(op: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    device = x.device.type
    if device not in DEVICES:
        raise ValueError(f"{op}: no kernel for device {device!r}; move x to one of {', '.join(DEVICES)}")
    if x.dtype not in HALF_AND_SINGLE and (x.dtype != torch.float64 or device == "cuda"):
        taken = "float16, bfloat16 or float32" + ("" if device == "cuda" else ", or float64 on the CPU")
        raise TypeError(f"{op}: no kernel for {x.dtype} on {device}; it takes {taken}: use x.float()")


def number(op: str, name: str, value: float, what: str = "a number", infinite: bool = False) -> float:
    try:
        value = float(value) if not isinstance(value, (str, bool)) else None
    except (TypeError, ValueError):
        value = None
    if value is None:
        raise TypeError(f"{op}: {name} must be {what}")
    # Comparisons, not math.isfinite, which torch.compile does not trace for a symbolic number.
    if not (-inf < value < inf or (infinite and value == inf)):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return value


def positive(op: str, name: str, value: float) -> float:
    value = number(op, name, value)
    if not value > 0:
        raise ValueError(f"{op}: {name} must be above 0, got {value}")
    return value


def unknown(what: str, name: object, known: tuple[str, ...]) -> str:
    near = get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {what} {name!r}{hint} known: {', '.join(known)}"
