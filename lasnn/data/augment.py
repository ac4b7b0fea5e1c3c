"""Augmentation of a batch on its device, with random numbers of its own for every image.

(torchvision's transforms.v2 draw once per call: a whole batch would get the same crop.)

Each augmentation takes images [B, C, H, W], floats in [0, 1], and a generator on their device; it returns new
images of the same shape and range and leaves the given ones alone.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lasnn.errors import UserError, unknown


def augment(images: Tensor, names: Iterable[str], generator: Generator) -> Tensor:
    """Apply the named augmentations in order to images [B, C, H, W] in [0, 1].

    Raises:
        UserError: a name is not in `AUGMENTATIONS`.
    """
    for name in names:
        if name not in AUGMENTATIONS:
            raise UserError(unknown("augmentation", name, AUGMENTATIONS))
        images = AUGMENTATIONS[name](images, generator)
    return images


def crop(images: Tensor, generator: Generator, padding: int = 4) -> Tensor:
    """Pad each image with `padding` black pixels on every side, then crop it to its size at a random place.

    With 4 pixels it is that of the classic CIFAR-10 recipe (He et al., arXiv 1512.03385, section 4.2).
    """
    batch, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, batch), generator=generator, device=images.device)
    # All (2·padding + 1)² crops of each image as a view, of which one is copied.
    crops = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(batch, device=images.device), :, top, left]


def flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


AUGMENTATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {"crop": crop, "flip": flip}
