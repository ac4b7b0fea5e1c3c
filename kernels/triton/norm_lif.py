"""Batch norm, an optional residual and LIF in Triton: y is normalised in registers, on its way into the neuron.

A program handles tiles of channels x positions, wide along whichever of the two is contiguous. A position counts
images and pixels of one time step, so that small images fill a tile together. Sums over positions are taken in two
stages, within a program and then over programs: there are no atomics, so that results repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasnn.kernels.layout import empty_images, memory_format, segments, state_dtype
from lasnn.kernels.triton.neuron import OPTIONS, dynamics, fire, lif_step, lif_step_backward, surrogate

# Bytes of a tile: 16 for every thread of 4 warps. What holds no state reads twice as much at once.
TILE = 2048
STREAM = 2 * TILE
NUM_WARPS = 4
# Bytes that a tile takes in a row at least, where the channels are wide enough: a cache line.
ROW = 128
# Programs that share a sum: a constant, not the device's number of processors, so that every GPU sums alike.
PROGRAMS = 2048
# (programs, channels) of a tile of the sum's second stage
PARTIAL_TILE = {"BLOCK_S": 256, "BLOCK_C": 4}


@triton.jit
def channels_of(program, channel_blocks, BLOCK_C: tl.constexpr):
    """(a program's channels, its place among the programs of these channels)."""
    c = (program % channel_blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, program // channel_blocks


@triton.jit
def tile_of(c, tile, channels, positions, P: tl.constexpr, LAST: tl.constexpr, BLOCK_Q: tl.constexpr):
    """(offsets in a step, mask) of a tile. 64-bit, but for the position in the tile, which is divided by P."""
    start = tl.cast(tile, tl.int64) * BLOCK_Q
    q = tl.arange(0, BLOCK_Q)
    mask = (c < channels)[:, None] & (start + q < positions)[None, :]
    if LAST:
        return (start + q)[None, :] * channels + c[:, None], mask
    q += (start % P).to(tl.int32)
    # So many pixels in a row are of one image. Not every Triton finds that out, and without it no load is a wide one.
    RUN: tl.constexpr = (P & -P) if (P & -P) < BLOCK_Q else BLOCK_Q
    images = tl.max_constancy(start // P + q // P, RUN)
    pixels = tl.max_contiguous(tl.multiple_of(q % P, RUN), RUN)
    return images[None, :] * (channels * P) + c[:, None] * P + pixels[None, :], mask


@triton.jit
def positions_in_tile(tile, positions, BLOCK_Q: tl.constexpr):
    """How many positions a tile has; the last one may have fewer than the others."""
    return tl.minimum(positions - tl.cast(tile, tl.int64) * BLOCK_Q, BLOCK_Q).to(tl.float32)


@triton.jit
def of_channels(ptr, c, channels, GIVEN: tl.constexpr, default):
    return tl.load(ptr + c, mask=c < channels, other=0.0)[:, None] if GIVEN else default


@triton.jit
def normalisation(statistics_ptr, weight_ptr, c, channels, eps, HAS_WEIGHT: tl.constexpr):
    """(mean, 1 / standard deviation, the same times weight)"""
    mean = of_channels(statistics_ptr, c, channels, True, 0.0)
    var = of_channels(statistics_ptr + channels, c, channels, True, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    return mean, rstd, rstd * of_channels(weight_ptr, c, channels, HAS_WEIGHT, 1.0)


@triton.jit
def input_current(y, mean, scale, bias, residual_ptrs, mask, HAS_RESIDUAL: tl.constexpr):
    """The neuron's input. Every kernel runs this, so that they agree bit for bit."""
    x = (y.to(tl.float32) - mean) * scale + bias
    if HAS_RESIDUAL:
        x += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def input_gradient(g, y, mean, rstd, scale, mean_g, mean_gz):
    """The batch norm's, from its output's gradient g."""
    return scale * (g - mean_g - (y.to(tl.float32) - mean) * (rstd * mean_gz))


@triton.jit
def partial_statistics_kernel(
    y_ptr,
    partial_ptr,
    channels: tl.int64,
    positions: tl.int64,
    channel_blocks,
    tiles,
    splits,
    P: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    c, split = channels_of(tl.program_id(0), channel_blocks, BLOCK_C)
    # Sums of what is near 0 lose nothing: deviations are taken from the mean of the first tile.
    offsets, mask = tile_of(c, split, channels, positions, P, LAST, BLOCK_Q)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    pivot = tl.sum(y, 1) / positions_in_tile(split, positions, BLOCK_Q)
    n = 0.0
    total = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    for tile in range(split, tiles, splits):
        offsets, mask = tile_of(c, tile, channels, positions, P, LAST, BLOCK_Q)
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, y - pivot[:, None], 0.0)
        n += positions_in_tile(tile, positions, BLOCK_Q)
        total += deviation
        squares += deviation * deviation
    shift = tl.sum(total, 1) / n
    partial_ptrs = partial_ptr + split * channels + c
    size = splits * channels
    inside = c < channels
    tl.store(partial_ptrs, n + tl.zeros((BLOCK_C,), tl.float32), mask=inside)
    tl.store(partial_ptrs + size, pivot + shift, mask=inside)
    tl.store(partial_ptrs + 2 * size, tl.sum(squares, 1) - n * shift * shift, mask=inside)


@triton.jit
def statistics_kernel(
    partial_ptr, statistics_ptr, channels: tl.int64, splits, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and variance of all positions, from those of each split: their variances, and that of their means."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    size = splits * channels
    pivot = tl.load(partial_ptr + size + c, mask=c < channels, other=0.0)
    count = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        mask = (split < splits)[:, None] & (c < channels)[None, :]
        ptrs = partial_ptr + split.to(tl.int64)[:, None] * channels + c[None, :]
        n = tl.load(ptrs, mask=mask, other=0.0)
        deviation = tl.where(mask, tl.load(ptrs + size, mask=mask, other=0.0) - pivot[None, :], 0.0)
        count += n
        total += n * deviation
        squares += tl.load(ptrs + 2 * size, mask=mask, other=0.0) + n * deviation * deviation
    n = tl.sum(count, 0)
    shift = tl.sum(total, 0) / n
    tl.store(statistics_ptr + c, pivot + shift, mask=c < channels)
    # What is 0 but for rounding must not be below it.
    variance = tl.sum(squares, 0) / n - shift * shift
    tl.store(statistics_ptr + channels + c, tl.where(variance < 0, 0.0, variance), mask=c < channels)


@triton.jit
def norm_lif_forward_kernel(
    y_ptr,
    residual_ptr,
    v0_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    decay_ptr,
    spikes_ptr,
    v_last_ptr,
    saved_states_ptr,
    channels: tl.int64,
    positions: tl.int64,
    channel_blocks,
    eps,
    decay,
    threshold,
    v_reset,
    P: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    CONSTANT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_V0: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RETURN_STATE: tl.constexpr,
    LEARNT: tl.constexpr,
    HARD: tl.constexpr,
    DECAY_INPUT: tl.constexpr,
):
    c, tile = channels_of(tl.program_id(0), channel_blocks, BLOCK_C)
    mean, _rstd, scale = normalisation(statistics_ptr, weight_ptr, c, channels, eps, HAS_WEIGHT)
    bias = of_channels(bias_ptr, c, channels, HAS_BIAS, 0.0)
    if LEARNT:
        decay = tl.load(decay_ptr)
    offsets, mask = tile_of(c, tile, channels, positions, P, LAST, BLOCK_Q)
    step = channels * positions
    if HAS_V0:
        v = tl.load(v0_ptr + offsets, mask=mask, other=0.0)
    else:
        v = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32) + (v_reset if HARD else 0.0)
    if CONSTANT:
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
        x = input_current(y, mean, scale, bias, residual_ptr + offsets, mask, HAS_RESIDUAL)

    SEGMENTS: tl.constexpr = (T + STEPS - 1) // STEPS
    for n in range(SEGMENTS):
        segment = tl.cast(n, tl.int64) if SEGMENTS > 1 else 0
        for i in tl.static_range(STEPS):
            t = segment * STEPS + i
            live = mask if T % STEPS == 0 else tl.where(t < T, mask, False)
            at = t * step + offsets
            if not CONSTANT:
                y = tl.load(y_ptr + at, mask=live, other=0.0)
                x = input_current(y, mean, scale, bias, residual_ptr + at, live, HAS_RESIDUAL)
            _h, s, after = lif_step(v, x, decay, threshold, v_reset, HARD, DECAY_INPUT)
            # Only where it is returned does v matter beyond T.
            v = tl.where(live, after, v) if RETURN_STATE and T % STEPS != 0 else after
            tl.store(spikes_ptr + at, s.to(spikes_ptr.dtype.element_ty), mask=live)
        if SEGMENTS > 1:
            followed = tl.where(segment < SEGMENTS - 1, mask, False)
            tl.store(saved_states_ptr + segment * step + offsets, v, mask=followed)
    if RETURN_STATE:
        tl.store(v_last_ptr + offsets, v, mask=mask)


@triton.jit
def norm_lif_backward_kernel(
    grad_spikes_ptr,
    grad_v_last_ptr,
    y_ptr,
    residual_ptr,
    v0_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    decay_ptr,
    saved_states_ptr,
    means_ptr,
    grad_ptr,
    sums_ptr,
    grad_v0_ptr,
    grad_decay_ptr,
    channels: tl.int64,
    positions: tl.int64,
    channel_blocks,
    tiles,
    splits,
    eps,
    decay,
    threshold,
    v_reset,
    alpha,
    P: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    CONSTANT: tl.constexpr,
    HAS_GRAD_SPIKES: tl.constexpr,
    HAS_GRAD_V_LAST: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_V0: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    LEARNT: tl.constexpr,
    HARD: tl.constexpr,
    DECAY_INPUT: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    SURROGATE: tl.constexpr,
    SUMS: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Either pass: with SUMS the first, which adds g up and writes it where asked to, else y's gradient from g."""
    c, split = channels_of(tl.program_id(0), channel_blocks, BLOCK_C)
    mean, rstd, scale = normalisation(statistics_ptr, weight_ptr, c, channels, eps, HAS_WEIGHT)
    bias = of_channels(bias_ptr, c, channels, HAS_BIAS, 0.0)
    v_rest = v_reset if HARD else 0.0
    if LEARNT:
        decay = tl.load(decay_ptr)
    if SUMS:
        sum_g = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
        sum_gy = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
        sum_decay = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    else:
        mean_g = of_channels(means_ptr, c, channels, HAS_MEANS, 0.0)
        mean_gz = of_channels(means_ptr + channels, c, channels, HAS_MEANS, 0.0)

    step = channels * positions
    SEGMENTS: tl.constexpr = (T + STEPS - 1) // STEPS
    for tile in range(split, tiles, splits):
        offsets, mask = tile_of(c, tile, channels, positions, P, LAST, BLOCK_Q)
        if HAS_GRAD_V_LAST:
            grad_v = tl.load(grad_v_last_ptr + offsets, mask=mask, other=0.0)
        else:
            grad_v = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
        if CONSTANT:
            y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
            x = input_current(y, mean, scale, bias, residual_ptr + offsets, mask, HAS_RESIDUAL)
            g = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
        for n in range(SEGMENTS):
            segment = tl.cast(SEGMENTS - 1 - n, tl.int64) if SEGMENTS > 1 else 0
            if HAS_V0:
                earliest = mask if SEGMENTS == 1 else tl.where(segment == 0, mask, False)
                start = tl.load(v0_ptr + offsets, mask=earliest, other=0.0)
            else:
                start = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32) + v_rest
            if SEGMENTS > 1:
                saved_ptrs = saved_states_ptr + (segment - 1) * step + offsets
                saved = tl.load(saved_ptrs, mask=tl.where(segment > 0, mask, False), other=v_rest)
                start = tl.where(segment > 0, saved, start) if HAS_V0 else saved

            v = start
            # y is read again on the way back, from cache: to hold it as well as h would take registers that there are
            # not. The policies ask for that, and keep the two reads from being made one.
            hs = ()
            at = segment * STEPS * step + offsets
            for i in tl.static_range(STEPS):
                t = segment * STEPS + i
                live = mask if T % STEPS == 0 else tl.where(t < T, mask, False)
                if not CONSTANT:
                    y = tl.load(y_ptr + at, mask=live, other=0.0, eviction_policy="evict_last")
                    x = input_current(y, mean, scale, bias, residual_ptr + at, live, HAS_RESIDUAL)
                h, _s, v = lif_step(v, x, decay, threshold, v_reset, HARD, DECAY_INPUT)
                hs = hs + (h,)  # noqa: RUF005 (Triton takes no starred expression)
                at += step

            for j in tl.static_range(STEPS):
                t = segment * STEPS + STEPS - 1 - j
                live = mask if T % STEPS == 0 else tl.where(t < T, mask, False)
                at -= step
                h = hs[-1]
                hs = hs[:-1]
                if HAS_GRAD_SPIKES:
                    grad_s = tl.load(grad_spikes_ptr + at, mask=live, other=0.0).to(tl.float32)
                else:
                    grad_s = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
                grad_h = lif_step_backward(grad_s, grad_v, h, threshold, v_reset, alpha, HARD, DETACH_RESET, SURROGATE)
                grad_h = tl.where(live, grad_h, 0.0)
                if HAS_GRAD_V_LAST and T % STEPS != 0:
                    grad_v = tl.where(live, grad_h * (1.0 - decay), grad_v)
                else:
                    # A step beyond T leaves grad_v at the 0 it starts from.
                    grad_v = grad_h * (1.0 - decay)
                if not CONSTANT:
                    y = tl.load(y_ptr + at, mask=live, other=0.0, eviction_policy="evict_first")
                if LEARNT and SUMS:
                    # The potential before this step, from the step before: cheaper than registers to hold it.
                    if j == STEPS - 1:
                        before = start
                    else:
                        _, before = fire(hs[-1], threshold, v_reset, HARD)
                    slope = v_rest - before
                    if DECAY_INPUT:
                        if not CONSTANT:
                            x = input_current(y, mean, scale, bias, residual_ptr + at, live, HAS_RESIDUAL)
                        slope += x
                    sum_decay += tl.where(live, grad_h * slope, 0.0)
                grad_x = grad_h * decay if DECAY_INPUT else grad_h
                if CONSTANT:
                    g += grad_x
                elif SUMS:
                    sum_g += grad_x
                    sum_gy += grad_x * (y.to(tl.float32) - mean)
                    if WRITE:
                        tl.store(grad_ptr + at, grad_x.to(grad_ptr.dtype.element_ty), mask=live)
                else:
                    grad_y = input_gradient(grad_x, y, mean, rstd, scale, mean_g, mean_gz)
                    tl.store(grad_ptr + at, grad_y.to(grad_ptr.dtype.element_ty), mask=live)
        if CONSTANT:
            sum_g += g
            sum_gy += g * (y.to(tl.float32) - mean)
            if WRITE:
                tl.store(grad_ptr + offsets, g.to(grad_ptr.dtype.element_ty), mask=mask)
        if SUMS and HAS_V0:
            tl.store(grad_v0_ptr + offsets, grad_v, mask=mask)

    if SUMS:
        sums_ptrs = sums_ptr + split.to(tl.int64) * channels + c
        tl.store(sums_ptrs, tl.sum(sum_g, 1), mask=c < channels)
        sum_gz = tl.sum(sum_gy * rstd, 1)
        tl.store(sums_ptrs + splits * channels, sum_gz, mask=c < channels)
        if LEARNT:
            tl.store(grad_decay_ptr + tl.program_id(0), tl.sum(sum_decay))


@triton.jit
def norm_grad_kernel(
    grad_ptr,
    y_ptr,
    statistics_ptr,
    weight_ptr,
    means_ptr,
    grad_y_ptr,
    channels: tl.int64,
    positions: tl.int64,
    channel_blocks,
    eps,
    P: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MEANS: tl.constexpr,
):
    c, tile = channels_of(tl.program_id(0), channel_blocks, BLOCK_C)
    mean, rstd, scale = normalisation(statistics_ptr, weight_ptr, c, channels, eps, HAS_WEIGHT)
    mean_g = of_channels(means_ptr, c, channels, HAS_MEANS, 0.0)
    mean_gz = of_channels(means_ptr + channels, c, channels, HAS_MEANS, 0.0)
    offsets, mask = tile_of(c, tile, channels, positions, P, LAST, BLOCK_Q)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
    grad_y = input_gradient(g, y, mean, rstd, scale, mean_g, mean_gz)
    tl.store(grad_y_ptr + offsets, grad_y.to(grad_y_ptr.dtype.element_ty), mask=mask)


def channels_inside(images: Tensor) -> bool:
    """Whether channels are what is contiguous: also where one pixel is an image, since they run on to the next one."""
    return images.shape[2:].numel() == 1 or memory_format(images) == torch.channels_last


def backward_tile(y: Tensor, timesteps: int, learnt: bool) -> int:
    """Bytes of a tile in a backward pass: fewer where registers would spill.

    They do for a learnt decay's sum; and where each of a thread's 8 elements is of another channel, with constants of
    its own, in segments of more than 4 steps.
    """
    tight = channels_inside(y) and y.element_size() == 2 and segments(timesteps)[1] > 4
    return TILE // 2 if learnt or tight else TILE


def uncapped() -> dict:
    """Launch options of the backward passes, which take many registers: NVIDIA's assembler gives up a word or two of
    them to end at 128 or 168, for one more program at a time, unless it is told of a limit itself; AMD's takes none.
    """
    return {} if torch.version.hip else {"maxnreg": 255}


def tiling(images: Tensor, count: int, size: int) -> tuple[dict, int]:
    """How `count` images like `images` are cut into tiles of `size` bytes: kernel arguments, and number of tiles."""
    channels, pixels = images.shape[1], images.shape[2:].numel()
    last = channels_inside(images)
    elements, row = size // images.element_size(), ROW // images.element_size()
    block_c = row if last else elements // min(max(triton.next_power_of_2(pixels), row), elements)
    block_c = min(block_c, triton.next_power_of_2(channels))
    block_q = elements // block_c
    channel_blocks, tiles = triton.cdiv(channels, block_c), triton.cdiv(count * pixels, block_q)
    where = {
        "channels": channels,
        "positions": count * pixels,
        "channel_blocks": channel_blocks,
        "P": pixels,
        "LAST": last,
        "BLOCK_C": block_c,
        "BLOCK_Q": block_q,
        "num_warps": NUM_WARPS,
        **OPTIONS,
    }
    return where, tiles


def shared(tiles: int, channel_blocks: int) -> int:
    """Number of programs among which the tiles of a block of channels are split."""
    return max(min(PROGRAMS // channel_blocks, tiles), 1)


def given(stand_in: Tensor, **tensors: Tensor | None) -> dict:
    """Kernel arguments for tensors that may be absent: `stand_in` then takes their place, and is not touched."""
    pointers = {f"{name}_ptr": stand_in if tensor is None else tensor for name, tensor in tensors.items()}
    return pointers | {f"HAS_{name.upper()}": tensor is not None for name, tensor in tensors.items()}


def norm_statistics(y: Tensor) -> Tensor:
    """As cpu.norm_lif.norm_statistics."""
    channels, state = y.shape[1], state_dtype(y.dtype)
    if y.numel() == 0:
        return y.new_full((2, channels), float("nan"), dtype=state)
    where, tiles = tiling(y, len(y), STREAM)
    splits = shared(tiles, where["channel_blocks"])
    partial = y.new_empty((3, splits, channels), dtype=state)
    statistics = y.new_empty((2, channels), dtype=state)
    partial_statistics_kernel[(where["channel_blocks"] * splits,)](y, partial, tiles=tiles, splits=splits, **where)
    statistics_kernel[(triton.cdiv(channels, PARTIAL_TILE["BLOCK_C"]),)](
        partial, statistics, channels, splits, **PARTIAL_TILE, num_warps=NUM_WARPS, **OPTIONS
    )
    return statistics


def norm_lif_forward(
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
    *options,
) -> tuple[Tensor, Tensor, Tensor]:
    """As cpu.norm_lif.norm_lif_forward."""
    batch = len(y) if constant else len(y) // timesteps
    state = state_dtype(y.dtype)
    spikes = empty_images(y, timesteps * batch, y.dtype)
    v_last = empty_images(y, batch, state) if return_state else y.new_empty(0, dtype=state)
    saved_states = empty_images(y, (segments(timesteps)[0] - 1) * batch, state)
    if y.numel():
        where, tiles = tiling(y, batch, TILE)
        norm_lif_forward_kernel[(where["channel_blocks"] * tiles,)](
            y_ptr=y,
            statistics_ptr=statistics,
            decay_ptr=y if learnt_decay is None else learnt_decay,
            spikes_ptr=spikes,
            v_last_ptr=v_last,
            saved_states_ptr=saved_states,
            eps=eps,
            CONSTANT=constant,
            RETURN_STATE=return_state,
            **given(y, residual=residual, v0=v0, weight=weight, bias=bias),
            **dynamics(timesteps, learnt_decay, options),
            **where,
        )
    return spikes, v_last, saved_states


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
    *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As cpu.norm_lif.norm_lif_sums."""
    learnt, state = learnt_decay is not None, state_dtype(y.dtype)
    g = empty_images(y, len(y), y.dtype) if write else y.new_empty(0)
    batch = len(y) if constant else len(y) // timesteps
    grad_v0 = y.new_empty(0, dtype=state) if v0 is None else empty_images(y, batch, state)
    if y.numel() == 0:
        return torch.zeros_like(statistics), g, grad_v0, y.new_zeros(() if learnt else (0,), dtype=state)
    where, tiles = tiling(y, batch, backward_tile(y, timesteps, learnt))
    splits = shared(tiles, where["channel_blocks"])
    programs = where["channel_blocks"] * splits
    sums = y.new_empty((2, splits, y.shape[1]), dtype=state)
    grad_decay = y.new_empty(programs if learnt else 0, dtype=state)
    norm_lif_backward_kernel[(programs,)](
        y_ptr=y,
        statistics_ptr=statistics,
        decay_ptr=learnt_decay if learnt else y,
        saved_states_ptr=saved_states,
        grad_ptr=g,
        sums_ptr=sums,
        grad_v0_ptr=grad_v0,
        grad_decay_ptr=grad_decay,
        tiles=tiles,
        splits=splits,
        eps=eps,
        CONSTANT=constant,
        **surrogate(options),
        SUMS=True,
        WRITE=write,
        **uncapped(),
        **given(y, grad_spikes=grad_spikes, grad_v_last=grad_v_last, residual=residual, v0=v0),
        **given(y, weight=weight, bias=bias, means=None),
        **dynamics(timesteps, learnt_decay, options),
        **where,
    )
    return sums.sum(1), g, grad_v0, grad_decay.sum() if learnt else grad_decay


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
    *options,
) -> Tensor:
    """As cpu.norm_lif.norm_lif_grad."""
    grad_y = empty_images(y, len(y), y.dtype)
    if y.numel():
        where, tiles = tiling(y, len(y) // timesteps, backward_tile(y, timesteps, False))
        norm_lif_backward_kernel[(where["channel_blocks"] * tiles,)](
            y_ptr=y,
            statistics_ptr=statistics,
            decay_ptr=y if learnt_decay is None else learnt_decay,
            saved_states_ptr=saved_states,
            grad_ptr=grad_y,
            sums_ptr=grad_y,
            grad_v0_ptr=grad_y,
            grad_decay_ptr=grad_y,
            tiles=tiles,
            splits=tiles,
            eps=eps,
            CONSTANT=False,
            **surrogate(options),
            SUMS=False,
            WRITE=True,
            **uncapped(),
            **given(y, grad_spikes=grad_spikes, grad_v_last=grad_v_last, residual=None, v0=v0),
            **given(y, weight=weight, bias=bias, means=means),
            **dynamics(timesteps, learnt_decay, options),
            **where,
        )
    return grad_y


def norm_grad(
    grad: Tensor, y: Tensor, statistics: Tensor, weight: Tensor | None, means: Tensor | None, eps: float
) -> Tensor:
    """As cpu.norm_lif.norm_grad."""
    grad_y = empty_images(y, len(y), y.dtype)
    batch_norm_gradient(grad, y, statistics, weight, means, eps, grad_y)
    return grad_y


def norm_grad_(
    grad: Tensor, y: Tensor, statistics: Tensor, weight: Tensor | None, means: Tensor | None, eps: float
) -> None:
    """As cpu.norm_lif.norm_grad_."""
    batch_norm_gradient(grad, y, statistics, weight, means, eps, grad)


def batch_norm_gradient(grad, y, statistics, weight, means, eps, grad_y) -> None:
    if y.numel():
        where, tiles = tiling(y, len(y), STREAM)
        norm_grad_kernel[(where["channel_blocks"] * tiles,)](
            grad_ptr=grad,
            y_ptr=y,
            statistics_ptr=statistics,
            grad_y_ptr=grad_y,
            eps=eps,
            **given(y, weight=weight, means=means),
            **where,
        )
