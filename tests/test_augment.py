"""Augmentation: random numbers for every image, shape and range kept."""

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T

from lasnn import augmentations
from lasnn.data import Augmentation, Batches, Images
from lasnn.data.augment import crop, cutmix, cutout, flip, mixup, random_erasing
from lasnn.data.policy import OPERATIONS, apply, draw_auto, draw_rand, draw_trivial
from lasnn.errors import UserError
from lasnn.random import generator

POLICIES = ("autoaugment", "randaugment", "trivialaugment")


def ramp(batch: int, channels: int = 1, height: int = 9, width: int = 7) -> torch.Tensor:
    """The same image `batch` times; every pixel has a value of its own in (0, 1]."""
    values = torch.arange(1, channels * height * width + 1) / (channels * height * width)
    return values.view(1, channels, height, width).repeat(batch, 1, 1, 1)


def different(batch: int) -> torch.Tensor:
    """Images that differ, so that mixing them shows."""
    return torch.rand(batch, 1, 9, 7, generator=generator("different"))


def augment(images, steps, key, labels=None):
    """Images and targets after the augmentations, for ten classes and a mean of 0.5."""
    if labels is None:
        labels = torch.arange(len(images)) % 10
    return Augmentation(steps, mean=[0.5] * images.shape[1], num_classes=10)(images, labels, generator(key))


@pytest.mark.parametrize("name", augmentations.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (5, 3, 9, 7), (4, 2, 1, 1)])
def test_keeps_shape_type_range_and_input(name, dtype, shape):
    if name in POLICIES and shape[1] == 2:
        with pytest.raises(UserError, match="take images of 1 or 3 channels, not 2"):
            augment(torch.rand(shape), [name], 1)
        return
    images = torch.rand(shape, generator=generator(0)).to(dtype)
    labels = torch.arange(len(images))
    before = images.clone()
    state = torch.get_rng_state()
    out, targets = augment(images, [name], 1, labels)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is untouched"
    assert out.shape == shape
    assert out.dtype == dtype
    assert out.min() >= 0
    assert out.max() <= 1
    if "targets" in augmentations[name].inputs:
        assert targets.shape == (len(images), 10)
        assert targets.dtype == torch.float32
        assert targets.min() >= 0
        torch.testing.assert_close(targets.sum(1), torch.ones(len(images)))
    else:
        assert targets is labels
    out.zero_()
    assert torch.equal(images, before)
    assert torch.equal(labels, torch.arange(len(images)))


@pytest.mark.parametrize("name", augmentations.names())
def test_every_image_has_its_own_draw(name):
    images = ramp(64)
    if "targets" in augmentations[name].inputs:
        # A mixture of equal images would not show; of two kinds it shows its share.
        images[::2] = 0
    out, _ = augment(images, [name], 0)
    assert len(out.unique(dim=0)) > (4 if "targets" in augmentations[name].inputs else 1)


