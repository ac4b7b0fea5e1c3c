"""One picture file: what it is, whatever its name, and its pixels in 8 bits.

Pictures deeper than 8 bits (16 and 32 bits, floats) are scaled by one range for all of a data set (`common_ranges`):
one for each picture would change how bright they are beside each other, and a fixed one would make those that use a
part of their bits black, or those of 32 bits white.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lasnn.errors import UserError, not_read

# What Pillow opens, but cannot decode, or only by another program.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
# Formats whose first bytes are a signature: a file of any name that has it is a picture.
SIGNED = {"AVIF", "BMP", "DDS", "GIF", "HEIF", "ICNS", "JPEG", "JPEG2000", "JXL", "MPO", "PNG", "PSD", "QOI", "TIFF"}
SIGNED |= {"WEBP"}
# Pictures to their owner, which Pillow reads only with an extension, or of which it sees a preview.
OTHER_ENDINGS = {".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".webp", ".exr", ".hdr", ".dcm", ".svg"}
RAW_ENDINGS = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"}
# Further frames are further pictures; of other formats they are previews, sizes or layers.
FRAMED = {"AVIF", "DCX", "FLI", "GIF", "PNG", "TIFF", "WEBP"}
# How many bits the largest value may need: those that cameras and scanners have, then those of the containers.
BITS = (8, 10, 12, 14, 16, 24, 31)
# Files are told apart by so many bytes at their beginning, middle and end, and by their size.
BLOCK = 2**16
KEY_BYTES = 8

Range = tuple[float, float]


@dataclass(frozen=True)
class Ranges:
    """The values that become black and white: of whole numbers deeper than 8 bits, and of floats; None if not known."""

    integers: Range | None = None
    floats: Range | None = None


@dataclass(frozen=True)
class Seen:
    """What is known of a picture once it was decoded: `kind` is "integers" or "floats" where it is deep, else None."""

    size: tuple[int, int]
    kind: str | None = None
    low: float = 0.0
    high: float = 0.0
    framed: bool = False
    digest: bytes = b""
    key: bytes = b""


@cache
def formats() -> tuple[str, ...]:
    """The formats that Pillow decodes here."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - NO_PICTURES))


