"""Small images as PNG data URIs."""

import base64
import io

import numpy as np
from PIL import Image
from torch import Tensor

# matplotlib's magma (van der Walt and Smith; CC0), perceptually uniform and legible to the colour-blind: every eighth
# of its 256 colours, between which the others lie within a step of 8-bit colour.
MAGMA = (
    "0000040303120a0822130d341d114729115a36106b440f7651127c5d177f6a1c81762181832681902a819c2e7faa337db73779c23b75cf40"
    "70db476ae55064ee5b5ef4695cf9785dfb8761fd9668fea571feb47bfec287fed194fde0a1fceeb0fcfdbf"
)
# Larger images are shrunk to this, larger maps to that, so that a page stays small.
PIXELS, MAP_PIXELS = 96, 64


def palette() -> np.ndarray:
    """The colours of values from 0 to 1, uint8 [256, 3]."""
    anchors = np.frombuffer(bytes.fromhex(MAGMA), np.uint8).reshape(-1, 3)
    places = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(places, np.arange(len(anchors)), anchors[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def photo(pixels: Tensor) -> str:
    """An image, uint8 [C, H, W]; of other than 3 channels the first is shown in grey."""
    array = pixels.numpy()
    picture = Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)) if len(array) == 3 else array[0])
    picture.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    return uri(picture)


def heat(values: Tensor, top: float, limit: int = MAP_PIXELS) -> str:
    """A map [H, W] in the palette, 0 the darkest and `top` the brightest; at most `limit` pixels a side."""
    scaled = (values.double().numpy() / (top or 1.0)).clip(0, 1)
    picture = Image.fromarray((255 * scaled).round().astype(np.uint8))
    picture.thumbnail((limit, limit), Image.Resampling.BOX)
    picture.putpalette(palette().tobytes())
    return uri(picture)


def scale() -> str:
    """The palette from left to right."""
    picture = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    picture.putpalette(palette().tobytes())
    return uri(picture)


def uri(picture: Image.Image) -> str:
    """The picture as a PNG in a data URI."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
