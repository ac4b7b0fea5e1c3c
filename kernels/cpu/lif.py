"""LIF on the CPU: in place, without a graph over time, with a hand-written backward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lasnn.kernels.cpu.neuron import BLOCK, Dynamics, run, run_backward
from lasnn.kernels.layout import empty_step, empty_steps, in_order, segments, state_dtype, step_strides


class Blocks:
    """The elements of a step, cut into blocks that stay in cache from the first time step to the last."""

    def __init__(self, x: Tensor):
        self.strides = step_strides(x)
        self.size = x.shape[1:].numel()
        self.width = min(self.size, BLOCK * torch.get_num_threads())

    def __call__(self, steps: Tensor) -> list[tuple[Tensor, ...]]:
        """[T, ...] as one tuple of T vectors for each block: views, unless the memory order is another."""
        steps = in_order(steps, self.strides)
        plane = steps.as_strided((len(steps), self.size), (steps.stride(0), 1))
        return [block.unbind() for block in plane.split(self.width, dim=1)]

    def optional(self, step: Tensor | None) -> list[Tensor] | list[None]:
        """The same for one step, [...], or None for each block where there is none."""
        if step is None:
            return [None] * -(-self.size // self.width)
        return [block for (block,) in self(step[None])]


def lif_forward(
    x: Tensor, v0: Tensor | None, learnt_decay: Tensor | None, timesteps: int, *options
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes, v_last, the state at the start of every segment of time but the first)."""
    dtype = state_dtype(x.dtype)
    spikes, v_last = empty_steps(x, timesteps, x.dtype), empty_step(x, dtype)
    saved_states = empty_steps(x, segments(timesteps)[0] - 1, dtype)
    blocks = Blocks(x)
    if blocks.size == 0:
        return spikes, v_last, saved_states
    d = Dynamics(dtype, learnt_decay, *options)
    buffer = torch.empty((4, blocks.width), dtype=dtype)
    for xs, outs, v, start, saved in zip(
        blocks(x), blocks(spikes), blocks.optional(v_last), blocks.optional(v0), blocks(saved_states), strict=True
    ):
        *used, now = buffer[:, : len(v)]
        run(d, timesteps, Current(xs, now), outs, v, start, saved, used)
    return spikes, v_last, saved_states


class Current:
    """A block's input by step, in the state's type; one step of it where it is constant in time."""

    def __init__(self, xs: Sequence[Tensor], now: Tensor):
        self.xs, self.now = xs, now

    def __call__(self, t: int) -> Tensor:
        x = self.xs[t if len(self.xs) > 1 else 0]
        return x if x.dtype == self.now.dtype else self.now.copy_(x)


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
    dtype = state_dtype(x.dtype)
    grad_x = empty_steps(x, len(x), x.dtype)
    grad_v0 = x.new_empty(0, dtype=dtype) if v0 is None else empty_step(x, dtype)
    grad_decay = 0.0
    blocks = Blocks(x)
    if blocks.size:
        d = Dynamics(dtype, learnt_decay, *options)
        # Several steps of gradient for one of x are added up.
        total = len(x) < timesteps
        in_place = not total and x.dtype == dtype
        buffer = torch.empty((7, blocks.width), dtype=dtype)
        planes = torch.empty((2 if learnt_decay is None else 3, segments(timesteps)[1], blocks.width), dtype=dtype)
        none = [None] * -(-blocks.size // blocks.width)

        for xs, incoming, grad_end, start, saved, outs, out_v0 in zip(
            blocks(x),
            none if grad_spikes is None else blocks(grad_spikes),
            blocks.optional(grad_v_last),
            blocks.optional(v0),
            blocks(saved_states),
            blocks(grad_x),
            none if v0 is None else blocks.optional(grad_v0),
            strict=True,
        ):
            *used, now, sums, gv = buffer[:, : len(xs[0])]
            gv.zero_() if grad_end is None else gv.copy_(grad_end)
            if total:
                sums.zero_()

            def deliver(t, gradient, outs=outs, sums=sums):
                if total:
                    sums.add_(gradient)
                elif not in_place:
                    outs[t].copy_(gradient)

            grad_decay += run_backward(
                d,
                timesteps,
                Current(xs, now),
                incoming,
                outs if in_place else None,
                deliver,
                gv,
                start,
                saved,
                used,
                planes[:, :, : len(gv)],
            )
            if total:
                outs[0].copy_(sums)
            if out_v0 is not None:
                out_v0.copy_(gv)
    return grad_x, grad_v0, x.new_full(() if learnt_decay is not None else (0,), grad_decay, dtype=dtype)
