"""A spiking transformer for small images: Spikformer (Zhou et al., ICLR 2023), written as maps [B, C, H, W].

Queries, keys and values are spikes, and their product needs no softmax. Every token is a pixel of a map of a quarter of
the image's size, every linear layer a 1 x 1 convolution, so that each has the fused unit of batch norm and neuron
behind it and each stage can be tapped as a map. The four 3 x 3 convolutions of the patch stem and that of the relative
position embedding have the authors' channels for CIFAR.

Where it departs from the paper: a batch norm before the neuron that reads the product stands in the place of a fixed
scale and a threshold of its own; pools are average by default and stand before the convolution; what precedes a batch
norm has no bias. As an ANN, with ReLU in the place of neurons, its attention is the unnormalised product of what is
positive.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from lasnn.architecture.vgg import Pool
from lasnn.errors import UserError
from lasnn.network.staged import Staged
from lasnn.network.units import Act, Add, Product
from lasnn.registry import architectures

Count = Annotated[int, Field(ge=1)]


class Attention(nn.Module):
    """Spiking self-attention: units for queries, keys and values, their product, a unit on it, a projection."""

    def __init__(self, act: Act, channels: int, heads: int):
        super().__init__()
        self.queries = _mix(act, channels, channels)
        self.keys = _mix(act, channels, channels)
        self.values = _mix(act, channels, channels)
        self.product = Product(heads)
        self.act = act(channels)
        self.projection = _mix(act, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.act(self.product(self.queries(x), self.keys(x), self.values(x))))


class Residual(nn.Module):
    """What a module emits, added to what it is given: spikes to spikes."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.inner(x))


def _mix(act: Act, in_channels: int, channels: int, kernel: int = 1) -> nn.Sequential:
    """A convolution and its unit."""
    return nn.Sequential(nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False), act(channels))


@architectures.register("spikformer")
def spikformer(
    act: Act,
    *,
    in_channels: int,
    num_classes: int,
    width: Count = 256,
    depth: Annotated[int, Field(ge=2)] = 4,
    heads: Count = 8,
    mlp_ratio: Count = 4,
    pool: Pool = "avg",
) -> Staged:
    """Spikformer: a convolutional patch stem, then `depth` blocks of self-attention on maps of a quarter of the size.

    stage1 is the stem's third convolution, at half the image's size; stage2 its fourth, the position embedding and the
    first half of the blocks; stage3 the others. What a block emits are numbers of spikes. Width 128 has 1.04 M
    parameters, 256 has 4.15 M and 384 with 12 heads 9.31 M, which are the paper's Spikformer-4-256 (4.15 M) and 4-384
    (9.32 M) but for biases and batch norms.

    Raises:
        UserError: `width` cannot be shared out among the heads, or halved for the stem.
    """
    if width % heads or width % 8:
        raise UserError(f"width = {width} must be a multiple of 8, for the stem, and of heads = {heads}")
    stem = nn.Sequential(_mix(act, in_channels, width // 8, 3), _mix(act, width // 8, width // 4, 3))
    halve = nn.AvgPool2d if pool == "avg" else nn.MaxPool2d
    blocks = []
    for _ in range(depth):
        mlp = nn.Sequential(_mix(act, width, mlp_ratio * width), _mix(act, mlp_ratio * width, width))
        blocks.append(nn.Sequential(Residual(Attention(act, width, heads)), Residual(mlp)))
    stages = {
        "stage1": nn.Sequential(halve(2), _mix(act, width // 4, width // 2, 3)),
        "stage2": nn.Sequential(
            halve(2),
            _mix(act, width // 2, width, 3),
            Residual(_mix(act, width, width, 3)),
            *blocks[: depth // 2],
        ),
        "stage3": nn.Sequential(*blocks[depth // 2 :]),
    }
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
    return Staged(stages, head, stem)
