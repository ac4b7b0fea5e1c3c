"""LIF on the CPU: the loops of batch norm and LIF, with nothing to normalise."""

import torch
from torch import Tensor

from lasnn.kernels.cpu import neuron
from lasnn.kernels.dynamics import Dynamics
from lasnn.kernels.layout import empty_step, empty_steps, in_order, segments, state_dtype, step_strides


def plain(x: Tensor, dtype: torch.dtype):
    """(how x's steps are cut, parameters that leave x as it is: (x - 0) * 1 + 0)."""
    cut = neuron.Cut.of(x.shape[1:].numel(), 1, 1, neuron.loops().LINE)
    return cut, neuron.vector([0, 1, 0], dtype)


def lif_forward(
    x: Tensor, v0: Tensor | None, learnt_decay: Tensor | None, timesteps: int, *options
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes, v_last, the state at the start of every segment of time but the first)."""
    dtype, strides = state_dtype(x.dtype), step_strides(x)
    spikes, v_last = empty_steps(x, timesteps, x.dtype), empty_step(x, dtype)
    saved_states = empty_steps(x, segments(timesteps)[0] - 1, dtype)
    if v_last.numel():
        cut, parameters = plain(x, dtype)
        y, v0 = in_order(x, strides), None if v0 is None else in_order(v0, strides, 0)
        y_step = y.stride(0) if len(y) > 1 else 0
        neuron.forward(
            cut,
            timesteps,
            Dynamics(*options),
            parameters,
            y,
            y_step,
            None,
            v0,
            learnt_decay,
            spikes,
            v_last,
            saved_states,
        )
    return spikes, v_last, saved_states


def lif_backward(
    grad_spikes: Tensor | None,
    grad_v_last: Tensor | None,
    x: Tensor,
    v0: Tensor | None,
    learnt_decay: Tensor | None,
    saved_states: Tensor,
    timesteps: int,
    *options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of v0 and of the learnt decay (the last two empty where there is none)."""
    dtype, strides = state_dtype(x.dtype), step_strides(x)
    grad_x = empty_steps(x, len(x), x.dtype)
    grad_v0 = x.new_empty(0, dtype=dtype) if v0 is None else empty_step(x, dtype)
    grad_decay = 0.0
    if grad_x.numel():
        cut, parameters = plain(x, dtype)
        y = in_order(x, strides)
        y_step = y.stride(0) if len(y) > 1 else 0
        grad_spikes = None if grad_spikes is None else in_order(grad_spikes, strides)
        v0, grad_v_last = (None if step is None else in_order(step, strides, 0) for step in (v0, grad_v_last))
        grad_decay = neuron.backward(
            cut,
            timesteps,
            Dynamics(*options),
            parameters,
            y,
            y_step,
            None,
            v0,
            learnt_decay,
            saved_states,
            grad_spikes,
            0 if grad_spikes is None else grad_spikes.stride(0),
            grad_v_last,
            len(x) < timesteps,
            grad_x,
            None if v0 is None else grad_v0,
            False,
        ).decay
    return grad_x, grad_v0, x.new_full(() if learnt_decay is not None else (0,), grad_decay, dtype=dtype)
