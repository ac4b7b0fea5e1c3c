"""What the CPU's ops share: tensors and options as the compiled loops take them, and the loops over time."""

from math import pi
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lasnn.kernels.cpu import threads
from lasnn.kernels.layout import segments

SURROGATES = {"atan": 0, "sigmoid": 1, "triangle": 2, "rectangle": 3, "fast-sigmoid": 4}
# Of how many parts work consists at most, whatever the number of threads: sums over parts are the same for each.
PARTS = 64


def loops():
    """The compiled loops. Numba is imported here, at the first call of an op, and never for a GPU's tensors."""
    from lasnn.kernels.cpu import loops as compiled

    return compiled


def flat(tensor: Tensor) -> np.ndarray:
    """The memory between a tensor's first and last element, as a vector; bf16 as uint16 and fp16 as int16."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    vector = tensor.detach().as_strided((size if tensor.numel() else 0,), (1,))
    if tensor.dtype == torch.bfloat16:
        return vector.view(torch.int16).numpy().view(np.uint16)
    return (vector.view(torch.int16) if tensor.dtype == torch.float16 else vector).numpy()


def vector(values: list[float], dtype: torch.dtype) -> np.ndarray:
    return np.array(values, np.float64 if dtype == torch.float64 else np.float32)


class Cut(NamedTuple):
    """How a step lies in memory, and the lines that it is cut into.

    A group is a whole number of images (contiguous) or pixels (channels_last); one that is longer than a line is cut
    into pieces. `run` elements in a row belong to a channel.
    """

    size: int
    groups: int
    width: int
    span: int
    run: int
    channels: int

    @classmethod
    def of(cls, repeats: int, run: int, channels: int, width: int) -> "Cut":
        """`repeats` times `channels` runs, in lines of at most `width` elements."""
        period = run * channels
        if period <= width:
            span = min(width // period, repeats) * period
            return cls(repeats * period, -(-repeats * period // span), span, span, run, channels)
        pieces = -(-period // width)
        # Equal ones, but whole vectors.
        return cls(repeats * period, repeats, min(width, -(-period // pieces // 32) * 32), period, run, channels)

    def parts(self, steps: int) -> int:
        return max(1, min(PARTS, self.size * steps // threads.SHARE, self.groups * -(-self.span // self.width)))


def dynamics(
    dtype: torch.dtype,
    learnt_decay: Tensor | None,
    decay: float,
    threshold: float,
    decay_input: bool,
    v_reset: float | None,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
) -> np.ndarray:
    """The neuron's options as the loops take them, in their order there, each rounded once to the state's type."""
    decay = decay if learnt_decay is None else learnt_decay.item()
    hard = v_reset is not None
    jump = v_reset if hard else -threshold
    return vector(
        [
            decay,
            1 - decay,
            decay if decay_input else 1,
            v_reset if hard else 0,
            threshold,
            hard,
            jump,
            hard and not detach_reset,
            0 if detach_reset else jump,
            alpha,
            1 / (2 * alpha),
            pi / 2 * alpha,
        ],
        dtype,
    )


def or_constant(tensor: Tensor | None, value: float, dtype: torch.dtype) -> tuple[np.ndarray, int]:
    """(a tensor's memory, 1), or where there is none (a line of one value, 0): the factor of the offset in it."""
    if tensor is None:
        return flat(torch.full((loops().LINE,), value, dtype=dtype)), 0
    return flat(tensor), 1


def forward(
    cut: Cut,
    timesteps: int,
    options: tuple,
    parameters: np.ndarray,
    y: Tensor,
    y_step: int,
    residual: Tensor | None,
    v0: Tensor | None,
    learnt_decay: Tensor | None,
    spikes: Tensor,
    v_last: Tensor | None,
    saved_states: Tensor,
) -> None:
    """All steps of a neuron that receives (y - mean) * scale + bias (+ residual), into the last three tensors.

    Args:
        parameters: mean, scale and bias by channel, [3, C], flat.
        y_step: elements from one step of y to the next; 0 where y is constant in time, as the residual then is.
    """
    dtype, parts = saved_states.dtype, cut.parts(timesteps)
    o = dynamics(dtype, learnt_decay, *options)
    residual, residual_line = or_constant(residual, 0, y.dtype)
    start, start_line = or_constant(v0, 0.0 if options[3] is None else options[3], dtype)
    ends = v_last is not None
    inputs = (flat(y), y_step, residual, y_step * residual_line, residual_line, start, start_line)
    outputs = (flat(spikes), flat(v_last if ends else saved_states), ends, flat(saved_states))
    loop = loops()

    def work(first: int, last: int) -> None:
        scratch = flat(torch.empty(loop.SCRATCH, dtype=dtype))
        loop.forward(
            first, last, parts, cut, timesteps, segments(timesteps)[1], o, parameters, *inputs, *outputs, scratch
        )

    threads.run(work, parts, cut.size * timesteps)


class Gradients(NamedTuple):
    """What `backward` returns: sums over a channel, [2, C] in fp64, of g and of g (y - mean); dL/d(1/tau)."""

    sums: np.ndarray
    decay: float


def backward(
    cut: Cut,
    timesteps: int,
    options: tuple,
    parameters: np.ndarray,
    y: Tensor,
    y_step: int,
    residual: Tensor | None,
    v0: Tensor | None,
    learnt_decay: Tensor | None,
    saved_states: Tensor,
    grad_spikes: Tensor | None,
    grad_step: int,
    grad_v_last: Tensor | None,
    constant: bool,
    g: Tensor | None,
    grad_v0: Tensor | None,
    summed: bool,
) -> Gradients:
    """The way back through what `forward` does; writes g, the gradient of what the neuron receives, and grad_v0.

    Args:
        grad_step: elements from one step of grad_spikes to the next.
        constant: g is one step, the sum over time.
        summed: whether the sums over channels are wanted.
    """
    dtype, parts, loop = saved_states.dtype, cut.parts(timesteps), loops()
    o = dynamics(dtype, learnt_decay, *options)
    residual, residual_line = or_constant(residual, 0, y.dtype)
    start, start_line = or_constant(v0, 0.0 if options[3] is None else options[3], dtype)
    grad, grad_line = or_constant(grad_spikes, 0, y.dtype)
    end, end_line = or_constant(grad_v_last, 0, dtype)
    inputs = (flat(y), y_step, residual, y_step * residual_line, residual_line, start, start_line, flat(saved_states))
    gradients = (grad, grad_step * grad_line, grad_line, end, end_line)
    into, into_line = or_constant(g, 0, y.dtype)
    into_step = 0 if constant else cut.size * into_line
    begins, learnt = grad_v0 is not None, learnt_decay is not None
    grad_v0 = flat(grad_v0 if begins else saved_states)
    sums, decays = np.zeros((parts, 2, cut.channels)), np.zeros(parts)
    segment = segments(timesteps)[1]

    def work(first: int, last: int) -> None:
        hs, vs = (flat(torch.empty(count * loop.LINE, dtype=dtype)) for count in (segment, segment if learnt else 0))
        spare, scratch = flat(torch.empty(loop.LINE, dtype=y.dtype)), flat(torch.empty(loop.SCRATCH, dtype=dtype))
        # A sum over time is written once, at its end; what is not wanted goes to a line that nobody reads.
        step_g = (spare, 0, 0) if g is None or constant else (into, into_step, into_line)
        loop.backward(
            first, last, parts, cut, timesteps, segment, SURROGATES[options[4]], o, parameters, *inputs, *gradients,
            *step_g, into, into_line, constant, grad_v0, begins, sums.reshape(-1), summed, decays, learnt, options[2],
            hs, vs, scratch,
        )  # fmt: skip

    threads.run(work, parts, cut.size * timesteps)
    return Gradients(sums.sum(0), float(decays.sum()))
