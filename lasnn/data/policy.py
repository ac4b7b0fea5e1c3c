"""torchvision's augmentation policies, image by image in their draws, operation by operation in their work.

torchvision's own transforms draw from PyTorch's global generator, once a call. Here every image has its own draws, from
a given generator on the CPU and in torchvision's order, so that an image is what torchvision makes of it with that
random state; images that drew the same operation and magnitude then go through torchvision's function together, on
their device.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms import functional as F

# An operation's name and its magnitude; 0.0 for an operation that has none.
Operation = tuple[str, float]
# The magnitudes of an operation, from weak to strong, and whether its sign is drawn; None for one without magnitude.
Range = tuple[Tensor, bool] | None


def _affine(name: str) -> Callable[[Tensor, float, list[float]], Tensor]:
    """Shearing about the top left corner, or translation; nearest pixel."""
    axis = "XY".index(name[-1])

    def apply(images: Tensor, magnitude: float, fill: list[float]) -> Tensor:
        pair = [0.0, 0.0]
        if name.startswith("Shear"):
            pair[axis] = math.degrees(math.atan(magnitude))
            return F.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=pair, fill=fill, center=[0, 0])
        pair[axis] = int(magnitude)
        return F.affine(images, angle=0.0, translate=pair, scale=1.0, shear=[0.0, 0.0], fill=fill)

    return apply


# uint8 [N, C, H, W], the magnitude, the fill for pixels from outside -> uint8 [N, C, H, W].
OPERATIONS: dict[str, Callable[[Tensor, float, list[float]], Tensor]] = {
    "Identity": lambda images, magnitude, fill: images,
    "ShearX": _affine("ShearX"),
    "ShearY": _affine("ShearY"),
    "TranslateX": _affine("TranslateX"),
    "TranslateY": _affine("TranslateY"),
    "Rotate": lambda images, magnitude, fill: F.rotate(images, magnitude, fill=fill),
    "Brightness": lambda images, magnitude, fill: F.adjust_brightness(images, 1 + magnitude),
    "Color": lambda images, magnitude, fill: F.adjust_saturation(images, 1 + magnitude),
    "Contrast": lambda images, magnitude, fill: F.adjust_contrast(images, 1 + magnitude),
    "Sharpness": lambda images, magnitude, fill: F.adjust_sharpness(images, 1 + magnitude),
    "Posterize": lambda images, magnitude, fill: F.posterize(images, int(magnitude)),
    "Solarize": lambda images, magnitude, fill: F.solarize(images, magnitude),
    "AutoContrast": lambda images, magnitude, fill: F.autocontrast(images),
    "Equalize": lambda images, magnitude, fill: F.equalize(images),
    "Invert": lambda images, magnitude, fill: F.invert(images),
}


def _space(
    bins: int, shear: float, across: float, down: float, rotate: float, colour: float, bits: int
) -> dict[str, Range]:
    """The operations that RandAugment and TrivialAugment draw from, in torchvision's order, with their magnitudes."""
    return {
        "Identity": None,
        "ShearX": (torch.linspace(0.0, shear, bins), True),
        "ShearY": (torch.linspace(0.0, shear, bins), True),
        "TranslateX": (torch.linspace(0.0, across, bins), True),
        "TranslateY": (torch.linspace(0.0, down, bins), True),
        "Rotate": (torch.linspace(0.0, rotate, bins), True),
        "Brightness": (torch.linspace(0.0, colour, bins), True),
        "Color": (torch.linspace(0.0, colour, bins), True),
        "Contrast": (torch.linspace(0.0, colour, bins), True),
        "Sharpness": (torch.linspace(0.0, colour, bins), True),
        "Posterize": (8 - (torch.arange(bins) / ((bins - 1) / bits)).round().int(), False),
        "Solarize": (torch.linspace(255.0, 0.0, bins), False),
        "AutoContrast": None,
        "Equalize": None,
    }


def _small(bins: int, height: int, width: int) -> dict[str, Range]:
    """The magnitudes of AutoAugment and RandAugment; images of 331 pixels move by up to 150."""
    return _space(bins, 0.3, 150 / 331 * width, 150 / 331 * height, 30.0, 0.9, 4)


def _draw(count: int, generator: Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))


def draw_auto(size: tuple[int, int], policy: str) -> Callable[[Generator], list[Operation]]:
    """Draws an image's operations by a learnt policy (Cubuk et al., CVPR 2019): a pair of 25, each with a probability.

    Args:
        size: H, W of the images.
        policy: "cifar10", "imagenet" or "svhn".
    """
    policies = AutoAugment(AutoAugmentPolicy(policy)).policies
    space = _small(10, *size) | {"Invert": None}

    def draw(generator: Generator) -> list[Operation]:
        chosen = policies[_draw(len(policies), generator)]
        shares, signs = torch.rand(2, generator=generator), torch.randint(2, (2,), generator=generator)
        operations = []
        for (name, probability, level), share, sign in zip(chosen, shares.tolist(), signs.tolist(), strict=True):
            if share <= probability:
                magnitudes, signed = space[name] or (None, False)
                magnitude = 0.0 if level is None else float(magnitudes[level])
                operations.append((name, -magnitude if signed and not sign else magnitude))
        return operations

    return draw


def draw_rand(size: tuple[int, int], operations: int, magnitude: int) -> Callable[[Generator], list[Operation]]:
    """Draws an image's `operations` of one strength (Cubuk et al., NeurIPS 2020).

    Args:
        size: H, W of the images.
        magnitude: 0 to 30.
    """
    space = list(_small(31, *size).items())

    def draw_one(generator: Generator) -> Operation:
        name, scale = space[_draw(len(space), generator)]
        strength = float(scale[0][magnitude]) if scale else 0.0
        return name, -strength if scale and scale[1] and _draw(2, generator) else strength

    return lambda generator: [draw_one(generator) for _ in range(operations)]


def draw_trivial() -> Callable[[Generator], list[Operation]]:
    """Draws an image's one operation of any strength, in the wide space (Müller & Hutter, ICCV 2021)."""
    space = list(_space(31, 0.99, 32.0, 32.0, 135.0, 0.99, 6).items())

    def draw(generator: Generator) -> list[Operation]:
        name, scale = space[_draw(len(space), generator)]
        strength = float(scale[0][_draw(31, generator)]) if scale else 0.0
        return [(name, -strength if scale and scale[1] and _draw(2, generator) else strength)]

    return draw


def apply(images: Tensor, operations: list[list[Operation]], fill: float = 0.0) -> Tensor:
    """Apply each image's own operations, in order.

    Args:
        images: uint8 [B, 1 or 3, H, W].
        operations: a list for each image.
        fill: of pixels from outside the image, in [0, 1].
    """
    images, fills = images.clone(), [round(255 * fill)] * images.shape[1]
    for turn in range(max(map(len, operations), default=0)):
        groups = defaultdict(list)
        for image, own in enumerate(operations):
            if turn < len(own) and own[turn][0] != "Identity":
                groups[own[turn]].append(image)
        for (name, magnitude), members in groups.items():
            where = torch.tensor(members).to(images.device, non_blocking=True)
            images[where] = OPERATIONS[name](images[where], magnitude, fills)
    return images
