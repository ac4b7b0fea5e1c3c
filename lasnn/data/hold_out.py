"""Training images that are held out for validation, chosen by what each image is."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lasnn.data.dataset import Images
from lasnn.data.stream import InMemory, Streamed
from lasnn.data.workers import Source, read_now

Split = TypeVar("Split", Images, Streamed)
# Images whose pixels are read at once to tell them from others.
AT_ONCE = 1024


class Part:
    """Some images of a source, by their numbers in it; a `lasnn.data.Source`."""

    def __init__(self, source: Source, index: Tensor):
        self.source = source
        self.index = index
        self.labels = source.labels[index]
        self.shape = (len(index), *source.shape[1:])

    def read(self, chosen: Sequence[int]) -> Tensor:
        return self.source.read(self.index[list(chosen)].tolist())

    def fingerprint(self) -> str:
        return fingerprint_of(self.source.fingerprint(), self.index)


def hold_out(images: Split, count: int) -> tuple[Split, Split | None]:
    """Split training images into those to train on and those that are held out.

    Held out are the `count` images with the lowest hashes of their content: the pixels, or the file that they are
    decoded from. The hash knows neither the seed nor an image's place, so that every seed, every process and streamed
    or resident images give the same. An image that is added or removed changes at most one other's side.

    Returns:
        Both in their order in `images`; None for the second where `count` is 0.

    Raises:
        ValueError: `count` leaves nothing to train on.
    """
    if not count:
        return images, None
    if not 0 < count < len(images):
        raise ValueError(f"count must be from 0 to {len(images) - 1}, one below the number of images, not {count}")
    draws = [hashlib.blake2b(b"validation" + key, digest_size=16).digest() for key in contents(images)]
    # Equal images stay in their order.
    lowest = sorted(range(len(draws)), key=draws.__getitem__)[:count]
    held = torch.zeros(len(draws), dtype=torch.bool)
    held[lowest] = True
    return some_of(images, (~held).nonzero()[:, 0]), some_of(images, held.nonzero()[:, 0])


def contents(images: Images | Streamed) -> Sequence[bytes]:
    """What tells each image from others, whatever its place."""
    if isinstance(images, Streamed):
        source = images.source
        if isinstance(source, InMemory):
            return contents(source.images)
        if hasattr(source, "keys"):
            return source.keys()
        starts = range(0, len(images), AT_ONCE)
        read = (read_now(source, range(start, min(start + AT_ONCE, len(images)))) for start in starts)
        return [key for pixels in read for key in of_pixels(pixels)]
    return images.keys if images.keys is not None else of_pixels(images.pixels)


def of_pixels(pixels: Tensor) -> list[bytes]:
    """A digest of each image of [N, C, H, W]."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels.cpu().numpy()]


def some_of(images: Split, index: Tensor) -> Split:
    """The images of these numbers, resident or streamed as the whole is."""
    if isinstance(images, Streamed):
        return Streamed(Part(images.source, index), images.device, images.workers)
    keys = None if images.keys is None else [images.keys[number] for number in index.tolist()]
    known_by = fingerprint_of(images.fingerprint(), index)
    index = index.to(images.device)
    return Images(images.pixels[index], images.labels[index], known_by, keys)


def fingerprint_of(whole: str, index: Tensor) -> str:
    """The fingerprint of some images of a split, whose own is `whole`."""
    return hashlib.sha256(whole.encode() + index.numpy().tobytes()).hexdigest()


def by_class(labels: Tensor, classes: Sequence[str]) -> dict[str, int]:
    """How many images each class has."""
    return dict(zip(classes, labels.cpu().bincount(minlength=len(classes)).tolist(), strict=True))
