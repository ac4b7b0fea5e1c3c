"""The ops as PyTorch knows them: the only place where anything is registered.

Each op is functional and has a CPU implementation, a Triton one for CUDA (ROCm too), a fake for tracing and
meta tensors, and an autograd formula. The dispatcher chooses by device; nothing else does. None is registered
for autocast, which would cast what must stay fp32.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch

from lasnn.kernels import cpu, dynamics, pool
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
        # Triton launches on the current GPU, whichever the tensors are on.
        devices = (arg.device for arg in args if isinstance(arg, torch.Tensor) and arg.is_cuda)
        with torch.cuda.device(next(devices, -1)):
            return loaded(*args)

    return launch


# Not `torch.library.custom_op`, whose first call imports PyTorch's compiler: a second of every command.
LIBRARY = torch.library.Library("lasnn", "DEF")


class Op:
    """An op of PyTorch.

    Args:
        schema: `name(...) -> ...`.
        on_cpu, on_cuda: its implementations.
    """

    def __init__(self, schema: str, on_cpu: Callable, on_cuda: Callable):
        self.name = LIBRARY.define(schema)
        self.overload = getattr(torch.ops.lasnn, self.name).default
        self.implementations = {"cpu": on_cpu, "cuda": on_cuda}
        for device in self.implementations:
            LIBRARY.impl(self.name, partial(self._run, device), device.upper())

    def _run(self, device: str, *args):
        return self.implementations[device](*args)

    def __call__(self, *args):
        return self.overload(*args)

    def register_fake(self, function: Callable) -> None:
        """What the op returns on the meta device and in tracing, as far as shapes and types go."""
        torch.library.register_fake(self.overload, function, lib=LIBRARY)

    def register_autograd(self, backward: Callable, setup_context: Callable | None = None) -> None:
        """The op's gradient."""
        torch.library.register_autograd(self.overload, backward, setup_context=setup_context, lib=LIBRARY)


# Spikes [T, ...], v_last [...] and the states between the segments of time [segments - 1, ...].
lif = Op(
    f"lif(Tensor x, Tensor? v0, Tensor? learnt_decay, SymInt timesteps, {dynamics.SCHEMA}) -> (Tensor, Tensor, Tensor)",
    cpu.lif.lif_forward,
    launcher("lif", "lif_forward"),
)

# Gradients of x, v0 and learnt_decay; the last two are empty where there is none.
lif_backward = Op(
    "lif_backward(Tensor? grad_spikes, Tensor? grad_v_last, Tensor x, Tensor? v0, Tensor? learnt_decay, "
    f"Tensor saved_states, SymInt timesteps, {dynamics.SCHEMA}) -> (Tensor, Tensor, Tensor)",
    cpu.lif.lif_backward,
    launcher("lif", "lif_backward"),
)


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


# Mean and variance (over n, not n - 1) of each channel of y [N, C, H, W]: [2, C].
norm_statistics = Op(
    "norm_statistics(Tensor y) -> Tensor",
    cpu.norm_lif.norm_statistics,
    launcher("norm_lif", "norm_statistics"),
)

# Spikes [T*B, C, H, W], v_last and the states between the segments of time [(segments - 1)*B, C, H, W].
#
# y and residual are [T*B, C, H, W], or [B, C, H, W] where `constant`; `statistics` [2, C] are mean and variance, over
# `count` elements of a channel where they are y's own, so that its gradient goes through them, else count is 0. v0 and
# v_last are [B, C, H, W], in y's memory order; v_last is empty [0] unless `return_state`.
norm_lif = Op(
    "norm_lif(Tensor y, Tensor? residual, Tensor? v0, Tensor statistics, Tensor? weight, Tensor? bias, "
    "Tensor? learnt_decay, SymInt count, float eps, SymInt timesteps, bool constant, bool return_state, "
    f"{dynamics.SCHEMA}) -> (Tensor, Tensor, Tensor)",
    cpu.norm_lif.norm_lif_forward,
    launcher("norm_lif", "norm_lif_forward"),
)

