"""Residual networks for small images: a 3 x 3 stem of stride 1, basic blocks, 1 x 1 convolution shortcuts.

ResNet-18 and 34 are those of He et al. (CVPR 2016, table 1) with that stem; ResNet-20 is their CIFAR network; ResNet-19
is the spiking community's (Zheng et al., AAAI 2021; settings as in TET's code, Deng et al., ICLR 2022).
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from lasnn.network import Act, Staged
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
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.conv2(self.act1(self.conv1(x))), residual=self.shortcut(x))


def _resnet(
    act: Act, in_channels: int, stem_channels: int, stages: list[tuple[int, int, int]], head: nn.Module
) -> Staged:
    """`stages` holds (channels, blocks, stride of the first block) for each stage."""
    stem = nn.Sequential(nn.Conv2d(in_channels, stem_channels, 3, padding=1, bias=False), act(stem_channels))
    named, before = {}, stem_channels
    for number, (channels, blocks, stride) in enumerate(stages, start=1):
        layers = []
        for block in range(blocks):
            layers.append(Block(act, before, channels, stride if block == 0 else 1))
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


@architectures.register("resnet34")
def resnet34(act: Act, *, in_channels: int, num_classes: int, width: Width = 64) -> Staged:
    """ResNet-34: 4 stages of 3, 4, 6, 3 basic blocks, up to 8 times width channels."""
    stages = [(width, 3, 1), (2 * width, 4, 2), (4 * width, 6, 2), (8 * width, 3, 2)]
    return _resnet(act, in_channels, width, stages, nn.Linear(8 * width, num_classes))
