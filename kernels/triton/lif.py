"""LIF in Triton: all time steps in one kernel, the state in registers, h recomputed in the backward pass.

A program handles BLOCK elements of a step. Time runs in segments of at most MAX_STEPS: the backward pass
holds one segment's h in registers and starts the next from the state that the forward pass saved before
it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasnn.kernels.layout import empty_step, empty_steps, in_order, is_dense, segments, state_dtype, step_strides
from lasnn.kernels.triton.neuron import OPTIONS, dynamics, fire, lif_step, lif_step_backward, surrogate

# Elements a program handles, and warps: 16 bytes of each tensor's step for every thread.
LAUNCH = {torch.float32: (512, 4), torch.bfloat16: (1024, 4), torch.float16: (1024, 4)}


@triton.jit
def within(index, size, condition):
    """Mask of the elements of a step; none where the scalar condition fails."""
    return index < tl.where(condition, size, 0)


@triton.jit
def input_offsets(index, sizes, strides):
    """Where element `index` of a step, counted in the outputs' memory order, lies in a step of x."""
    offsets = index * 0
    for d in tl.static_range(len(sizes)):
        offsets += index % sizes[d] * strides[d]
        index = index // sizes[d]
    return offsets


@triton.jit
def lif_forward_kernel(
    x_ptr,
    v0_ptr,
    decay_ptr,
    spikes_ptr,
    v_last_ptr,
    saved_states_ptr,
    x_stride_t: tl.int64,
    step_size: tl.int64,
    sizes,
    strides,
    decay,
    threshold,
    v_reset,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_V0: tl.constexpr,
    LEARNT: tl.constexpr,
    CONSTANT: tl.constexpr,
    DENSE: tl.constexpr,
    HARD: tl.constexpr,
    DECAY_INPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < step_size
    x_ptrs = x_ptr + (index if DENSE else input_offsets(index, sizes, strides))
    if LEARNT:
        decay = tl.load(decay_ptr)
    if HAS_V0:
        v = tl.load(v0_ptr + index, mask=mask, other=0.0)
    else:
        v = tl.zeros((BLOCK,), tl.float32) + (v_reset if HARD else 0.0)
    if CONSTANT:
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)

    SEGMENTS: tl.constexpr = (T + STEPS - 1) // STEPS
    for n in range(SEGMENTS):
        segment = tl.cast(n, tl.int64) if SEGMENTS > 1 else 0
        first = segment * STEPS
        for i in tl.static_range(STEPS):
            live = mask if T % STEPS == 0 else within(index, step_size, first + i < T)
            if not CONSTANT:
                x = tl.load(x_ptrs + (first + i) * x_stride_t, mask=live, other=0.0).to(tl.float32)
            _h, s, after = lif_step(v, x, decay, threshold, v_reset, HARD, DECAY_INPUT)
            v = tl.where(live, after, v)
            tl.store(spikes_ptr + (first + i) * step_size + index, s.to(spikes_ptr.dtype.element_ty), mask=live)
        if SEGMENTS > 1:
            followed = within(index, step_size, segment < SEGMENTS - 1)
            tl.store(saved_states_ptr + segment * step_size + index, v, mask=followed)
    tl.store(v_last_ptr + index, v, mask=mask)


