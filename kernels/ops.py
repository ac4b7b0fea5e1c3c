"""The ops as PyTorch knows them: the only place where anything is registered.

Each op is functional and has a CPU implementation, a Triton one for CUDA (ROCm too), a fake for tracing and
meta tensors, and an autograd formula. The dispatcher chooses by device; nothing else does. None is registered
for autocast, which would cast what must stay fp32.
"""

from importlib import import_module

import torch
from torch import Tensor

from lasnn.kernels import cpu
from lasnn.kernels.layout import empty_images, empty_step, empty_steps, memory_format, segments, state_dtype


def require_triton() -> None:
    """Check that the ops can run on a GPU.

    Raises:
        ImportError: Triton is missing or too old; the message says what to install.
    """
    try:
        import triton

        found = triton.__version__
    except ImportError:
        found = None
    if found is None or tuple(int(part) for part in found.split(".")[:2]) < (3, 4):
        fix = "pip install 'triton>=3.4'"
        if torch.version.hip:
            fix = (
                f"install the one built for this PyTorch (ROCm {torch.version.hip}), from the index that torch came "
                "from; by version it is called triton, triton-rocm or pytorch-triton-rocm"
            )
        raise ImportError(f"lasnn's ops need Triton >= 3.4 on a GPU, found {found or 'none'}: {fix} (a CPU needs none)")


