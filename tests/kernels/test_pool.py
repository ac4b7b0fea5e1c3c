"""Average pooling over 2 x 2 pixels is PyTorch's, to the last bit, forward and backward."""

import pytest
import torch
from torch.nn import functional

from kernel_cases import DEVICE, images
from lasnn.kernels import avg_pool2, ops

SIZES = [(1, 2, 2), (3, 28, 28), (5, 7, 9), (2, 2, 33), (4, 33, 2), (16, 14, 14), (1, 3, 3)]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equals_pytorch(dtype, size, last):
    if DEVICE != "cpu" and dtype == torch.float64:
        pytest.skip("fp64 is the CPU's")
    torch.manual_seed(0)
    x = images(3, size, dtype, last).requires_grad_()
    x.data[0, 0, 0, 0] = float("nan")
    wanted = functional.avg_pool2d(x, 2)
    grad = torch.randn_like(wanted)
    out = avg_pool2(x)
    assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
    got, wanted = (torch.autograd.grad(y, x, grad)[0] for y in (out, wanted))
    assert torch.equal(got, wanted)
    assert got.stride() == wanted.stride()


def test_an_upstream_gradient_of_another_order():
    x = torch.randn(2, 3, 8, 8).requires_grad_()
    grad = torch.randn(2, 3, 1, 1).expand(2, 3, 4, 4)
    got, wanted = (
        torch.autograd.grad(pool(x), x, grad)[0] for pool in (avg_pool2, lambda x: functional.avg_pool2d(x, 2))
    )
    assert torch.equal(got, wanted)


def test_other_strides():
    x = torch.randn(4, 3, 8, 16)[:, :, :, ::2]
    assert torch.equal(avg_pool2(x), functional.avg_pool2d(x, 2))


def test_every_number_of_threads_gives_the_same():
    x, before = torch.randn(40, 16, 28, 28), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(avg_pool2(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


def test_nothing_is_kept_for_the_backward_pass():
    kept = []
    x = torch.randn(2, 3, 4, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda kept: kept):
        avg_pool2(x)
    assert not kept


@pytest.mark.parametrize("x", [torch.zeros(3, 4, 4), torch.zeros(1, 1, 1, 4), torch.zeros(0, 3, 4, 1)], ids=str)
def test_shapes_that_cannot_be_pooled(x):
    with pytest.raises(ValueError, match=r"avg_pool2: x must be \[N, C, H, W\] with sides of at least 2"):
        avg_pool2(x)


@pytest.mark.parametrize("last", [False, True])
def test_opcheck(last):
    x = images(2, (3, 5, 6), torch.float32, last)
    torch.library.opcheck(ops.avg_pool2.overload, (x.clone().requires_grad_(),))
    torch.library.opcheck(ops.avg_pool2_backward.overload, (avg_pool2(x), 5, 6, last))
    assert avg_pool2(torch.empty(0, 3, 4, 4)).shape == (0, 3, 2, 2)
