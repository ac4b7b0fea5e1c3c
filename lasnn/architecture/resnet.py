"""Residual networks for small images: a 3 x 3 stem of stride 1, basic or bottleneck blocks, 1 x 1 shortcuts.

ResNet-18, 34 and 50 are those of He et al. (CVPR 2016, table 1) with that stem; ResNet-20 and 32 are their CIFAR
networks; ResNet-19 is the spiking community's (Zheng et al., AAAI 2021; settings as in TET's code, Deng et al., ICLR
2022). The stride of a bottleneck is the 3 x 3 convolution's, as in torchvision; in the paper it is the first one's.

Each is built in one of three residual styles, as ANN and SNN alike:

- "activate-after-add": the shortcut joins the current of the block's last unit (He et al.; in SNNs Zheng et al.).
- "sew": spikes are added to spikes (SEW-ResNet with g = ADD, Fang et al., NeurIPS 2021); a shortcut with a convolution
  ends in a unit of its own. What a block emits is a count, at most one more than what it is given.
- "membrane": the shortcut carries currents, and a block activates before it convolves (MS-ResNet, Hu et al.,
  arXiv 2112.08954). The stem ends in its batch norm, a last activation precedes the head. A shortcut with a
  convolution reads the current, as in the authors' code; its operations are multiplications.

All three have the same convolutions and batch norms, and so the same number of parameters. So it is in the papers,
whose networks of one depth are those of He et al. with other units between the convolutions. The tests compare the
stages of each style with torchvision's ResNets, and its blocks, layer by layer, with the equations.

A tapped stage is what its last block passes on: spikes, under "sew" counts of spikes, and under "membrane" currents. A
loss of stages then compares the mean current of the student with the teacher's feature (a current as well where it is
of this style), which is what the authors of attention transfer do with pre-activation networks (Zagoruyko & Komodakis,
ICLR 2017: their WideResNets are tapped at the sum, before batch norm and activation).
"""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from lasnn.kernels import BatchNorm2d
from lasnn.network.staged import Staged
from lasnn.network.units import Act, Add
from lasnn.registry import architectures

Width = Annotated[int, Field(ge=1)]
Residual = Literal["activate-after-add", "sew", "membrane"]
# (kernel size, channels, stride) of each convolution of a block.
Layers = list[tuple[int, int, int]]


def basic(channels: int, stride: int) -> Layers:
    """Two 3 x 3 convolutions."""
    return [(3, channels, stride), (3, channels, 1)]


