"""Augmentation of a batch on its device, with random numbers of its own for every image.

(torchvision's transforms.v2 draw once per call: a whole batch would get the same crop.)

An augmentation says what it needs by the names of its positional parameters:

    images     [B, C, H, W]  floats in [0, 1]
    targets    [B, K]        class probabilities, floats; only for one that mixes images
    mean       [C, 1, 1]     of the data set's training images
    generator                on the CPU, so that the draws are the same on every device

Its keyword-only parameters are the recipe's options. It returns new images of the same shape, type and range, and new
targets beside them where it asked for them; what it was given it leaves alone. Teacher and student see its result.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from lasnn.errors import UserError
from lasnn.registry import augmentations, translate_errors

Pixels = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Augmentation:
    """A recipe's augmentations, in order, bound to what they need of the data set.

    Args:
        steps: a name, or a table with a `name` and options, for each.
        mean: of each channel of the training images, in [0, 1]; for those that fill with it.
        num_classes: K; for those that mix images.

    Raises:
        UserError: a name or an option is not known.
        ValueError: an augmentation needs `mean` or `num_classes`, and it is not given.
    """

    def __init__(
        self,
        steps: Iterable[str | Mapping[str, Any]],
        mean: Sequence[float] | None = None,
        num_classes: int | None = None,
    ):
        self.steps = []
        for step in steps:
            options = {} if isinstance(step, str) else dict(step)
            entry = augmentations[options.pop("name", step)]
            if problems := entry.problems(options):
                raise UserError(*(f"{entry.name}: {option}: {message}" for option, message in problems))
            for need, value, given in (("mean", mean, "mean"), ("targets", num_classes, "num_classes")):
                if need in entry.inputs and value is None:
                    raise ValueError(f"{entry.name!r} needs {given}")
            self.steps.append((entry, options))
        self.mean = None if mean is None else torch.tensor(mean).view(-1, 1, 1)
        self.num_classes = num_classes

    @property
    def mixes(self) -> bool:
        """Whether targets become class probabilities."""
        return any("targets" in entry.inputs for entry, _ in self.steps)

    def __call__(self, images: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Apply the augmentations.

        Args:
            images: [B, C, H, W] in [0, 1].
            targets: class indices [B].
            generator: on the CPU.

        Returns:
            New images, and targets: class probabilities [B, K], float32, where images were mixed; else as given.
        """
        if self.mixes:
            targets = F.one_hot(targets, self.num_classes).float()
        for entry, options in self.steps:
            given = {"images": images, "targets": targets, "mean": self.mean, "generator": generator}
            with translate_errors(entry):
                result = entry.function(*(given[name] for name in entry.inputs), **options)
                images, targets = result if "targets" in entry.inputs else (result, targets)
        return images, targets


def _rand(batch: int, generator: Generator, images: Tensor) -> Tensor:
    """A number in [0, 1) for each image, float32 [B, 1, 1, 1], drawn on the CPU and sent to the images' device."""
    return torch.rand(batch, 1, 1, 1, generator=generator).to(images.device, non_blocking=True)


def _like(values: Tensor, images: Tensor) -> Tensor:
    """The values in the images' type on their device; the copy does not wait for a GPU's work."""
    return values.to(images.device, images.dtype, non_blocking=True)


def _box(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Which pixels are in each image's box, bool [B, 1, H, W]; the box may reach beyond the image. Corners are [B]."""
    corners = torch.stack([top, left, top + height, left + width]).to(images.device, non_blocking=True)
    top, left, bottom, right = corners[:, :, None, None, None]
    row = torch.arange(images.shape[2], device=images.device)[:, None]
    column = torch.arange(images.shape[3], device=images.device)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


@augmentations.register("crop")
def crop(images: Tensor, generator: Generator, *, padding: Pixels = 4) -> Tensor:
    """Pad each image with black pixels on every side, then crop it to its size at a random place.

    With 4 pixels it is that of the classic CIFAR-10 recipe (He et al., CVPR 2016, section 4.2).
    """
    batch, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, batch), generator=generator).to(images.device, non_blocking=True)
    # All (2·padding + 1)² crops of each image as a view, of which one is copied.
    crops = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(batch, device=images.device), :, top, left]


