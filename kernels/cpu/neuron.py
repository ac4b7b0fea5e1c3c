"""What the CPU's ops share: tensors and options as the compiled loops take them, and the loops over time."""

from functools import cache
from math import pi
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lasnn.kernels.cpu import threads
from lasnn.kernels.dynamics import Dynamics
from lasnn.kernels.layout import segments

SURROGATES = {"atan": 0, "sigmoid": 1, "triangle": 2, "rectangle": 3, "fast-sigmoid": 4}
# From this length on, a run of one channel is cut by itself.
LONG = 64
# Elements of a vector in the widest registers.
VECTOR = 16
# Of how many parts work consists at most, whatever the number of threads: sums over parts are the same for each.
PARTS = 64


def loops():
    """The compiled loops. Numba is imported here, at the first call of an op, and never for a GPU's tensors."""
    from lasnn.kernels.cpu import loops as compiled

    return compiled


@cache
def like(dtype: torch.dtype) -> np.ndarray:
    """An empty vector from which a loop knows the type of its tensors: bf16 are uint16 there and fp16 int16."""
    numpy = {torch.bfloat16: np.uint16, torch.float16: np.int16, torch.float32: np.float32, torch.float64: np.float64}
    return np.empty(0, numpy[dtype])


@cache
def zeros(dtype: torch.dtype) -> Tensor:
    """A line of zeros, in the place of a tensor that is absent."""
    return torch.zeros(loops().LINE, dtype=dtype)


def scratch(dtype: torch.dtype, segment: int = 0) -> np.ndarray:
    """Memory for one thread's lines, and for those of a segment's steps."""
    loop = loops()
    # By torch, whose memory begins where a cache line does; and no line is read before it is written but at its end.
    size = max(loop.LINES * loop.LINE + 3 * segment * loop.LINE, 4 * loop.WIDE)
    return torch.zeros(size, dtype=dtype).numpy()


def vector(values: list[float], dtype: torch.dtype) -> np.ndarray:
    return np.array(values, np.float64 if dtype == torch.float64 else np.float32)


class Cut(NamedTuple):
    """How a step lies in memory, and the lines that it is cut into.

    `run` elements in a row belong to a channel. A group is one run where that fills a line, else a whole number of
    images (contiguous) or pixels (channels_last); one that is longer than a line is cut into pieces.
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
        size = repeats * period
        if period <= width:
            span = min(width // period, repeats) * period
            return cls(size, -(-size // span), span, span, run, channels)
        if run >= LONG:
            period = run
        pieces = -(-period // width)
        # Equal ones, but whole vectors.
        return cls(size, size // period, min(width, -(-period // pieces // VECTOR) * VECTOR), period, run, channels)

    def parts(self, steps: int) -> int:
        return max(1, min(PARTS, self.size * steps // threads.SHARE, self.groups * -(-self.span // self.width)))


def dynamics(dtype: torch.dtype, learnt_decay: Tensor | None, neuron: Dynamics) -> np.ndarray:
    """The neuron's options as the loops take them, in their order there, each rounded once to the state's type."""
    decay = neuron.decay if learnt_decay is None else learnt_decay.item()
    hard = neuron.v_reset is not None
    jump = neuron.v_reset if hard else -neuron.threshold
    return vector(
        [
            decay,
            1 - decay,
            decay if neuron.decay_input else 1,
            neuron.v_reset if hard else 0,
            neuron.threshold,
            hard,
            jump,
            hard and not neuron.detach_reset,
            0 if neuron.detach_reset else jump,
            neuron.alpha,
            1 / (2 * neuron.alpha),
            pi / 2 * neuron.alpha,
        ],
        dtype,
    )


def or_zeros(tensor: Tensor | None, dtype: torch.dtype) -> tuple[int, int]:
    """(a tensor's address, 1), or (that of a line of zeros, 0): the second is the factor of offsets from it."""
    return (zeros(dtype).data_ptr(), 0) if tensor is None else (tensor.data_ptr(), 1)


def forward(
    cut: Cut,
    timesteps: int,
    neuron: Dynamics,
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
    dtype, parts, loop, segment = saved_states.dtype, cut.parts(timesteps), loops(), segments(timesteps)[1]
    o = dynamics(dtype, learnt_decay, neuron)
    residual, residual_line = or_zeros(residual, y.dtype)
    rest, start, start_line = state_before(v0, neuron.v_reset, dtype)
    numbers = (
        parts, *cut, timesteps, segment, y.data_ptr(), y_step, residual, y_step * residual_line, residual_line,
        start, start_line, spikes.data_ptr(), 0 if v_last is None else v_last.data_ptr(), int(v_last is not None),
        saved_states.data_ptr(),
    )  # fmt: skip
    threads.run(
        lambda first, last: loop.forward(first, last, numbers, o, parameters, like(y.dtype), scratch(dtype)),
        parts,
        cut.size * timesteps,
    )
    # Until here the loops have used its memory.
    del rest


def state_before(v0: Tensor | None, v_reset: float | None, dtype: torch.dtype) -> tuple[Tensor | None, int, int]:
    """(what must be kept meanwhile, the address of v0 or of a line at rest, the factor of the offset from it)."""
    if v0 is not None or not v_reset:
        return None, *or_zeros(v0, dtype)
    line = torch.full((loops().LINE,), v_reset, dtype=dtype)
    return line, line.data_ptr(), 0


class Gradients(NamedTuple):
    """What `backward` returns: sums over a channel, [2, C] in fp64, of g and of g (y - mean); dL/d(1/tau)."""

    sums: np.ndarray
    decay: float


def backward(
    cut: Cut,
    timesteps: int,
    neuron: Dynamics,
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
    dtype, parts, loop, segment = saved_states.dtype, cut.parts(timesteps), loops(), segments(timesteps)[1]
    o = dynamics(dtype, learnt_decay, neuron)
    rest, *start = state_before(v0, neuron.v_reset, dtype)
    residual, residual_line = or_zeros(residual, y.dtype)
    grad, grad_line = or_zeros(grad_spikes, y.dtype)
    given = (
        parts, *cut, timesteps, segment, y.data_ptr(), y_step, residual, y_step * residual_line, residual_line, *start,
        saved_states.data_ptr(), grad, grad_step * grad_line, grad_line, *or_zeros(grad_v_last, dtype),
    )  # fmt: skip
    # A sum over time is written once, at its end; what is not wanted goes to a line that nobody reads.
    each = g is not None and not constant
    wanted = (
        int(constant), 0 if grad_v0 is None else grad_v0.data_ptr(), int(grad_v0 is not None), int(summed),
        int(learnt_decay is not None), int(neuron.decay_input), SURROGATES[neuron.surrogate],
    )  # fmt: skip
    sums, decays = np.zeros((parts, 2, cut.channels)), np.zeros(parts)

    def work(first: int, last: int) -> None:
        unread = torch.empty(loop.LINE, dtype=y.dtype)
        step_g = (g.data_ptr(), cut.size, 1) if each else (unread.data_ptr(), 0, 0)
        total = (unread.data_ptr(), 0) if g is None else (g.data_ptr(), 1)
        numbers = (*given, *step_g, *total, *wanted)
        memory = scratch(dtype, segment)
        loop.backward(first, last, numbers, o, parameters, sums.reshape(-1), decays, like(y.dtype), memory)

    threads.run(work, parts, cut.size * timesteps)
    # Until here the loops have used its memory.
    del rest
    return Gradients(sums.sum(0), float(decays.sum()))
