"""torchvision's networks as teachers, so that an ANN that exists already can teach.

A weights file keeps torchvision's keys. Stages are named as everywhere: a ResNet's `layer1` to `layer4` are stage1 to
stage4, a VGG's stages are the runs of layers between its max-pools. Nothing is downloaded.
"""

from typing import Literal

from torch import nn

from lasnn.architecture.images import Colour, Deviation, Fit, Pixels, check_normalisation
from lasnn.errors import UserError
from lasnn.network.staged import StagedView
from lasnn.registry import teachers

Model = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
]


@teachers.register("torchvision")
def torchvision(
    *,
    in_channels: int,
    num_classes: int,
    model: Model,
    stem: Literal["imagenet", "small"] = "imagenet",
    resize: Pixels | None = None,
    repeat_grey: bool = True,
    mean: Colour = None,
    std: Deviation = None,
) -> StagedView:
    """A ResNet or VGG of torchvision, by the name of its `model`; weights files keep torchvision's keys.

    `stem = "small"` is the usual change for small images, to a ResNet: a 3 x 3 first convolution of stride 1, no
    max-pool. `resize` enlarges the images to so many pixels first (bilinear). Images of one channel are repeated to
    three, unless `repeat_grey` is false; the first convolution takes as many channels as the images have then.
    `mean` and `std` are what the network's images were normalised with; left out, those of the data set.

    Raises:
        UserError: an option does not suit the model or the images.
    """
    from torchvision.models import get_model

    channels = 3 if in_channels == 1 and repeat_grey else in_channels
    check_normalisation(mean, std, (in_channels, channels))
    network = get_model(model, weights=None, num_classes=num_classes)
    family = _vgg if model.startswith("vgg") else _resnet
    first, stages, head = family(network, model, channels, stem)
    return StagedView(
        network,
        stages,
        head,
        nn.Sequential(Fit(channels, (resize, resize) if resize else None), *first),
        mean=mean,
        std=std,
    )


def _resnet(network: nn.Module, model: str, channels: int, stem: str) -> tuple[list, dict[str, nn.Module], nn.Module]:
    if stem == "small":
        network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    first = [network.conv1, network.bn1, network.relu, network.maxpool]
    stages = {f"stage{number}": getattr(network, f"layer{number}") for number in range(1, 5)}
    return first, stages, nn.Sequential(network.avgpool, nn.Flatten(), network.fc)


def _vgg(network: nn.Module, model: str, channels: int, stem: str) -> tuple[list, dict[str, nn.Module], nn.Module]:
    if stem != "imagenet":
        raise UserError(f'stem = "{stem}" is a ResNet\'s; {model!r} has none to change')
    if channels != 3:
        network.features[0] = nn.Conv2d(channels, 64, 3, padding=1)
    runs: list[list[nn.Module]] = [[]]
    for layer in network.features:
        if isinstance(layer, nn.MaxPool2d):
            # A pool begins the next stage, so that a tapped feature is what the last activation emits.
            runs.append([])
        runs[-1].append(layer)
    *runs, last_pool = runs
    stages = {f"stage{number}": nn.Sequential(*run) for number, run in enumerate(runs, start=1)}
    return [], stages, nn.Sequential(*last_pool, network.avgpool, nn.Flatten(), network.classifier)