@augmentations.register("flip")
def flip(images: Tensor, generator: Generator, *, probability: Fraction = 0.5) -> Tensor:
    """Mirror each image left to right with a probability."""
    return torch.where(_rand(len(images), generator, images) < probability, images.flip(3), images)


@augmentations.register("cutout")
def cutout(images: Tensor, mean: Tensor, generator: Generator, *, size: Size = 16) -> Tensor:
    """Replace a square of each image by the data set's mean colour (DeVries & Taylor, arXiv 1708.04552).

    The square's centre is anywhere in the image, so a part of it may lie outside. The paper has `size` 16 for CIFAR-10
    and 8 for CIFAR-100; it erases normalised images with zeros, which is the mean colour.
    """
    batch, _, height, width = images.shape
    top = torch.randint(height, (batch,), generator=generator) - size // 2
    left = torch.randint(width, (batch,), generator=generator) - size // 2
    size = torch.full((batch,), size)
    return torch.where(_box(images, top, left, size, size), _like(mean, images), images)


@augmentations.register("random-erasing")
def random_erasing(
    images: Tensor,
    mean: Tensor,
    generator: Generator,
    *,
    probability: Fraction = 0.5,
    min_area: Fraction = 0.02,
    max_area: Fraction = 0.4,
    min_ratio: Annotated[float, Field(gt=0, le=1)] = 0.3,
    fill: Literal["noise", "mean"] = "noise",
) -> Tensor:
    """Replace a rectangle of some images by noise, or by the mean colour (Zhong et al., AAAI 2020).

    The rectangle lies within the image; its share of the area is uniform from `min_area` to `max_area`, its aspect
    ratio from `min_ratio` to 1/`min_ratio`, drawn until it fits as in the paper (a hundred times at most). The noise
    is uniform in [0, 1] for each pixel and channel; it is drawn on the images' device and differs between devices.
    """
    if min_area > max_area:
        raise UserError(f"random-erasing: min_area {min_area:g} is above max_area {max_area:g}")
    batch, _, height, width = images.shape
    erased = torch.rand(batch, generator=generator) < probability
    area, ratio, down, across = torch.rand(4, 100, batch, generator=generator)
    area = height * width * (min_area + (max_area - min_area) * area)
    ratio = min_ratio + (1 / min_ratio - min_ratio) * ratio
    heights, widths = (area * ratio).sqrt().int(), (area / ratio).sqrt().int()
    fits = (heights < height) & (widths < width)
    # The first draw that fits; the arg-max of none is 0, which the mask below leaves out.
    first = fits.int().argmax(0)[None]
    heights, widths = heights.gather(0, first)[0], widths.gather(0, first)[0]
    top = (down[0] * (height - heights + 1)).int()
    left = (across[0] * (width - widths + 1)).int()
    box = _box(images, top, left, heights * (erased & fits.any(0)), widths)
    if fill == "mean":
        return torch.where(box, _like(mean, images), images)
    on_device = torch.Generator(images.device).manual_seed(_seed(generator))
    return torch.where(box, torch.rand(images.shape, generator=on_device, device=images.device).to(images), images)


def _seed(generator: Generator) -> int:
    """A seed for a generator of another kind."""
    return int(torch.randint(2**62, (), generator=generator))


def _by_policy(images: Tensor, draw: Callable[[Generator], list], generator: Generator, fill: float) -> Tensor:
    """Apply to each image the operations that `draw` draws for it."""
    # Imported late, here and below: torchvision takes a second to load, and every command reads this file.
    from lasnn.data.policy import apply

    if images.shape[1] not in (1, 3):
        raise UserError(f"torchvision's policies take images of 1 or 3 channels, not {images.shape[1]}")
    pixels = (images * 255).round().to(torch.uint8)
    return apply(pixels, [draw(generator) for _ in pixels], fill).to(images.dtype) / 255


