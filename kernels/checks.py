"""The checks of what users call the ops with: each names the op, what is wrong, and the fix."""

from difflib import get_close_matches
from math import inf

import torch
from torch import Tensor

from lasnn.kernels.dynamics import Dynamics
from lasnn.kernels.layout import memory_format, state_dtype

SURROGATES = ("atan", "sigmoid", "triangle", "rectangle", "fast-sigmoid")
DEVICES = ("cpu", "cuda", "meta")
HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def check_tensor(op: str, x: Tensor, name: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    device = x.device.type
    if device not in DEVICES:
        raise ValueError(f"{op}: no kernel for device {device!r}; move {name} to one of {', '.join(DEVICES)}")
    if x.dtype not in HALF_AND_SINGLE and (x.dtype != torch.float64 or device == "cuda"):
        taken = "float16, bfloat16 or float32" + ("" if device == "cuda" else ", or float64 on the CPU")
        raise TypeError(f"{op}: no kernel for {x.dtype} on {device}; it takes {taken}: use {name}.float()")


def check_state(op: str, v0: Tensor, x: Tensor, name: str, shape: tuple[int, ...]) -> None:
    """That v0 can be the state before the first step of x, called `name`, each of whose steps has the given shape."""
    if not isinstance(v0, Tensor):
        raise TypeError(f"{op}: v0 must be a tensor or None, got {type(v0).__name__}")
    state = state_dtype(x.dtype)
    if v0.dtype != state:
        raise TypeError(f"{op}: v0 must be {state} for {name} in {x.dtype}, got {v0.dtype}; use v0.to({state})")
    if v0.shape != tuple(shape):
        raise ValueError(f"{op}: v0 must have the shape of one step, {list(shape)}, got {list(v0.shape)}")
    if v0.device != x.device:
        raise ValueError(f"{op}: v0 is on {v0.device} but {name} is on {x.device}")


def check_images(op: str, images: Tensor, name: str) -> torch.memory_format:
    """Their memory order, contiguous or channels_last."""
    if images.dim() != 4:
        raise ValueError(f"{op}: {name} must be [T*B, C, H, W], got {list(images.shape)}")
    order = memory_format(images)
    if order is None:
        raise ValueError(
            f"{op}: {name} of shape {list(images.shape)} has strides {list(images.stride())}, neither contiguous nor "
            f"channels_last; use {name}.contiguous()"
        )
    return order


def check_residual(
    op: str, residual: Tensor, y: Tensor, order: torch.memory_format, timesteps: int, batch: int
) -> None:
    """That it can be added to y, of the given memory order, at every step or at all of them."""
    check_tensor(op, residual, "residual")
    if residual.dtype != y.dtype:
        raise TypeError(f"{op}: residual is {residual.dtype} but y is {y.dtype}; use residual.to(y.dtype)")
    if residual.device != y.device:
        raise ValueError(f"{op}: residual is on {residual.device} but y is on {y.device}")
    if residual.dim() != 4 or residual.shape[1:] != y.shape[1:] or residual.shape[0] not in (batch, timesteps * batch):
        raise ValueError(
            f"{op}: residual must be {[timesteps * batch, *y.shape[1:]]}, or {[batch, *y.shape[1:]]} if constant in "
            f"time, got {list(residual.shape)}"
        )
    if check_images(op, residual, "residual") != order:
        raise ValueError(
            f"{op}: y and residual lie in different memory orders, one contiguous, one channels_last; use "
            f"residual.contiguous(memory_format={order})"
        )


def whole_steps(op: str, timesteps: int) -> int:
    if isinstance(timesteps, bool) or not isinstance(timesteps, (int, torch.SymInt)):
        raise TypeError(f"{op}: timesteps must be an integer, got {timesteps!r}")
    if timesteps < 1:
        raise ValueError(f"{op}: timesteps must be at least 1, got {timesteps}")
    return timesteps


def dynamics(
    op: str,
    x: Tensor,
    *,
    tau: float | Tensor,
    threshold: float,
    decay_input: bool,
    v_reset: float | None,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
) -> tuple[Tensor | None, Dynamics]:
    """The neuron's options, checked: 1/tau where it is learnt, and the rest as the ops take it."""
    threshold = positive(op, "threshold", threshold)
    alpha = positive(op, "alpha", alpha)
    if v_reset is not None:
        v_reset = number(op, "v_reset", v_reset, "a number, or None for the soft reset")
        if not v_reset < threshold:
            raise ValueError(
                f"{op}: v_reset must be below the threshold {threshold}, got {v_reset}: it would fire for ever"
            )
    if surrogate not in SURROGATES:
        raise ValueError(unknown("surrogate", surrogate, SURROGATES))
    decay, learnt_decay = 0.0, None
    if isinstance(tau, Tensor):
        if tau.numel() != 1 or not tau.is_floating_point():
            raise TypeError(
                f"{op}: tau must hold one floating-point number, got {tau.dtype} {list(tau.shape)}; "
                "use a float or a 0-d tensor"
            )
        if tau.device != x.device:
            raise ValueError(f"{op}: tau is on {tau.device} but x is on {x.device}")
        learnt_decay = tau.reshape(()).to(state_dtype(x.dtype)).reciprocal()
    else:
        tau = number(op, "tau", tau, "a number or a 0-d tensor", infinite=True)
        if not tau >= 1:
            raise ValueError(
                f"{op}: tau must be at least 1 step, got {tau}: a shorter one would carry v past rest; "
                "math.inf is integrate-and-fire"
            )
        if decay_input and tau == inf:
            raise ValueError(f"{op}: decay_input with tau = inf multiplies the input by 0; set decay_input=False")
        decay = 1 / tau
    options = (decay, threshold, bool(decay_input), v_reset, surrogate, alpha, bool(detach_reset))
    return learnt_decay, Dynamics(*options)


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
