"""What the neuron's Triton kernels share: one time step forward and backward, and how they are compiled."""

import triton
import triton.language as tl
from torch import Tensor

from lasnn.kernels.dynamics import Dynamics
from lasnn.kernels.layout import segments

# Whether a product is fused into a sum must not move h across the threshold: it is off, not left to a
# default.
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


@triton.jit
def fire(h, threshold, v_reset, HARD: tl.constexpr):
    """(s, v after the reset)."""
    s = tl.where(h >= threshold, 1.0, 0.0)
    s = tl.where(h == h, s, h)
    return s, (1.0 - s) * h + s * v_reset if HARD else h - threshold * s


@triton.jit
def lif_step(v, x, decay, threshold, v_reset, HARD: tl.constexpr, DECAY_INPUT: tl.constexpr):
    """One step: (h, s, v after the reset). Both kernels run this, so that they agree bit for bit."""
    leak = (v - v_reset) * decay if HARD else v * decay
    h = v - leak + (x * decay if DECAY_INPUT else x)
    s, v = fire(h, threshold, v_reset, HARD)
    return h, s, v


@triton.jit
def surrogate_derivative(u, alpha, SURROGATE: tl.constexpr):
    if SURROGATE == "atan":
        scaled = 1.5707963267948966 * alpha * u
        # A division would take twice the instructions, to the same few units in the last place.
        slope = tl.rsqrt(1.0 + scaled * scaled)
        return 0.5 * alpha * (slope * slope)
    elif SURROGATE == "sigmoid":
        sigmoid = 1.0 / (1.0 + tl.exp(-alpha * u))
        return alpha * sigmoid * (1.0 - sigmoid)
    elif SURROGATE == "triangle":
        return alpha * tl.where(u == u, tl.maximum(1.0 - alpha * tl.abs(u), 0.0), u)
    elif SURROGATE == "rectangle":
        return tl.where(tl.abs(u) < 0.5 / alpha, alpha, 0.0)
    else:
        tl.static_assert(SURROGATE == "fast-sigmoid")
        root = 1.0 / (1.0 + alpha * tl.abs(u))
        return root * root


@triton.jit
def lif_step_backward(
    grad_s,
    grad_v,
    h,
    threshold,
    v_reset,
    alpha,
    HARD: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    SURROGATE: tl.constexpr,
):
    """dL/dh of one step, from the gradients of its spike and of its v after the reset."""
    s, _ = fire(h, threshold, v_reset, HARD)
    if not DETACH_RESET:
        grad_s += grad_v * (v_reset - h) if HARD else -threshold * grad_v
    grad_h = grad_s * surrogate_derivative(h - threshold, alpha, SURROGATE)
    return grad_h + (grad_v * (1.0 - s) if HARD else grad_v)


def dynamics(
    timesteps: int,
    learnt_decay: Tensor | None,
    options: tuple,
) -> dict:
    """The kernel arguments that say what a step does; `options` are `Dynamics`."""
    neuron = Dynamics(*options)
    return {
        "decay": neuron.decay,
        "threshold": neuron.threshold,
        "v_reset": 0.0 if neuron.v_reset is None else neuron.v_reset,
        "T": timesteps,
        "STEPS": segments(timesteps)[1],
        "LEARNT": learnt_decay is not None,
        "HARD": neuron.v_reset is not None,
        "DECAY_INPUT": neuron.decay_input,
    }


def surrogate(options: tuple) -> dict:
    """The further kernel arguments of a step backward."""
    neuron = Dynamics(*options)
    return {"alpha": neuron.alpha, "SURROGATE": neuron.surrogate, "DETACH_RESET": neuron.detach_reset}
