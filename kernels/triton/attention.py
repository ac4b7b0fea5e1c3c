"""The energy of an attention map in Triton: the feature is read once in each pass.

Strides of channels and pixels carry no type: Triton compiles in a 1, and so sees what is contiguous.

A program handles tiles of channels x pixels of one image, wide along whichever of the two is contiguous.
"""

import triton
import triton.language as tl
from torch import Tensor

from lasnn.kernels.layout import empty_steps, state_dtype, step_strides

# (channels, pixels) of a tile, for pixels contiguous and for channels contiguous (channels_last)
PIXELS_FIRST = (16, 64)
CHANNELS_FIRST = (64, 16)
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1, "num_warps": 4}


@triton.jit
def magnitude_to_power(x, power, POWER: tl.constexpr):
    if POWER == 1:
        return tl.abs(x)
    elif POWER == 2:
        return x * x
    else:
        return tl.where(x == 0, 0.0, tl.exp2(power * tl.log2(tl.abs(x))))


@triton.jit
def slope(x, power, POWER: tl.constexpr):
    """Derivative of |x|^power; for power 1 it is +1 at 0, so that silent neurons are reached."""
    if POWER == 1:
        return tl.where(x == x, tl.where(x < 0, -1.0, 1.0), x)
    elif POWER == 2:
        return 2 * x
    else:
        size = tl.where(x == 0, 0.0, power * tl.exp2((power - 1) * tl.log2(tl.abs(x))))
        return tl.where(x < 0, -size, size)


@triton.jit
def pixel_offsets(pixels, width, stride_h, stride_w, FLAT: tl.constexpr):
    if FLAT:
        return pixels * stride_w
    else:
        return pixels // width * stride_h + pixels % width * stride_w