@cache
def endings() -> frozenset[str]:
    """The endings of pictures, in lower case."""
    known = set(formats())
    return frozenset(end for end, form in Image.registered_extensions().items() if form in known) | OTHER_ENDINGS


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its ending or, if that is none of a picture, by its first bytes.

    Raises:
        OSError: it cannot be opened.
    """
    ending = path.suffix.lower()
    if ending in endings() or ending in RAW_ENDINGS:
        return True
    signed = [form for form in formats() if form in SIGNED]
    with open(path, "rb") as file:
        try:
            with Image.open(file, formats=signed):
                return True
        except UnidentifiedImageError:
            return False
        except Exception:
            # It has the signature, and is damaged: whoever reads it says how.
            return True


def key(file: BinaryIO) -> bytes:
    """What tells a file's content from others, of at most three blocks of it: the same content has the same key."""
    size = file.seek(0, os.SEEK_END)
    blocks = [0] if size <= BLOCK else sorted({0, max(0, (size - BLOCK) // 2), max(0, size - BLOCK)})
    sha = sha256(str(size).encode())
    for start in blocks:
        file.seek(start)
        sha.update(file.read(BLOCK))
    return sha.digest()[:KEY_BYTES]


def key_of(path: Path) -> bytes:
    """The key of a file.

    Raises:
        UserError: it cannot be read.
        MachineError: the machine failed to read it.
    """
    with _reading(path), open(path, "rb") as file:
        return key(file)


def read_image(path: Path, shape: tuple[int, int, int], fit: str, ranges: Ranges | None = None) -> np.ndarray:
    """A picture as uint8 [C, H, W]: the first frame, turned as its EXIF data say, transparency on black.

    Args:
        fit: "crop" or "stretch".
        ranges: what is black and white in pictures deeper than 8 bits; None takes what this one alone has.

    Raises:
        UserError: the file cannot be read or decoded; one line that names it.
        MachineError: the machine failed to read it.
    """
    return _decode(path, _content(path), shape, fit, ranges)[0]


def examine(path: Path, shape: tuple[int, int, int], fit: str) -> Seen:
    """Decode a picture to know that it can be, and what it is; errors as for `read_image`."""
    content = _content(path)
    seen = _decode(path, content, shape, fit, None)[1]
    return Seen(**{**vars(seen), "digest": sha256(content).digest()[:16], "key": key(BytesIO(content))})


def common_ranges(seen: Iterable[Seen]) -> Ranges:
    """The ranges by which all pictures of a data set are scaled.

    Whole numbers: from 0 to the most that 8, 10, 12, 14, 16, 24 or 31 bits hold, the fewest that suit all; with
    negative ones from the least to the greatest. Floats: from 0 to 1 if all are within, else from the least to the
    greatest.

    Raises:
        UserError: the deep pictures are all of one value.
    """
    found: dict[str, Range] = {}
    for one in seen:
        if one.kind:
            low, high = found.get(one.kind, (one.low, one.high))
            found[one.kind] = min(low, one.low), max(high, one.high)
    ranges = {kind: _suited(kind, *limits) for kind, limits in found.items()}
    same = [low for low, high in ranges.values() if low == high]
    if same:
        raise UserError(f"the pictures deeper than 8 bits all have the one value {same[0]:g}: there is nothing to see")
    return Ranges(**ranges)


def _suited(kind: str, low: float, high: float) -> Range:
    """The range for values between two."""
    if kind == "integers" and low >= 0:
        return 0.0, float(next(2**bits for bits in (*BITS, 64) if high < 2**bits) - 1)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def _content(path: Path) -> bytes:
    with _reading(path):
        content = path.read_bytes()
    if not content:
        raise UserError(f"{path}: empty")
    return content


class _reading:
    """Turns an error of the system within the block into a line that names the file."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, FileNotFoundError):
            what = "a link to a file that is not there" if self.path.is_symlink() else "is not there (any more)"
            raise UserError(f"{self.path}: {what}") from error
        if isinstance(error, OSError):
            raise not_read(self.path, error) from error


def _decode(
    path: Path, content: bytes, shape: tuple[int, int, int], fit: str, ranges: Ranges | None
) -> tuple[np.ndarray, Seen]:
    channels, height, width = shape
    ending = path.suffix.lower()
    if ending in RAW_ENDINGS:
        # By its content many are TIFF, of which Pillow would take the small preview.
        raise UserError(f"{path}: a camera's raw data; develop it to PNG or JPEG")
    try:
        with Image.open(BytesIO(content), formats=formats()) as opened:
            # Before anything is decoded: it looks at other frames, and comes back.
            framed = opened.format in FRAMED and getattr(opened, "is_animated", False)
            deep = _deep(opened, content)
            if deep:
                values, kind, low, high = deep
                seen = Seen(opened.size, kind, low, high, framed)
                scale = getattr(ranges, kind, None) or _suited(kind, low, high)
                image = _turned(Image.fromarray(_scaled(values, scale)), opened)
            else:
                seen = Seen(opened.size, framed=framed)
                image = _eight_bits(ImageOps.exif_transpose(opened))
            image = image.convert("L" if channels == 1 else "RGB")
            if fit == "crop":
                image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
            elif image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.array(image)
    except MemoryError:
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        lacking = f"; Pillow cannot read {ending} here: convert it to PNG or JPEG" if ending in OTHER_ENDINGS else ""
        raise UserError(f"{path}: not a picture{lacking}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too large ({error})") from error
    except Exception as error:
        # A damaged file can make a decoder raise anything.
        raise UserError(f"{path}: truncated or damaged ({' '.join(str(error).split())})") from error
    return np.atleast_3d(pixels).transpose(2, 0, 1), seen


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 8 bits a channel in a mode that converts to grey and to RGB, its transparency on black."""
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB"))
    if image.mode == "La":
        image = image.convert("LA")
    if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image


def _turned(image: Image.Image, opened: Image.Image) -> Image.Image:
    """An image without EXIF data, turned as those of another say."""
    exif = Image.Exif()
    exif[0x0112] = opened.getexif().get(0x0112, 1)
    image.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(image)


def _deep(opened: Image.Image, content: bytes) -> tuple[np.ndarray, str, float, float] | None:
    """The values [H, W] or [H, W, 3] of a picture deeper than 8 bits, their kind, the least and the greatest."""
    # Decoding forgets it.
    raw = _raw_mode(opened)
    if opened.mode == "F":
        values = np.asarray(opened, np.float64)
        if not np.isfinite(values).all():
            raise UserError("some of its values are not finite numbers")
        return values, "floats", float(values.min()), float(values.max())
    if opened.mode == "I" or opened.mode.startswith("I;16"):
        values = np.asarray(opened, np.int64)
    elif ";16" in raw and opened.mode in ("LA", "RGB", "RGBA"):
        values = _both_bytes(opened, content, raw)
    else:
        return None
    hidden = opened.info.get("transparency")
    if opened.format == "PNG" and isinstance(hidden, int | tuple):
        # A value, or a colour, that stands for transparent.
        seen = (values != np.asarray(hidden)).reshape(*values.shape[:2], -1).any(2)
        values = values * seen.reshape(*seen.shape, *[1] * (values.ndim - 2))
    return values, "integers", float(values.min()), float(values.max())


def _raw_mode(opened: Image.Image) -> str:
    """How a picture's pixels lie in its file, in Pillow's words, as "RGB;16B"; empty if it does not say."""
    tiles = getattr(opened, "tile", None)
    args = tiles[0][3] if tiles else ""
    args = args[0] if isinstance(args, tuple) and args else args
    return args if isinstance(args, str) else ""


def _both_bytes(opened: Image.Image, content: bytes, raw: str) -> np.ndarray:
    """The 16-bit values [H, W, 3] of a colour picture of which Pillow decodes the higher bytes; transparency on black.

    As if the bytes lay in the other order it decodes the lower ones; with grey and alpha it takes all four for colours.
    """
    if raw.startswith("LA"):
        low = high = np.asarray(_reread(content, "RGBA"), np.int64)
        values = np.repeat(high[..., :1] * 256 + low[..., 1:2], 3, axis=2)
        return values * high[..., 2:3] // 255
    mode, _, order = raw.partition(";16")
    little = "L" if order[:1] == "L" or (order[:1] == "N" and sys.byteorder == "little") else "B"
    other = f"{mode};16{'B' if little == 'L' else 'L'}"
    values = np.asarray(opened, np.int64) * 256 + np.asarray(_reread(content, other), np.int64)
    return values[..., :3] * values[..., 3:] // 65_535 if values.shape[2] == 4 else values


def _reread(content: bytes, other: str) -> Image.Image:
    """The first frame again, its pixels unpacked in another way."""
    image = Image.open(BytesIO(content), formats=formats())
    changed = [other if isinstance(tile[3], str) else (other, *tile[3][1:]) for tile in image.tile]
    # From Pillow 11 on they are named tuples.
    image.tile = [
        tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)
        for tile, args in zip(image.tile, changed, strict=True)
    ]
    return image


def _scaled(values: np.ndarray, scale: Range) -> np.ndarray:
    low, high = scale
    # One picture of one value, beside others or alone.
    span = (high - low) or 1.0
    return np.rint((values - low) * (255 / span)).clip(0, 255).astype(np.uint8)
