"""Three easy data sets of ten classes, drawn from a seed: what a newcomer's own pictures may be.

python tests/easy_pictures.py FOLDER        # FOLDER/discs, FOLDER/gratings, FOLDER/letters, 1,400 pictures each
"""

import colorsys
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 32
COLOURS = [tuple(int(230 * value) for value in colorsys.hsv_to_rgb(hue / 10, 0.8, 1)) for hue in range(10)]


def disc(number: int, draws: np.random.Generator) -> Image.Image:
    """A disc in one of ten colours, somewhere on a dark ground."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in draws.integers(0, 60, 3)))
    radius = draws.integers(6, 11)
    x, y = draws.integers(radius + 1, SIZE - radius - 1, 2)
    pen = ImageDraw.Draw(image)
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[number])
    return image


def grating(number: int, draws: np.random.Generator) -> Image.Image:
    """Stripes in one of five directions, narrow or wide, of any phase and colour."""
    angle = math.pi * (number // 2) / 5 + draws.normal(0, 0.05)
    period = (5.0, 10.0)[number % 2] * draws.uniform(0.9, 1.1)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    wave = np.sin(
        2 * math.pi * (columns * math.cos(angle) + rows * math.sin(angle)) / period + draws.uniform(0, 2 * math.pi)
    )
    pixels = 128 + wave[..., None] * draws.uniform(50, 110, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def letter(number: int, draws: np.random.Generator) -> Image.Image:
    """One of ten letters, light on dark, moved and turned a little."""
    image = Image.new("RGB", (SIZE, SIZE), (20, 20, 20))
    x, y = draws.integers(5, 12), draws.integers(-1, 5)
    light = tuple(int(v) for v in draws.integers(150, 256, 3))
    ImageDraw.Draw(image).text((x, y), "AEHKLOSTXZ"[number], fill=light, font=ImageFont.load_default(26))
    return image.rotate(draws.uniform(-12, 12), Image.Resampling.BILINEAR, fillcolor=(20, 20, 20))


SETS: dict[str, Callable[[int, np.random.Generator], Image.Image]] = {
    "discs": disc,
    "gratings": grating,
    "letters": letter,
}


def write(folder: Path, name: str, count: int = 1400) -> Path:
    """Write a set as `folder/name/<class>/<number>.png`; every picture gets a little noise."""
    for index in range(count):
        number = index % 10
        draws = np.random.default_rng((sorted(SETS).index(name), index))
        pixels = np.asarray(SETS[name](number, draws), np.float64) + draws.normal(0, 8, (SIZE, SIZE, 3))
        path = folder / name / f"class{number}" / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    return folder / name


if __name__ == "__main__":
    for set_name in SETS:
        print(write(Path(sys.argv[1]), set_name))
