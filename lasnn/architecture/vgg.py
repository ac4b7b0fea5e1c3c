"""VGG (Simonyan & Zisserman, ICLR 2015) in the form used on small images: batch norm and one linear classifier.

A stage is the run of convolutions at one resolution; pooling stands at the start of the next stage, so that a tapped
feature is what the stage's last unit emits (spikes, in a student). VGG-11 to 19 have the convolutions of the original
configurations A, B, D and E; VGG-5 and 9 count their weight layers, 4 and 8 convolutions and the classifier.
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from lasnn.network.pooling import AvgPool2d
from lasnn.network.staged import Staged
from lasnn.network.units import Act
from lasnn.registry import architectures

Pool = Literal["avg", "max"]
Width = Annotated[int, Field(ge=1)]

# Channels of each convolution, stage by stage, as multiples of the width.
STAGES = {
    "vgg5": ((1,), (2,), (4, 4)),
    "vgg9": ((1, 1), (2, 2), (4, 4, 4, 4)),
    "vgg11": ((1,), (2,), (4, 4), (8, 8), (8, 8)),
    "vgg13": ((1, 1), (2, 2), (4, 4), (8, 8), (8, 8)),
    "vgg16": ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8)),
    "vgg19": ((1, 1), (2, 2), (4, 4, 4, 4), (8, 8, 8, 8), (8, 8, 8, 8)),
}


def _vgg(depth: str, act: Act, in_channels: int, num_classes: int, width: int, pool: str) -> Staged:
    stages = {}
    for number, multiples in enumerate(STAGES[depth], start=1):
        layers = []
        if number > 1:
            layers.append(AvgPool2d() if pool == "avg" else nn.MaxPool2d(2))
        for multiple in multiples:
            channels = multiple * width
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), act(channels)]
            in_channels = channels
        stages[f"stage{number}"] = nn.Sequential(*layers)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))
    return Staged(stages, head)


@architectures.register("vgg5")
def vgg5(act: Act, *, in_channels: int, num_classes: int, width: Width = 64, pool: Pool = "avg") -> Staged:
    """VGG-5: 4 convolutions in 3 stages of width, 2 and 4 times width channels."""
    return _vgg("vgg5", act, in_channels, num_classes, width, pool)


@architectures.register("vgg9")
def vgg9(act: Act, *, in_channels: int, num_classes: int, width: Width = 64, pool: Pool = "avg") -> Staged:
    """VGG-9: 8 convolutions in 3 stages of width, 2 and 4 times width channels."""
    return _vgg("vgg9", act, in_channels, num_classes, width, pool)


@architectures.register("vgg11")
def vgg11(act: Act, *, in_channels: int, num_classes: int, width: Width = 64, pool: Pool = "avg") -> Staged:
    """VGG-11: 8 convolutions in 5 stages, up to 8 times width channels."""
    return _vgg("vgg11", act, in_channels, num_classes, width, pool)


@architectures.register("vgg13")
def vgg13(act: Act, *, in_channels: int, num_classes: int, width: Width = 64, pool: Pool = "avg") -> Staged:
    """VGG-13: 10 convolutions in 5 stages, up to 8 times width channels."""
    return _vgg("vgg13", act, in_channels, num_classes, width, pool)


@architectures.register("vgg16")
def vgg16(act: Act, *, in_channels: int, num_classes: int, width: Width = 64, pool: Pool = "avg") -> Staged:
    """VGG-16: 13 convolutions in 5 stages, up to 8 times width channels."""
    return _vgg("vgg16", act, in_channels, num_classes, width, pool)


@architectures.register("vgg19")
def vgg19(act: Act, *, in_channels: int, num_classes: int, width: Width = 64, pool: Pool = "avg") -> Staged:
    """VGG-19: 16 convolutions in 5 stages, up to 8 times width channels."""
    return _vgg("vgg19", act, in_channels, num_classes, width, pool)
