"""Average pooling over 2 x 2 pixels, which a network of lasnn's own uses."""

from torch import Tensor, nn

from lasnn.kernels import avg_pool2


class AvgPool2d(nn.AvgPool2d):
    """`nn.AvgPool2d(2)` with lasnn's op, several times as fast on a CPU; exports write PyTorch's in its place."""

    def __init__(self):
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> [N, C, H // 2, W // 2]."""
        return avg_pool2(x)