@augmentations.register("autoaugment")
def autoaugment(
    images: Tensor,
    generator: Generator,
    *,
    policy: Literal["cifar10", "imagenet", "svhn"] = "cifar10",
    fill: Fraction = 0.0,
) -> Tensor:
    """AutoAugment, torchvision's: two operations by a learnt policy (Cubuk et al., CVPR 2019).

    `fill` is the grey of pixels from outside. Needs 1 or 3 channels.
    """
    from lasnn.data.policy import draw_auto

    return _by_policy(images, draw_auto(images.shape[2:], policy), generator, fill)


@augmentations.register("randaugment")
def randaugment(
    images: Tensor,
    generator: Generator,
    *,
    operations: Size = 2,
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9,
    fill: Fraction = 0.0,
) -> Tensor:
    """RandAugment, torchvision's: some operations of one strength (Cubuk et al., NeurIPS 2020).

    `magnitude` is of 30; `fill` is the grey of pixels from outside. Needs 1 or 3 channels.
    """
    from lasnn.data.policy import draw_rand

    return _by_policy(images, draw_rand(images.shape[2:], operations, magnitude), generator, fill)


@augmentations.register("trivialaugment")
def trivialaugment(images: Tensor, generator: Generator, *, fill: Fraction = 0.0) -> Tensor:
    """TrivialAugment (wide), torchvision's: one operation of any strength (Müller & Hutter, ICCV 2021).

    `fill` is the grey of pixels from outside. Needs 1 or 3 channels.
    """
    from lasnn.data.policy import draw_trivial

    return _by_policy(images, draw_trivial(), generator, fill)


def _shares(batch: int, alpha: float, probability: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """How much of itself each image keeps, Beta(alpha, alpha) or 1, float32 [B], and which image it is mixed with.

    torchvision and the papers' code draw one share a batch; here every image has its own.
    """
    # PyTorch's own Beta takes no generator.
    shares = torch.from_numpy(np.random.default_rng(_seed(generator)).beta(alpha, alpha, batch)).float()
    mixed = torch.rand(batch, generator=generator) < probability
    return torch.where(mixed, shares, 1.0), torch.randperm(batch, generator=generator)


def _mix(kept: Tensor, values: Tensor, partner: Tensor) -> Tensor:
    """kept·values + (1 - kept)·partner's, with `kept` [B]."""
    kept = _like(kept, values).view(-1, *[1] * (values.ndim - 1))
    return kept * values + (1 - kept) * values[partner.to(values.device, non_blocking=True)]


@augmentations.register("mixup")
def mixup(
    images: Tensor, targets: Tensor, generator: Generator, *, alpha: Positive = 1.0, probability: Fraction = 1.0
) -> tuple[Tensor, Tensor]:
    """Average each image and its label with another one's of the batch (Zhang et al., ICLR 2018).

    The image's share is Beta(alpha, alpha): 1 for CIFAR in the paper, 0.1 to 0.4 for ImageNet.
    """
    kept, partner = _shares(len(images), alpha, probability, generator)
    return _mix(kept, images, partner).clamp(0, 1), _mix(kept, targets, partner)


@augmentations.register("cutmix")
def cutmix(
    images: Tensor, targets: Tensor, generator: Generator, *, alpha: Positive = 1.0, probability: Fraction = 0.5
) -> tuple[Tensor, Tensor]:
    """Paste a box of another image of the batch into each, and mix the labels by area (Yun et al., ICCV 2019).

    The box has the image's aspect ratio and 1 - Beta(alpha, alpha) of its area; its centre is anywhere in the image,
    and what lies outside is cut off. `probability` is the paper's for CIFAR; for ImageNet it is 1.
    """
    batch, _, height, width = images.shape
    kept, partner = _shares(batch, alpha, probability, generator)
    side = (1 - kept).sqrt()
    heights, widths = (side * height).int(), (side * width).int()
    top = torch.randint(height, (batch,), generator=generator) - heights // 2
    left = torch.randint(width, (batch,), generator=generator) - widths // 2
    box = _box(images, top, left, heights, widths)
    images = torch.where(box, images[partner.to(images.device, non_blocking=True)], images)
    return images, _mix(1 - box.float().mean((1, 2, 3)), targets, partner)
