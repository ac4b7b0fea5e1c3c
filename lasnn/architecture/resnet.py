"""Residual networks for small images: a 3 x 3 stem of stride 1, basic or bottleneck blocks, 1 x 1 shortcuts.

ResNet-18, 34 and 50 are those of He et al. (CVPR 2016, table 1) with that stem; ResNet-20 and 32 are their CIFAR
networks; ResNet-19 is the spiking community's (Zheng et al., AAAI 2021; settings as in TET's code, Deng et al., ICLR
2022).
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from lasnn.kernels import BatchNorm2d
from lasnn.network.staged import Staged
from lasnn.network.units import Act
from lasnn.registry import architectures

Width = Annotated[int, Field(ge=1)]


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; the residual joins before the second activation."""

    def __init__(self, act: Act, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.act1 = act(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.act2 = act(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.conv2(self.act1(self.conv1(x))), residual=self.shortcut(x))


class Bottleneck(nn.Module):
    """A 1 x 1 convolution to a quarter of the channels, a 3 x 3 and a 1 x 1 back; the residual joins before the third
    activation. The stride is the 3 x 3 convolution's, as in torchvision; in the paper it is the first one's.
    """

    def __init__(self, act: Act, in_channels: int, channels: int, stride: int):
        super().__init__()
        inner = channels // 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.act1 = act(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.act2 = act(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.act3 = act(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act2(self.conv2(self.act1(self.conv1(x))))
        return self.act3(self.conv3(y), residual=self.shortcut(x))


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), BatchNorm2d(channels))


def _resnet(
    act: Act,
    in_channels: int,
    stem_channels: int,
    stages: list[tuple[int, int, int]],
    head: nn.Module,
    block: type[Block] | type[Bottleneck] = Block,
) -> Staged:
    """`stages` holds (channels, blocks, stride of the first block) for each stage."""
    stem = nn.Sequential(nn.Conv2d(in_channels, stem_channels, 3, padding=1, bias=False), act(stem_channels))
    named, before = {}, stem_channels
    for number, (channels, blocks, stride) in enumerate(stages, start=1):
        layers = []
        for first in [True, *[False] * (blocks - 1)]:
            layers.append(block(act, before, channels, stride if first else 1))
            before = channels
        named[f"stage{number}"] = nn.Sequential(*layers)
    return Staged(named, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head), stem)


@architectures.register("resnet18")
def resnet18(act: Act, *, in_channels: int, num_classes: int, width: Width = 64) -> Staged:
    """ResNet-18: 4 stages of 2, 2, 2, 2 basic blocks, up to 8 times width channels."""
    stages = [(width, 2, 1), (2 * width, 2, 2), (4 * width, 2, 2), (8 * width, 2, 2)]
    return _resnet(act, in_channels, width, stages, nn.Linear(8 * width, num_classes))


@architectures.register("resnet19")
def resnet19(
    act: Act, *, in_channels: int, num_classes: int, width: Width = 64, stem_width: Width | None = None
) -> Staged:
    """ResNet-19: 3 stages of 3, 3, 2 basic blocks of 2, 4, 8 times width channels, two linear layers.

    `stem_width` is `width` unless given; ELKD's variant has a stem of 128 at width 64.
    """
    stages = [(2 * width, 3, 1), (4 * width, 3, 2), (8 * width, 2, 2)]
    head = nn.Sequential(nn.Linear(8 * width, 4 * width), act(), nn.Linear(4 * width, num_classes))
    return _resnet(act, in_channels, stem_width or width, stages, head)


@architectures.register("resnet20")
def resnet20(act: Act, *, in_channels: int, num_classes: int, width: Width = 16) -> Staged:
    """ResNet-20: 3 stages of 3, 3, 3 basic blocks of width, 2 and 4 times width channels."""
    stages = [(width, 3, 1), (2 * width, 3, 2), (4 * width, 3, 2)]
    return _resnet(act, in_channels, width, stages, nn.Linear(4 * width, num_classes))


@architectures.register("resnet32")
def resnet32(act: Act, *, in_channels: int, num_classes: int, width: Width = 16) -> Staged:
    """ResNet-32: 3 stages of 5, 5, 5 basic blocks of width, 2 and 4 times width channels."""
    stages = [(width, 5, 1), (2 * width, 5, 2), (4 * width, 5, 2)]
    return _resnet(act, in_channels, width, stages, nn.Linear(4 * width, num_classes))


@architectures.register("resnet34")
def resnet34(act: Act, *, in_channels: int, num_classes: int, width: Width = 64) -> Staged:
    """ResNet-34: 4 stages of 3, 4, 6, 3 basic blocks, up to 8 times width channels."""
    stages = [(width, 3, 1), (2 * width, 4, 2), (4 * width, 6, 2), (8 * width, 3, 2)]
    return _resnet(act, in_channels, width, stages, nn.Linear(8 * width, num_classes))


@architectures.register("resnet50")
def resnet50(act: Act, *, in_channels: int, num_classes: int, width: Width = 64) -> Staged:
    """ResNet-50: 4 stages of 3, 4, 6, 3 bottleneck blocks, up to 32 times width channels."""
    stages = [(4 * width, 3, 1), (8 * width, 4, 2), (16 * width, 6, 2), (32 * width, 3, 2)]
    return _resnet(act, in_channels, width, stages, nn.Linear(32 * width, num_classes), Bottleneck)
