"""How the tensors of an op lie in memory: one answer for the CPU, for Triton and for the fakes.

A step is x[t]. Outputs keep the memory order of the input's step (contiguous, channels_last, any other) and
hold their steps one after the other, so that a kernel walks all of them with the same offsets.
"""

import torch
from torch import Tensor

# Longest segment of time whose h a backward pass holds at once; longer runs keep one state per segment.
MAX_STEPS = 8


def segments(timesteps: int) -> tuple[int, int]:
    """(number of segments, steps in each): time cut evenly, the last segment possibly shorter."""
    count = -(-timesteps // MAX_STEPS)
    return count, -(-timesteps // count)


def is_dense(shape, strides) -> bool:
    """Whether the elements fill one block of memory, each once, in some order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def step_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of one step of an output: x's own where its step is dense, else dense in the same order."""
    shape, strides = x.shape[1:], x.stride()[1:]
    if is_dense(shape, strides):
        return tuple(strides)
    dense, expected = [0] * len(shape), 1
    for i in sorted(range(len(shape)), key=lambda i: (strides[i], -i)):
        dense[i] = expected
        expected *= max(shape[i], 1)
    return tuple(dense)


def empty_steps(x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised [count, ...] in the memory order of x's steps."""
    shape = x.shape[1:]
    return torch.empty_strided((count, *shape), (shape.numel(), *step_strides(x)), dtype=dtype, device=x.device)


def empty_step(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of one step, [...], in the memory order of x's steps."""
    return torch.empty_strided(x.shape[1:], step_strides(x), dtype=dtype, device=x.device)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of state and arithmetic: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(images: Tensor) -> torch.memory_format | None:
    """How images [N, C, H, W] lie: contiguous or channels_last; None for anything else.

    Where both hold (one channel, or one pixel) they are the same order, and contiguous is the answer.
    """
    for order in (torch.contiguous_format, torch.channels_last):
        if images.is_contiguous(memory_format=order):
            return order
    return None


def empty_images(like: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised [count, C, H, W] in the memory order of the images `like`."""
    shape = (count, *like.shape[1:])
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format(like))


def in_order(tensor: Tensor, strides: tuple[int, ...], leading: int = 1) -> Tensor:
    """`tensor` with its step in the memory order `strides`: itself where it lies so already, else a copy."""
    shape = tensor.shape[leading:]
    if all(size == 1 or a == b for size, a, b in zip(shape, tensor.stride()[leading:], strides, strict=True)):
        return tensor
    copy = torch.empty_strided(
        tensor.shape,
        ((shape.numel(),) if leading else ()) + tuple(strides),
        dtype=tensor.dtype,
        device=tensor.device,
    )
    return copy.copy_(tensor)