@triton.jit
def attention_forward_kernel(
    x_ptr,
    f_ptr,
    batch,
    channels,
    pixels,
    width,
    stride_t: tl.int64,
    stride_b: tl.int64,
    stride_c,
    stride_h,
    stride_w,
    power,
    T: tl.constexpr,
    TEMPORAL: tl.constexpr,
    POWER: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    x_ptr += image % batch * stride_b + image // batch * stride_t
    x_ptrs = x_ptr + pixel_offsets(p.to(tl.int64), width, stride_h, stride_w, FLAT)[None, :]
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = (c < channels)[:, None] & (p < pixels)[None, :]
        ptrs = x_ptrs + c.to(tl.int64)[:, None] * stride_c
        if TEMPORAL == "step":
            x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
            total += magnitude_to_power(x, power, POWER)
        elif TEMPORAL == "map":
            for t in range(T):
                x = tl.load(ptrs + t * stride_t, mask=mask, other=0.0).to(tl.float32)
                total += magnitude_to_power(x, power, POWER)
        else:
            mean = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
            for t in range(T):
                mean += tl.load(ptrs + t * stride_t, mask=mask, other=0.0).to(tl.float32)
            total += magnitude_to_power(mean / T, power, POWER)
    f = tl.sum(total, 0)
    if TEMPORAL == "map":
        f = f / T
    tl.store(f_ptr + image * pixels + p, f, mask=p < pixels)


@triton.jit
def attention_backward_kernel(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    batch,
    channels,
    pixels,
    width,
    stride_t: tl.int64,
    stride_b: tl.int64,
    stride_c,
    stride_h,
    stride_w,
    out_stride_t: tl.int64,
    out_stride_b: tl.int64,
    out_stride_c,
    out_stride_h,
    out_stride_w,
    power,
    T: tl.constexpr,
    TEMPORAL: tl.constexpr,
    POWER: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # For "rate" a program sees all steps of an image and writes the one gradient that they share.
    image = tl.program_id(0).to(tl.int64)
    b = image % batch
    t = image // batch
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (c < channels)[:, None] & (p < pixels)[None, :]
    p64 = p.to(tl.int64)
    c64 = c.to(tl.int64)[:, None]
    row = image if TEMPORAL == "step" else b
    grad = tl.load(grad_ptr + row * pixels + p, mask=p < pixels, other=0.0)[None, :]
    if TEMPORAL != "step":
        grad = grad / T

    offsets = c64 * stride_c + pixel_offsets(p64, width, stride_h, stride_w, FLAT)[None, :]
    ptrs = x_ptr + (b * stride_b + t * stride_t) + offsets
    if TEMPORAL == "rate":
        x = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for step in range(T):
            x += tl.load(ptrs + step * stride_t, mask=mask, other=0.0).to(tl.float32)
        x = x / T
    else:
        x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    out_offsets = c64 * out_stride_c + pixel_offsets(p64, width, out_stride_h, out_stride_w, FLAT)[None, :]
    grad_x = (grad * slope(x, power, POWER)).to(grad_x_ptr.dtype.element_ty)
    tl.store(grad_x_ptr + (b * out_stride_b + t * out_stride_t) + out_offsets, grad_x, mask=mask)


def arguments(x: Tensor, power: float, temporal: str) -> dict:
    """The kernel arguments that both passes share."""
    steps, batch, channels, height, width = x.shape
    stride_t, stride_b, stride_c, stride_h, stride_w = x.stride()
    # Pixels run on from row to row in contiguous and in channels_last features: one stride for all of them.
    flat = stride_h == width * stride_w or height == 1
    block_c, block_p = CHANNELS_FIRST if stride_c == 1 and channels > 1 else PIXELS_FIRST
    return {
        "x_ptr": x,
        "batch": batch,
        "channels": channels,
        "pixels": height * width,
        "width": width,
        "stride_t": stride_t,
        "stride_b": stride_b,
        "stride_c": stride_c,
        "stride_h": stride_h,
        "stride_w": stride_w,
        "power": power,
        "T": steps,
        "TEMPORAL": temporal,
        "POWER": int(power) if power in (1, 2) else 0,
        "FLAT": flat,
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
        **OPTIONS,
    }


def attention_forward(x: Tensor, power: float, temporal: str) -> Tensor:
    """As cpu.attention.attention_forward."""
    steps, batch, _, height, width = x.shape
    shape = (steps, batch, height, width) if temporal == "step" else (batch, height, width)
    if x.numel() == 0:
        return x.new_zeros(shape, dtype=state_dtype(x.dtype))
    f = x.new_empty(shape, dtype=state_dtype(x.dtype))
    options = arguments(x, power, temporal)
    grid = (batch * (steps if temporal == "step" else 1), triton.cdiv(height * width, options["BLOCK_P"]))
    attention_forward_kernel[grid](f_ptr=f, **options)
    return f


def attention_backward(grad: Tensor, x: Tensor, power: float, temporal: str) -> Tensor:
    """As cpu.attention.attention_backward."""
    steps, batch, channels, height, width = x.shape
    grad_x = empty_steps(x, 1 if temporal == "rate" else steps, x.dtype)
    if x.numel() == 0:
        return grad_x
    options = arguments(x, power, temporal)
    out_stride_b, out_stride_c, out_stride_h, out_stride_w = step_strides(x)
    options["FLAT"] = options["FLAT"] and (out_stride_h == width * out_stride_w or height == 1)
    grid = (
        batch * len(grad_x),
        triton.cdiv(height * width, options["BLOCK_P"]),
        triton.cdiv(channels, options["BLOCK_C"]),
    )
    attention_backward_kernel[grid](
        grad_ptr=grad.contiguous(),
        grad_x_ptr=grad_x,
        out_stride_t=grad_x.stride(0),
        out_stride_b=out_stride_b,
        out_stride_c=out_stride_c,
        out_stride_h=out_stride_h,
        out_stride_w=out_stride_w,
        **options,
    )
    return grad_x