def launcher(module: str, name: str):
    """The Triton launcher `name` of `triton/<module>.py`, imported at its first call: all else works without Triton."""
    loaded = None

    def launch(*args):
        nonlocal loaded
        if loaded is None:
            require_triton()
            loaded = getattr(import_module(f"lasnn.kernels.triton.{module}"), name)
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
    """Spikes [T, ...], v_last [...] and the states between the segments of time [segments - 1, ...]."""
    return cpu.lif.lif_forward(
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
    saved_states: Tensor,
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
    return cpu.lif.lif_backward(
        grad_spikes,
        grad_v_last,
        x,
        v0,
        learnt_decay,
        saved_states,
        timesteps,
        decay,
        threshold,
        decay_input,
        v_reset,
        surrogate,
        alpha,
        detach_reset,
    )


lif.register_kernel("cuda")(launcher("lif", "lif_forward"))
lif_backward.register_kernel("cuda")(launcher("lif", "lif_backward"))


@lif.register_fake
def _(x, v0, learnt_decay, timesteps, *options):
    state = state_dtype(x.dtype)
    saved_states = empty_steps(x, segments(timesteps)[0] - 1, state)
    return empty_steps(x, timesteps, x.dtype), empty_step(x, state), saved_states


@lif_backward.register_fake
def _(grad_spikes, grad_v_last, x, v0, learnt_decay, saved_states, timesteps, *options):
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
    x, v0, learnt_decay, saved_states = ctx.saved_tensors
    none = (None,) * len(ctx.options)
    if grad_spikes is None and grad_v_last is None:
        return None, None, None, *none
    grad_x, grad_v0, grad_decay = lif_backward(
        grad_spikes, grad_v_last, x, v0, learnt_decay, saved_states, *ctx.options
    )
    return (
        grad_x,
        None if v0 is None else grad_v0,
        None if learnt_decay is None else grad_decay,
        *none,
    )


lif.register_autograd(lif_gradient, setup_context=lif_setup_context)


@torch.library.custom_op("lasnn::norm_statistics", mutates_args=(), device_types="cpu")
def norm_statistics(y: Tensor) -> Tensor:
    """Mean and variance (over n, not n - 1) of each channel of y [N, C, H, W]: [2, C]."""
    return cpu.norm_lif.norm_statistics(y)


@torch.library.custom_op("lasnn::norm_lif", mutates_args=(), device_types="cpu")
def norm_lif(
    y: Tensor,
    residual: Tensor | None,
    v0: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    learnt_decay: Tensor | None,
    count: int,
    eps: float,
    timesteps: int,
    constant: bool,
    return_state: bool,
    decay: float,
    threshold: float,
    decay_input: bool,
    v_reset: float | None,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes [T*B, C, H, W], v_last and the states between the segments of time [(segments - 1)*B, C, H, W].

    y and residual are [T*B, C, H, W], or [B, C, H, W] where `constant`; `statistics` [2, C] are mean and variance,
    over `count` elements of a channel where they are y's own, so that its gradient goes through them, else count is 0.
    v0 and v_last are [B, C, H, W], in y's memory order; v_last is empty [0] unless `return_state`.
    """
    return cpu.norm_lif.norm_lif_forward(
        y,
        residual,
        v0,
        statistics,
        weight,
        bias,
        learnt_decay,
        eps,
        timesteps,
        constant,
        return_state,
        decay,
        threshold,
        decay_input,
        v_reset,
        surrogate,
        alpha,
        detach_reset,
    )


@torch.library.custom_op("lasnn::norm_lif_sums", mutates_args=(), device_types="cpu")
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
    decay: float,
    threshold: float,
    decay_input: bool,
    v_reset: float | None,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first pass backward: each channel's sums of g and of g*z [2, C], g, and v0's and learnt_decay's gradients.

    g is the gradient of the neuron's input, summed over time where that is `constant`; z is y normalised, before
    weight and bias. g is empty unless `write`; the gradients of v0 and learnt_decay are empty where there is none.
    All that is of the size of images lies in y's memory order.
    """
    return cpu.norm_lif.norm_lif_sums(
        grad_spikes,
        grad_v_last,
        y,
        residual,
        v0,
        statistics,
        weight,
        bias,
        learnt_decay,
        saved_states,
        write,
        eps,
        timesteps,
        constant,
        decay,
        threshold,
        decay_input,
        v_reset,
        surrogate,
        alpha,
        detach_reset,
    )


@torch.library.custom_op("lasnn::norm_lif_grad", mutates_args=(), device_types="cpu")
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
    decay: float,
    threshold: float,
    decay_input: bool,
    v_reset: float | None,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
) -> Tensor:
    """The second pass backward where g was not written: y's gradient, from g computed again.

    `means` [2, C] are the sums of the first pass over n; None where the statistics are not y's own.
    """
    return cpu.norm_lif.norm_lif_grad(
        grad_spikes,
        grad_v_last,
        y,
        v0,
        statistics,
        weight,
        bias,
        learnt_decay,
        saved_states,
        means,
        eps,
        timesteps,
        decay,
        threshold,
        decay_input,
        v_reset,
        surrogate,
        alpha,
        detach_reset,
    )


@torch.library.custom_op("lasnn::norm_grad", mutates_args=(), device_types="cpu")
def norm_grad(
    grad: Tensor, y: Tensor, statistics: Tensor, weight: Tensor | None, means: Tensor | None, eps: float
) -> Tensor:
    """The second pass backward where g was written: y's gradient, as a batch norm alone computes it."""
    return cpu.norm_lif.norm_grad(grad, y, statistics, weight, means, eps)


@torch.library.custom_op("lasnn::norm_grad_", mutates_args=("grad",), device_types="cpu")
def norm_grad_(
    grad: Tensor, y: Tensor, statistics: Tensor, weight: Tensor | None, means: Tensor | None, eps: float
) -> None:
    """The same in the place of g, where that is not the residual's gradient too."""
    cpu.norm_lif.norm_grad_(grad, y, statistics, weight, means, eps)


norm_lif_forward = launcher("norm_lif", "norm_lif_forward")


@norm_lif.register_kernel("cuda")
def _(y, residual, v0, statistics, weight, bias, learnt_decay, count, *options):
    return norm_lif_forward(y, residual, v0, statistics, weight, bias, learnt_decay, *options)


norm_statistics.register_kernel("cuda")(launcher("norm_lif", "norm_statistics"))
norm_lif_sums.register_kernel("cuda")(launcher("norm_lif", "norm_lif_sums"))
norm_lif_grad.register_kernel("cuda")(launcher("norm_lif", "norm_lif_grad"))
norm_grad.register_kernel("cuda")(launcher("norm_lif", "norm_grad"))
norm_grad_.register_kernel("cuda")(launcher("norm_lif", "norm_grad_"))


@norm_statistics.register_fake
def _(y):
    return y.new_empty((2, y.shape[1]), dtype=state_dtype(y.dtype))


@norm_lif.register_fake
def _(y, residual, v0, statistics, weight, bias, learnt_decay, count, eps, timesteps, constant, return_state, *options):
    batch, state = y.shape[0] if constant else y.shape[0] // timesteps, state_dtype(y.dtype)
    v_last = empty_images(y, batch, state) if return_state else y.new_empty(0, dtype=state)
    saved_states = empty_images(y, (segments(timesteps)[0] - 1) * batch, state)
    return empty_images(y, timesteps * batch, y.dtype), v_last, saved_states


@norm_lif_sums.register_fake
def _(
    grad_spikes,
    grad_v_last,
    y,
    residual,
    v0,
    statistics,
    weight,
    bias,
    learnt_decay,
    saved_states,
    write,
    eps,
    timesteps,
    constant,
    *options,
):
    batch, state = y.shape[0] if constant else y.shape[0] // timesteps, state_dtype(y.dtype)
    g = empty_images(y, y.shape[0], y.dtype) if write else y.new_empty(0)
    grad_v0 = y.new_empty(0, dtype=state) if v0 is None else empty_images(y, batch, state)
    grad_decay = y.new_empty((0,) if learnt_decay is None else (), dtype=state)
    return torch.empty_like(statistics), g, grad_v0, grad_decay


@norm_lif_grad.register_fake
def _(grad_spikes, grad_v_last, y, *others):
    return empty_images(y, y.shape[0], y.dtype)


@norm_grad.register_fake
def _(grad, y, *others):
    return empty_images(y, y.shape[0], y.dtype)


@norm_grad_.register_fake
def _(grad, y, *others):
    return None


def norm_lif_setup_context(ctx, inputs, output):
    *tensors, ctx.count, ctx.eps, ctx.timesteps, ctx.constant, ctx.return_state = inputs[:12]
    ctx.dynamics = inputs[12:]
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def norm_lif_gradient(ctx, grad_spikes, grad_v_last, _):
    y, residual, v0, statistics, weight, bias, learnt_decay, saved_states = ctx.saved_tensors
    none = (None,) * (5 + len(ctx.dynamics))
    if not ctx.return_state:
        # Some tracers hand zeros over for what was not used.
        grad_v_last = None
    if grad_spikes is None and grad_v_last is None:
        return None, None, None, None, None, None, None, *none
    order = memory_format(y)
    grad_spikes, grad_v_last = (
        None if grad is None else grad.contiguous(memory_format=order) for grad in (grad_spikes, grad_v_last)
    )
    parameters = (statistics, weight, bias, learnt_decay, saved_states)
    # The residual's gradient is g. A second recursion over time costs a GPU less than writing g and reading it;
    # a CPU, whose time is not in its memory alone, more; and an input constant in time has but one step of g.
    write = residual is not None or ctx.constant or y.device.type == "cpu"
    sums, g, grad_v0, grad_decay = norm_lif_sums(
        grad_spikes,
        grad_v_last,
        y,
        residual,
        v0,
        *parameters,
        write,
        ctx.eps,
        ctx.timesteps,
        ctx.constant,
        *ctx.dynamics,
    )
    means = sums / ctx.count if ctx.count else None
    # Where the statistics are those of several processes, of which this one may have no image.
    if mean_over := getattr(ctx, "mean_over", None):
        means = mean_over(sums, ctx.count)
    if not ctx.needs_input_grad[0]:
        grad_y = None
    elif residual is None and write:
        norm_grad_(g, y, statistics, weight, means, ctx.eps)
        grad_y = g
    elif write:
        grad_y = norm_grad(g, y, statistics, weight, means, ctx.eps)
    else:
        grad_y = norm_lif_grad(
            grad_spikes, grad_v_last, y, v0, *parameters, means, ctx.eps, ctx.timesteps, *ctx.dynamics
        )
    return (
        grad_y,
        None if residual is None else g,
        None if v0 is None else grad_v0,
        None,
        None if weight is None else sums[1],
        None if bias is None else sums[0],
        None if learnt_decay is None else grad_decay,
        *none,
    )


norm_lif.register_autograd(norm_lif_gradient, setup_context=norm_lif_setup_context)


@torch.library.custom_op("lasnn::attention", mutates_args=(), device_types="cpu")
def attention(x: Tensor, power: float, temporal: str) -> Tensor:
    """The energy sum_c |.|^power of x [T, B, C, H, W]: [B, H, W], or [T, B, H, W] for "step"."""
    return cpu.attention.attention_forward(x, power, temporal)


@torch.library.custom_op("lasnn::attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(grad: Tensor, x: Tensor, power: float, temporal: str) -> Tensor:
    """Gradient of x; for "rate" one step of it, [1, B, C, H, W], since all steps are equal."""
    return cpu.attention.attention_backward(grad, x, power, temporal)


attention.register_kernel("cuda")(launcher("attention", "attention_forward"))
attention_backward.register_kernel("cuda")(launcher("attention", "attention_backward"))


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
