"""The ops as PyTorch knows them: the only place where anything is registered.

Each op is functional and has a CPU implementation, a Triton one for CUDA (ROCm too), a fake for tracing and
meta tensors, and an autograd formula. The dispatcher chooses by device; nothing else does. None is registered
for autocast, which would cast what must stay fp32.
"""

import torch
from torch import Tensor

from lasnn.kernels import cpu
from lasnn.kernels.layout import empty_step, empty_steps, state_dtype, stretches


def launcher(module: str, name: str):
    """The Triton launcher `name`, imported at its first call: everything else works without Triton."""
    loaded = None

    def launch(*args):
        nonlocal loaded
        if loaded is None:
            try:
                import triton  # noqa: F401
            except ImportError as error:
                raise ImportError(
                    "lasnn's ops on a GPU need Triton: pip install 'triton>=3.4' (a CPU needs none)"
                ) from error
            from importlib import import_module

            loaded = getattr(import_module(f"lasnn.kernels.{module}"), name)
        return loaded(*args)

    return launch


@torch.library.custom_op("lasnn::lif", mutates_args=(), device_types="cpu")
def lif(
    x: Tensor,
    v0: Tensor | None,
    learnt_decay: Tensor | None,
    timesteps: int,
    decay: float,
    threshold: float,
    decay_input: bool,
    v_reset: float | None,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes [T, ...], v_last [...] and the states between the stretches of time [stretches - 1, ...]."""
    return cpu.lif_forward(
        x,
        v0,
        learnt_decay,
        timesteps,
        decay,
        threshold,
        decay_input,
        v_reset,
        surrogate,
        alpha,
        detach_reset,
    )


@torch.library.custom_op("lasnn::lif_backward", mutates_args=(), device_types="cpu")
def lif_backward(
    grad_spikes: Tensor | None,
    grad_v_last: Tensor | None,
    x: Tensor,
    v0: Tensor | None,
    learnt_decay: Tensor | None,
    borders: Tensor,
    timesteps: int,
    decay: float,
    threshold: float,
    decay_input: bool,
    v_reset: float | None,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, v0 and learnt_decay; the last two are empty where there is none."""
    return cpu.lif_backward(
        grad_spikes,
        grad_v_last,
        x,
        v0,
        learnt_decay,
        borders,
        timesteps,
        decay,
        threshold,
        decay_input,
        v_reset,
        surrogate,
        alpha,
        detach_reset,
    )


lif.register_kernel("cuda")(launcher("lif_triton", "lif_forward"))
lif_backward.register_kernel("cuda")(launcher("lif_triton", "lif_backward"))


@lif.register_fake
def _(x, v0, learnt_decay, timesteps, *options):
    state = state_dtype(x.dtype)
    borders = empty_steps(x, stretches(timesteps)[0] - 1, state)
    return empty_steps(x, timesteps, x.dtype), empty_step(x, state), borders


@lif_backward.register_fake
def _(grad_spikes, grad_v_last, x, v0, learnt_decay, borders, timesteps, *options):
    state = state_dtype(x.dtype)
    grad_v0 = x.new_empty(0, dtype=state) if v0 is None else empty_step(x, state)
    grad_decay = x.new_empty((0,) if learnt_decay is None else (), dtype=state)
    return empty_steps(x, x.shape[0], x.dtype), grad_v0, grad_decay


def lif_setup_context(ctx, inputs, output):
    x, v0, learnt_decay, *options = inputs
    ctx.save_for_backward(x, v0, learnt_decay, output[2])
    ctx.options = options
    # An output that nobody uses has no gradient, rather than zeros to be written and read.
    ctx.set_materialize_grads(False)


def lif_gradient(ctx, grad_spikes, grad_v_last, _):
    x, v0, learnt_decay, borders = ctx.saved_tensors
    none = (None,) * len(ctx.options)
    if grad_spikes is None and grad_v_last is None:
        return None, None, None, *none
    grad_x, grad_v0, grad_decay = lif_backward(grad_spikes, grad_v_last, x, v0, learnt_decay, borders, *ctx.options)
    return (
        grad_x,
        None if v0 is None else grad_v0,
        None if learnt_decay is None else grad_decay,
        *none,
    )


lif.register_autograd(lif_gradient, setup_context=lif_setup_context)


@torch.library.custom_op("lasnn::attention", mutates_args=(), device_types="cpu")
def attention(x: Tensor, power: float, temporal: str) -> Tensor:
    """The energy sum_c |.|^power of x [T, B, C, H, W]: [B, H, W], or [T, B, H, W] for "step"."""
    return cpu.attention_forward(x, power, temporal)


@torch.library.custom_op("lasnn::attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(grad: Tensor, x: Tensor, power: float, temporal: str) -> Tensor:
    """Gradient of x; for "rate" one step of it, [1, B, C, H, W], since all steps are equal."""
    return cpu.attention_backward(grad, x, power, temporal)


attention.register_kernel("cuda")(launcher("attention_triton", "attention_forward"))
attention_backward.register_kernel("cuda")(launcher("attention_triton", "attention_backward"))


@attention.register_fake
def _(x, power, temporal):
    steps, batch, _, height, width = x.shape
    shape = (steps, batch, height, width) if temporal == "step" else (batch, height, width)
    return x.new_empty(shape, dtype=state_dtype(x.dtype))


@attention_backward.register_fake
def _(grad, x, power, temporal):
    return empty_steps(x, 1 if temporal == "rate" else x.shape[0], x.dtype)


def attention_setup_context(ctx, inputs, output):
    x, ctx.power, ctx.temporal = inputs
    ctx.save_for_backward(x)


def attention_gradient(ctx, grad):
    (x,) = ctx.saved_tensors
    # For "rate" the view spares T - 1 writes here and as many reads in whatever takes this gradient.
    return attention_backward(grad, x, ctx.power, ctx.temporal).expand_as(x), None, None


attention.register_autograd(attention_gradient, setup_context=attention_setup_context)