@triton.jit
def lif_backward_kernel(
    grad_spikes_ptr,
    grad_v_last_ptr,
    x_ptr,
    v0_ptr,
    decay_ptr,
    saved_states_ptr,
    grad_x_ptr,
    grad_v0_ptr,
    grad_decay_ptr,
    grad_stride_t: tl.int64,
    x_stride_t: tl.int64,
    step_size: tl.int64,
    sizes,
    strides,
    decay,
    threshold,
    v_reset,
    alpha,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_GRAD_SPIKES: tl.constexpr,
    HAS_GRAD_V_LAST: tl.constexpr,
    HAS_V0: tl.constexpr,
    LEARNT: tl.constexpr,
    CONSTANT: tl.constexpr,
    DENSE: tl.constexpr,
    HARD: tl.constexpr,
    DECAY_INPUT: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    SURROGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < step_size
    x_ptrs = x_ptr + (index if DENSE else input_offsets(index, sizes, strides))
    v_rest = v_reset if HARD else 0.0
    if LEARNT:
        decay = tl.load(decay_ptr)
        grad_decay = tl.zeros((BLOCK,), tl.float32)
    if HAS_GRAD_V_LAST:
        grad_v = tl.load(grad_v_last_ptr + index, mask=mask, other=0.0)
    else:
        grad_v = tl.zeros((BLOCK,), tl.float32)
    if CONSTANT:
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        grad_sum = tl.zeros((BLOCK,), tl.float32)

    SEGMENTS: tl.constexpr = (T + STEPS - 1) // STEPS
    for n in range(SEGMENTS):
        segment = tl.cast(SEGMENTS - 1 - n, tl.int64) if SEGMENTS > 1 else 0
        first = segment * STEPS
        if HAS_V0:
            earliest = mask if SEGMENTS == 1 else within(index, step_size, segment == 0)
            v = tl.load(v0_ptr + index, mask=earliest, other=0.0)
        else:
            v = tl.zeros((BLOCK,), tl.float32) + v_rest
        if SEGMENTS > 1:
            later = within(index, step_size, segment > 0)
            saved = tl.load(saved_states_ptr + (segment - 1) * step_size + index, mask=later, other=0.0)
            v = tl.where(segment > 0, saved, v)

        hs = ()
        start = v
        for i in tl.static_range(STEPS):
            live = mask if T % STEPS == 0 else within(index, step_size, first + i < T)
            if not CONSTANT:
                x = tl.load(x_ptrs + (first + i) * x_stride_t, mask=live, other=0.0).to(tl.float32)
            h, _s, v = lif_step(v, x, decay, threshold, v_reset, HARD, DECAY_INPUT)
            hs = hs + (h,)  # noqa: RUF005 (Triton takes no starred expression)

        for j in tl.static_range(STEPS):
            t = first + STEPS - 1 - j
            live = mask if T % STEPS == 0 else within(index, step_size, t < T)
            h = hs[-1]
            hs = hs[:-1]
            if HAS_GRAD_SPIKES:
                grad_s = tl.load(grad_spikes_ptr + t * grad_stride_t + index, mask=live, other=0.0).to(tl.float32)
            else:
                grad_s = tl.zeros((BLOCK,), tl.float32)
            grad_h = lif_step_backward(grad_s, grad_v, h, threshold, v_reset, alpha, HARD, DETACH_RESET, SURROGATE)
            if T % STEPS != 0:
                grad_h = tl.where(live, grad_h, 0.0)
                grad_v = tl.where(live, grad_h * (1.0 - decay), grad_v)
            else:
                grad_v = grad_h * (1.0 - decay)
            if CONSTANT:
                grad_sum += grad_h
            else:
                grad_x = grad_h * decay if DECAY_INPUT else grad_h
                tl.store(grad_x_ptr + t * step_size + index, grad_x.to(grad_x_ptr.dtype.element_ty), mask=live)
            if LEARNT:
                # The potential before this step, from the step before: cheaper than registers to hold it.
                if j == STEPS - 1:
                    before = start
                else:
                    _, before = fire(hs[-1], threshold, v_reset, HARD)
                slope = v_rest - before
                if DECAY_INPUT:
                    if not CONSTANT:
                        x = tl.load(x_ptrs + t * x_stride_t, mask=live, other=0.0).to(tl.float32)
                    slope += x
                grad_decay += tl.where(live, grad_h * slope, 0.0)

    if CONSTANT:
        grad_x = grad_sum * decay if DECAY_INPUT else grad_sum
        tl.store(grad_x_ptr + index, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if HAS_V0:
        tl.store(grad_v0_ptr + index, grad_v, mask=mask)
    if LEARNT:
        # The second stage of the sum, over programs, follows the launch: no atomics, so that results repeat.
        tl.store(grad_decay_ptr + tl.program_id(0), tl.sum(grad_decay, 0))


def input_dimensions(x: Tensor, order: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of x's step, innermost dimension of the outputs first, joined where they run on."""
    dims = sorted(zip(order, x.shape[1:], x.stride()[1:], strict=True))
    sizes, strides = [], []
    for _, size, stride in dims:
        if size == 1:
            continue
        if sizes and stride == sizes[-1] * strides[-1]:
            sizes[-1] *= size
        else:
            sizes.append(size)
            strides.append(stride)
    return tuple(sizes), tuple(strides)


def addressing(x: Tensor) -> dict:
    """The kernel arguments that say where x lies."""
    order = step_strides(x)
    dense = is_dense(x.shape[1:], x.stride()[1:])
    sizes, strides = ((), ()) if dense else input_dimensions(x, order)
    return {
        "x_stride_t": x.stride(0),
        "step_size": x.shape[1:].numel(),
        "sizes": sizes,
        "strides": strides,
        "CONSTANT": len(x) == 1,
        "DENSE": dense,
    }


def lif_forward(
    x: Tensor,
    v0: Tensor | None,
    learnt_decay: Tensor | None,
    timesteps: int,
    *options,
) -> tuple[Tensor, Tensor, Tensor]:
    """As cpu.lif.lif_forward."""
    state, order = state_dtype(x.dtype), step_strides(x)
    spikes, v_last = empty_steps(x, timesteps, x.dtype), empty_step(x, state)
    saved_states = empty_steps(x, segments(timesteps)[0] - 1, state)
    if v_last.numel():
        block, num_warps = LAUNCH[x.dtype]
        # Any tensor stands in for one that is absent: the kernel does not touch it.
        lif_forward_kernel[(triton.cdiv(v_last.numel(), block),)](
            x,
            v_last if v0 is None else in_order(v0, order, leading=0),
            v_last if learnt_decay is None else learnt_decay,
            spikes,
            v_last,
            saved_states,
            **addressing(x),
            **dynamics(timesteps, learnt_decay, options),
            HAS_V0=v0 is not None,
            BLOCK=block,
            num_warps=num_warps,
            **OPTIONS,
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
    """As cpu.lif.lif_backward."""
    state, order = state_dtype(x.dtype), step_strides(x)
    block, num_warps = LAUNCH[x.dtype]
    where = addressing(x)
    # A learnt decay's sum and a strided input's addresses need registers that would spill.
    block >>= (learnt_decay is not None) + (not where["DENSE"])
    programs = triton.cdiv(x.shape[1:].numel(), block)
    grad_x = empty_steps(x, len(x), x.dtype)
    grad_v0 = x.new_empty(0, dtype=state) if v0 is None else empty_step(x, state)
    partial = x.new_empty(0 if learnt_decay is None else programs, dtype=state)
    if programs:
        if grad_spikes is not None:
            grad_spikes = in_order(grad_spikes, order)
        lif_backward_kernel[(programs,)](
            grad_x if grad_spikes is None else grad_spikes,
            grad_x if grad_v_last is None else in_order(grad_v_last, order, leading=0),
            x,
            grad_x if v0 is None else in_order(v0, order, leading=0),
            grad_x if learnt_decay is None else learnt_decay,
            saved_states,
            grad_x,
            grad_v0,
            partial,
            grad_stride_t=0 if grad_spikes is None else grad_spikes.stride(0),
            **where,
            **dynamics(timesteps, learnt_decay, options),
            HAS_V0=v0 is not None,
            HAS_GRAD_SPIKES=grad_spikes is not None,
            HAS_GRAD_V_LAST=grad_v_last is not None,
            **surrogate(options),
            BLOCK=block,
            num_warps=num_warps,
            **OPTIONS,
        )
    return grad_x, grad_v0, partial if learnt_decay is None else partial.sum()
