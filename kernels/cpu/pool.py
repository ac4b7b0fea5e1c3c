"""Average pooling over 2 x 2 pixels on the CPU, where PyTorch's is slow on contiguous images."""

from torch import Tensor

from lasnn.kernels import pool
from lasnn.kernels.cpu import neuron, threads
from lasnn.kernels.layout import state_dtype


def pool_forward(x: Tensor) -> Tensor:
    """Images [N, C, H, W] -> [N, C, H // 2, W // 2]."""
    if not x.is_contiguous():
        return pool.pool_forward(x)
    height, width = x.shape[2:]
    out = x.new_empty(*x.shape[:2], height // 2, width // 2)
    if out.numel():
        run(neuron.loops().halve, (height, width, x.data_ptr(), out.data_ptr()), x)
    return out


def pool_backward(grad: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    """The gradient of x [N, C, height, width]."""
    if channels_last:
        return pool.pool_backward(grad, height, width, channels_last)
    grad, grad_x = grad.contiguous(), grad.new_empty(*grad.shape[:2], height, width)
    if grad_x.numel():
        run(neuron.loops().halve_backward, (height, width, grad.data_ptr(), grad_x.data_ptr()), grad_x)
    return grad_x


def run(loop, numbers: tuple[int, ...], images: Tensor) -> None:
    """Run a loop over the planes of images [N, C, H, W]."""
    like, state = neuron.like(images.dtype), neuron.like(state_dtype(images.dtype))
    planes = images.shape[0] * images.shape[1]
    threads.run(lambda first, last: loop(first, last, numbers, like, state), planes, images.numel())