# The first pass backward: each channel's sums of g and of g*z [2, C], g, and v0's and learnt_decay's gradients.
#
# g is the gradient of the neuron's input, summed over time where that is `constant`; z is y normalised, before weight
# and bias. g is empty unless `write`; the gradients of v0 and learnt_decay are empty where there is none. All that is
# of the size of images lies in y's memory order.
norm_lif_sums = Op(
    "norm_lif_sums(Tensor? grad_spikes, Tensor? grad_v_last, Tensor y, Tensor? residual, Tensor? v0, "
    "Tensor statistics, Tensor? weight, Tensor? bias, Tensor? learnt_decay, Tensor saved_states, bool write, "
    f"float eps, SymInt timesteps, bool constant, {dynamics.SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu.norm_lif.norm_lif_sums,
    launcher("norm_lif", "norm_lif_sums"),
)

# The second pass backward where g was not written: y's gradient, from g computed again. `means` [2, C] are the sums of
# the first pass over n; None where the statistics are not y's own.
norm_lif_grad = Op(
    "norm_lif_grad(Tensor? grad_spikes, Tensor? grad_v_last, Tensor y, Tensor? v0, Tensor statistics, "
    "Tensor? weight, Tensor? bias, Tensor? learnt_decay, Tensor saved_states, Tensor? means, float eps, "
    f"SymInt timesteps, {dynamics.SCHEMA}) -> Tensor",
    cpu.norm_lif.norm_lif_grad,
    launcher("norm_lif", "norm_lif_grad"),
)

# The second pass backward where g was written: y's gradient, as a batch norm alone computes it.
NORM_GRAD = "Tensor y, Tensor statistics, Tensor? weight, Tensor? means, float eps"
norm_grad = Op(
    f"norm_grad(Tensor grad, {NORM_GRAD}) -> Tensor",
    cpu.norm_lif.norm_grad,
    launcher("norm_lif", "norm_grad"),
)
# The same in the place of g, where that is not the residual's gradient too.
norm_grad_ = Op(
    f"norm_grad_(Tensor(a!) grad, {NORM_GRAD}) -> ()",
    cpu.norm_lif.norm_grad_,
    launcher("norm_lif", "norm_grad_"),
)


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
    elif residual is None and write and not torch.is_grad_enabled():
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


# The energy sum_c |.|^power of x [T, B, C, H, W]: [B, H, W], or [T, B, H, W] for "step".
attention = Op(
    "attention(Tensor x, float power, str temporal) -> Tensor",
    cpu.attention.attention_forward,
    launcher("attention", "attention_forward"),
)

# Gradient of x; for "rate" one step of it, [1, B, C, H, W], since all steps are equal.
attention_backward = Op(
    "attention_backward(Tensor grad, Tensor x, float power, str temporal) -> Tensor",
    cpu.attention.attention_backward,
    launcher("attention", "attention_backward"),
)


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


# The mean of each 2 x 2 pixels of x [N, C, H, W]: [N, C, H // 2, W // 2], in x's memory order.
avg_pool2 = Op("avg_pool2(Tensor x) -> Tensor", cpu.pool.pool_forward, pool.pool_forward)

# Gradient of x [N, C, height, width].
avg_pool2_backward = Op(
    "avg_pool2_backward(Tensor grad, SymInt height, SymInt width, bool channels_last) -> Tensor",
    cpu.pool.pool_backward,
    pool.pool_backward,
)


@avg_pool2.register_fake
def _(x):
    return pool.pool_forward(x)


@avg_pool2_backward.register_fake
def _(grad, height, width, channels_last):
    return pool.pool_backward(grad, height, width, channels_last)


def avg_pool2_setup_context(ctx, inputs, output):
    (x,) = inputs
    # Not x itself, which would be kept for its shape.
    ctx.shape = (*x.shape[2:], memory_format(x) is torch.channels_last)


def avg_pool2_gradient(ctx, grad):
    return avg_pool2_backward(grad, *ctx.shape)


avg_pool2.register_autograd(avg_pool2_gradient, setup_context=avg_pool2_setup_context)


def no_second_gradient(ctx, *_):
    raise NotImplementedError("lasnn's ops have no second derivative: a gradient cannot be differentiated again")


for op in (
    norm_statistics,
    lif_backward,
    norm_lif_sums,
    norm_lif_grad,
    norm_grad,
    attention_backward,
    avg_pool2_backward,
):
    op.register_autograd(no_second_gradient)
