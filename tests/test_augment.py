"""Augmentation: random numbers for every image, shape and range kept."""

import pytest
import torch
import torch.nn.functional as F

from lasnn.data.augment import AUGMENTATIONS, augment, crop, flip
from lasnn.errors import UserError
from lasnn.random import generator


def ramp(batch: int, channels: int = 1, height: int = 9, width: int = 7) -> torch.Tensor:
    """The same image `batch` times; every pixel has a value of its own in (0, 1]."""
    values = torch.arange(1, channels * height * width + 1) / (channels * height * width)
    return values.view(1, channels, height, width).repeat(batch, 1, 1, 1)


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (5, 3, 9, 7), (4, 2, 1, 1)])
def test_keeps_shape_type_range_and_input(name, dtype, shape):
    images = torch.rand(shape, generator=generator(0)).to(dtype)
    before = images.clone()
    out = augment(images, [name], generator(1))
    assert out.shape == shape
    assert out.dtype == dtype
    assert out.min() >= 0
    assert out.max() <= 1
    out.zero_()
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_every_image_has_its_own_draw(name):
    out = augment(ramp(64), [name], generator(0))
    assert len(out.unique(dim=0)) > 1


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_is_a_function_of_the_generator_alone(name):
    first, again, other = (augment(ramp(64), [name], generator(key)) for key in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_is_one_of_the_padded_crops_and_all_occur(padding):
    images = ramp(4000, channels=2)
    height, width = images.shape[2:]
    padded = F.pad(images[0], (padding,) * 4)
    span = 2 * padding + 1
    crops = torch.stack([padded[:, i : i + height, j : j + width] for i in range(span) for j in range(span)]).flatten(1)
    distance = torch.cdist(crop(images, generator(0), padding).flatten(1), crops, p=1)
    nearest, which = distance.min(dim=1)
    assert nearest.max() == 0
    counts = which.bincount(minlength=span**2)
    # About 4000/span² of each; five standard deviations.
    expected = 4000 / span**2
    assert (counts - expected).abs().max() <= 5 * expected**0.5


def test_crop_shifts_by_four_pixels_at_most_unless_told():
    dots = torch.zeros(2000, 1, 15, 15)
    dots[:, :, 7, 7] = 1
    places = crop(dots, generator(0)).nonzero()[:, 2:]
    assert len(places) == 2000
    assert places.min(dim=0).values.tolist() == [3, 3]
    assert places.max(dim=0).values.tolist() == [11, 11]


def test_flip_mirrors_about_half():
    images = ramp(4000, channels=3)
    out = flip(images, generator(0))
    same = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(mirrored.sum().item() - 2000) < 5 * 1000**0.5


def test_applies_in_the_order_of_the_names():
    images = ramp(32)
    numbers = generator(0)
    expected = flip(crop(images, numbers), numbers)
    assert torch.equal(augment(images, ["crop", "flip"], generator(0)), expected)
    assert augment(images, [], generator(0)) is images


def test_unknown_name_is_helped():
    with pytest.raises(UserError, match=r"unknown augmentation 'flop'; did you mean 'flip'.*crop"):
        augment(ramp(1), ["flop"], generator(0))