def bottleneck(channels: int, stride: int) -> Layers:
    """A 1 x 1 convolution to a quarter of the channels, a 3 x 3 and a 1 x 1 back."""
    return [(1, channels // 4, 1), (3, channels // 4, stride), (1, channels, 1)]


class Block(nn.Module):
    """Convolutions with a unit behind each; the shortcut joins the last unit before it activates."""

    def __init__(self, act: Act, in_channels: int, layers: Layers):
        super().__init__()
        self.depth = len(layers)
        before = in_channels
        for number, (kernel, channels, stride) in enumerate(layers, start=1):
            self.add_module(f"conv{number}", _convolution(before, channels, kernel, stride))
            self.add_module(f"act{number}", act(channels))
            before = channels
        self.shortcut = _shortcut(in_channels, layers, self._after_shortcut(act, before))

    def _after_shortcut(self, act: Act, channels: int) -> nn.Module:
        return BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.get_submodule(f"conv{self.depth}")(self._before_last(x))
        return self.get_submodule(f"act{self.depth}")(y, residual=self.shortcut(x))

    def _before_last(self, x: Tensor) -> Tensor:
        """What the last convolution reads."""
        for number in range(1, self.depth):
            x = self.get_submodule(f"act{number}")(self.get_submodule(f"conv{number}")(x))
        return x


class SpikeElementWiseBlock(Block):
    """Convolutions with a unit behind each; what the last one emits is added to what the shortcut does."""

    def __init__(self, act: Act, in_channels: int, layers: Layers):
        super().__init__(act, in_channels, layers)
        self.add = Add()

    def _after_shortcut(self, act: Act, channels: int) -> nn.Module:
        return act(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.get_submodule(f"conv{self.depth}")(self._before_last(x))
        return self.add(self.get_submodule(f"act{self.depth}")(y), self.shortcut(x))


class MembraneBlock(nn.Module):
    """An activation before each convolution, a batch norm behind the last one; the currents of both ways are added."""

    def __init__(self, act: Act, in_channels: int, layers: Layers):
        super().__init__()
        self.depth = len(layers)
        before = in_channels
        for number, (kernel, channels, stride) in enumerate(layers, start=1):
            # The first has no batch norm before it but the sum of two.
            self.add_module(f"act{number}", act() if number == 1 else act(before))
            self.add_module(f"conv{number}", _convolution(before, channels, kernel, stride))
            before = channels
        self.norm = BatchNorm2d(before)
        self.shortcut = _shortcut(in_channels, layers, BatchNorm2d(before))
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.depth + 1):
            y = self.get_submodule(f"conv{number}")(self.get_submodule(f"act{number}")(y))
        return self.add(self.norm(y), self.shortcut(x))


BLOCKS = {"activate-after-add": Block, "sew": SpikeElementWiseBlock, "membrane": MembraneBlock}


def _convolution(in_channels: int, channels: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2, bias=False)


def _shortcut(in_channels: int, layers: Layers, end: nn.Module) -> nn.Module:
    """The identity, or a 1 x 1 convolution where the shape changes, and `end`."""
    channels, stride = layers[-1][1], max(stride for _, _, stride in layers)
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(_convolution(in_channels, channels, 1, stride), end)


def _resnet(
    act: Act,
    in_channels: int,
    stem_channels: int,
    stages: list[tuple[int, int, int]],
    head: nn.Module,
    residual: Residual = "activate-after-add",
    layers: Callable[[int, int], Layers] = basic,
) -> Staged:
    """`stages` holds (channels, blocks, stride of the first block) for each stage."""
    currents = residual == "membrane"
    end = BatchNorm2d(stem_channels) if currents else act(stem_channels)
    stem = nn.Sequential(_convolution(in_channels, stem_channels, 3, 1), end)
    named, before = {}, stem_channels
    for number, (channels, blocks, stride) in enumerate(stages, start=1):
        inner = []
        for first in [True, *[False] * (blocks - 1)]:
            inner.append(BLOCKS[residual](act, before, layers(channels, stride if first else 1)))
            before = channels
        named[f"stage{number}"] = nn.Sequential(*inner)
    activation = [act()] if currents else []
    return Staged(named, nn.Sequential(*activation, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head), stem)


@architectures.register("resnet18")
def resnet18(
    act: Act,
    *,
    in_channels: int,
    num_classes: int,
    width: Width = 64,
    residual: Residual = "activate-after-add",
) -> Staged:
    """ResNet-18: 4 stages of 2, 2, 2, 2 basic blocks, up to 8 times width channels."""
    stages = [(width, 2, 1), (2 * width, 2, 2), (4 * width, 2, 2), (8 * width, 2, 2)]
    return _resnet(act, in_channels, width, stages, nn.Linear(8 * width, num_classes), residual)


@architectures.register("resnet19")
def resnet19(
    act: Act,
    *,
    in_channels: int,
    num_classes: int,
    width: Width = 64,
    stem_width: Width | None = None,
    residual: Residual = "activate-after-add",
) -> Staged:
    """ResNet-19: 3 stages of 3, 3, 2 basic blocks of 2, 4, 8 times width channels, two linear layers.

    `stem_width` is `width` unless given; ELKD's variant has a stem of 128 at width 64.
    """
    stages = [(2 * width, 3, 1), (4 * width, 3, 2), (8 * width, 2, 2)]
    head = nn.Sequential(nn.Linear(8 * width, 4 * width), act(), nn.Linear(4 * width, num_classes))
    return _resnet(act, in_channels, stem_width or width, stages, head, residual)


@architectures.register("resnet20")
def resnet20(
    act: Act,
    *,
    in_channels: int,
    num_classes: int,
    width: Width = 16,
    residual: Residual = "activate-after-add",
) -> Staged:
    """ResNet-20: 3 stages of 3, 3, 3 basic blocks of width, 2 and 4 times width channels."""
    stages = [(width, 3, 1), (2 * width, 3, 2), (4 * width, 3, 2)]
    return _resnet(act, in_channels, width, stages, nn.Linear(4 * width, num_classes), residual)


@architectures.register("resnet32")
def resnet32(
    act: Act,
    *,
    in_channels: int,
    num_classes: int,
    width: Width = 16,
    residual: Residual = "activate-after-add",
) -> Staged:
    """ResNet-32: 3 stages of 5, 5, 5 basic blocks of width, 2 and 4 times width channels."""
    stages = [(width, 5, 1), (2 * width, 5, 2), (4 * width, 5, 2)]
    return _resnet(act, in_channels, width, stages, nn.Linear(4 * width, num_classes), residual)


@architectures.register("resnet34")
def resnet34(
    act: Act,
    *,
    in_channels: int,
    num_classes: int,
    width: Width = 64,
    residual: Residual = "activate-after-add",
) -> Staged:
    """ResNet-34: 4 stages of 3, 4, 6, 3 basic blocks, up to 8 times width channels."""
    stages = [(width, 3, 1), (2 * width, 4, 2), (4 * width, 6, 2), (8 * width, 3, 2)]
    return _resnet(act, in_channels, width, stages, nn.Linear(8 * width, num_classes), residual)


@architectures.register("resnet50")
def resnet50(
    act: Act,
    *,
    in_channels: int,
    num_classes: int,
    width: Width = 64,
    residual: Residual = "activate-after-add",
) -> Staged:
    """ResNet-50: 4 stages of 3, 4, 6, 3 bottleneck blocks, up to 32 times width channels."""
    stages = [(4 * width, 3, 1), (8 * width, 4, 2), (16 * width, 6, 2), (32 * width, 3, 2)]
    return _resnet(act, in_channels, width, stages, nn.Linear(32 * width, num_classes), residual, bottleneck)