@pytest.mark.parametrize("name", augmentations.names())
def test_is_a_function_of_the_generator_alone(name):
    first, again, other = (augment(different(64), [name], key) for key in (0, 0, 1))
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first[0], other[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", augmentations.names())
def test_draws_are_the_same_on_a_gpu(name):
    steps = [{"name": name, "fill": "mean"} if name == "random-erasing" else name]
    images, labels = torch.rand(64, 3, 32, 32, generator=generator(0)), torch.arange(64) % 10
    augmentation = Augmentation(steps, [0.5] * 3, 10)
    out, targets = augmentation(images.cuda(), labels.cuda(), generator(1))
    here, expected = augmentation(images, labels, generator(1))
    assert out.is_cuda
    assert targets.is_cuda
    # A half that is rounded the other way is one level of 255.
    assert ((out.cpu() - here).abs() > 1.5 / 255).float().mean() < 0.01
    torch.testing.assert_close(targets.cpu(), expected)


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_is_one_of_the_padded_crops_and_all_occur(padding):
    images = ramp(4000, channels=2)
    height, width = images.shape[2:]
    padded = F.pad(images[0], (padding,) * 4)
    span = 2 * padding + 1
    crops = torch.stack([padded[:, i : i + height, j : j + width] for i in range(span) for j in range(span)]).flatten(1)
    distance = torch.cdist(crop(images, generator(0), padding=padding).flatten(1), crops, p=1)
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


@pytest.mark.parametrize("probability", [0.5, 0.1, 0.0, 1.0])
def test_flip_mirrors_its_share(probability):
    images = ramp(4000, channels=3)
    out = flip(images, generator(0), probability=probability)
    same = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(mirrored.sum().item() - 4000 * probability) <= 5 * (4000 * probability * (1 - probability)) ** 0.5


def boxes(changed):
    """Height, width, top and left of the changed box of each image [B, H, W] that has one; the box must be whole."""
    found = []
    for image in changed:
        if not image.any():
            continue
        rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
        assert image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert int(image.sum()) == len(rows) * len(columns)
        found.append((len(rows), len(columns), int(rows[0]), int(columns[0])))
    return torch.tensor(found)


def test_cutout_is_a_square_of_the_mean_colour_centred_anywhere():
    images = torch.rand(4000, 3, 12, 12, generator=generator(0)) + 1
    mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    out = cutout(images, mean, generator(1), size=4)
    changed = (out != images).all(1)
    assert torch.equal(out, torch.where(changed[:, None], mean, images))
    found = boxes(changed)
    assert len(found) == 4000
    assert found[:, :2].max(0).values.tolist() == [4, 4]
    # With the centre in the first row, two rows are outside.
    assert found[:, :2].min(0).values.tolist() == [2, 2]
    whole = (found[:, :2] == 4).all(1).float().mean()
    assert abs(whole - (9 / 12) ** 2) < 0.04


def test_random_erasing_keeps_to_its_area_and_ratio():
    images = torch.rand(4000, 1, 40, 40, generator=generator(0)) + 1
    out = random_erasing(images, torch.zeros(1, 1, 1), generator(1))
    found = boxes((out != images).any(1))
    assert abs(len(found) - 2000) < 5 * 1000**0.5
    area, ratio = found[:, 0] * found[:, 1] / 1600, found[:, 0] / found[:, 1]
    # Sides are rounded down.
    assert 0.01 < area.min() < 0.05
    assert 0.35 < area.max() <= 0.4
    assert 0.2 < ratio.min() < 0.4
    assert 2.5 < ratio.max() < 4.5
    noise = out[out < 1]
    assert abs(noise.mean() - 0.5) < 0.01
    assert len(noise.unique()) > 1000
    grey = random_erasing(images, torch.full((1, 1, 1), 0.25), generator(1), fill="mean", probability=1.0)
    assert set(grey[grey < 1].tolist()) == {0.25}


def torchvisions(transform, images, seed):
    """What torchvision's transform makes of each image, drawing from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([transform(image) for image in images])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("transform", "draw"),
    [
        *[(T.AutoAugment(policy), draw_auto((20, 32), policy.value)) for policy in T.AutoAugmentPolicy],
        (T.RandAugment(2, 9), draw_rand((20, 32), 2, 9)),
        (T.RandAugment(3, 30), draw_rand((20, 32), 3, 30)),
        (T.TrivialAugmentWide(), draw_trivial()),
    ],
)
def test_policies_are_those_of_torchvision(transform, draw, channels):
    """With torchvision's random state every image is torchvision's, to the bit."""
    draws = generator("policy")
    images = torch.randint(256, (300, channels, 20, 32), generator=draws, dtype=torch.uint8)
    ours = torch.Generator().manual_seed(5)
    operations = [draw(ours) for _ in images]
    assert torch.equal(apply(images, operations), torchvisions(transform, images, 5))
    used = {name for own in operations for name, _ in own}
    assert used <= set(OPERATIONS)
    assert len(used) >= 8


def test_policies_fill_from_outside():
    images = torch.full((300, 3, 16, 16), 255, dtype=torch.uint8)
    operations = [[("TranslateX", 4.0)], [("Rotate", 30.0)], [("ShearY", 0.3)]] * 100
    assert set(apply(images, operations, fill=0.5).unique().tolist()) == {128, 255}
    assert set(apply(images, operations).unique().tolist()) == {0, 255}


def test_mixup_by_hand():
    """Every image and its label are the same mixture of two of the batch."""
    images = torch.eye(8).view(8, 1, 2, 4)
    targets = torch.eye(8)
    out, mixed = mixup(images, targets, generator(0))
    torch.testing.assert_close(out.flatten(1), mixed)
    torch.testing.assert_close(mixed.sum(1), torch.ones(8))
    assert ((mixed > 0).sum(1) <= 2).all()
    assert ((mixed > 0).sum(1) == 2).any()
    assert (mixed.diagonal() > 0).all()


def test_mixup_shares_follow_beta_and_probability():
    images = torch.zeros(4000, 1, 1, 1)
    images[::2] = 1

    def shares(**options):
        kept, _ = mixup(images, F.one_hot(torch.arange(4000) % 2).float(), generator(0), **options)
        # An image that is mixed with one of the other kind shows its share.
        return kept[::2].flatten()

    uniform = shares()
    assert abs(((uniform > 0) & (uniform < 1)).float().mean() - 0.5) < 0.05
    inner = uniform[uniform < 1]
    assert abs(inner.mean() - 0.5) < 0.03
    assert abs(inner.var() - 1 / 12) < 0.01
    inner = shares(alpha=0.2)
    # Beta(a, a) has variance 1/(8a + 4).
    assert abs(inner[inner < 1].var() - 1 / 5.6) < 0.02
    assert abs((shares(probability=0.5) < 1).float().mean() - 0.25) < 0.05
    assert (shares(probability=0.0) == 1).all()


def test_cutmix_mixes_labels_by_area():
    """Image i is i everywhere, so a pixel says whose it is."""
    images = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 1, 16, 12) / 10
    out, targets = cutmix(images, torch.eye(10), generator(0), probability=1.0)
    for image, target in zip(out, targets, strict=True):
        expected = (image * 10).round().long().flatten().bincount(minlength=10) / (16 * 12)
        torch.testing.assert_close(target, expected)
    changed = out.ne(images).any(1)
    assert len(boxes(changed)) >= 5
    untouched, targets = cutmix(images, torch.eye(10), generator(0), probability=0.0)
    assert torch.equal(untouched, images)
    assert torch.equal(targets, torch.eye(10))


def test_applies_in_the_order_of_the_names():
    images = different(32)
    labels = torch.arange(32) % 10
    numbers = generator(0)
    expected = flip(crop(images, numbers, padding=2), numbers)
    expected, targets = mixup(expected, F.one_hot(labels, 10).float(), numbers)
    expected = cutout(expected, torch.full((1, 1, 1), 0.5), numbers)
    out, found = augment(images, [{"name": "crop", "padding": 2}, "flip", "mixup", "cutout"], 0, labels)
    assert torch.equal(out, expected)
    assert torch.equal(found, targets)
    assert augment(images, [], 0)[0] is images


def test_batches_yield_mixed_targets():
    images = Images(torch.randint(256, (50, 1, 6, 6), dtype=torch.uint8), torch.arange(50) % 10)
    augmentation = Augmentation(["flip", "mixup", "cutmix"], num_classes=10)
    assert augmentation.mixes
    given = {"seed": 0, "epoch": 1, "augment": augmentation}
    whole = list(Batches(images, 20, **given))
    assert [targets.shape for _, targets in whole] == [(20, 10), (20, 10), (10, 10)]
    for one, two in zip(Batches(images, 20, **given, start=1), whole[1:], strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"unknown augmentation 'flop'; did you mean 'flip'.*crop"):
        Augmentation(["flop"])
    with pytest.raises(UserError, match=r"crop: paddin: unknown option of 'crop' 'paddin'; did you mean 'padding'"):
        Augmentation([{"name": "crop", "paddin": 2}])
    with pytest.raises(ValueError, match="'mixup' needs num_classes"):
        Augmentation(["mixup"])
    with pytest.raises(ValueError, match="'cutout' needs mean"):
        Augmentation(["cutout"])
    with pytest.raises(ValueError, match="augmentation 'x' asks for pixels; its positional parameters are images and"):
        augmentations.register("x")(lambda pixels: pixels)
