"""Your own pictures: a folder a class, any size, any common format."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from lasnn.data.dataset import Dataset, unreadable
from lasnn.errors import UserError
from lasnn.random import generator
from lasnn.registry import datasets

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TEST_NAMES = ("val", "test")
# Of ImageNet's training images, the usual choice for photographs; in grey, their luminance by the same weights as
# pillow's (0.299, 0.587, 0.114), the deviations as if the channels varied together.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.459,), (0.226,)

Side = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ImageFiles:
    """Picture files of one split, decoded when they are read; a `lasnn.data.stream.Source`.

    Args:
        paths: the files.
        labels: int64 [N].
        root: the folder that their names are relative to.
        shape: C, H, W of every image.
        fit: "crop" or "stretch".
    """

    def __init__(self, paths: Sequence[Path], labels: Tensor, root: Path, shape: tuple[int, int, int], fit: str):
        self.paths = list(paths)
        self.labels = labels
        self.root = root
        self.shape = (len(self.paths), *shape)
        self.fit = fit

    def read(self, chosen: Sequence[int]) -> Tensor:
        """The pixels of some images, uint8 [n, C, H, W].

        Raises:
            UserError: a file cannot be read (any more).
        """
        paths = [self.paths[index] for index in chosen]
        pixels = torch.empty((len(paths), *self.shape[1:]), dtype=torch.uint8)
        for index, path in enumerate(paths):
            pixels[index] = torch.from_numpy(read_image(path, self.shape[1:], self.fit))
        return pixels

    def unreadable(self) -> dict[int, str]:
        """{index: reason} of the files that cannot be decoded; every file is."""

        def attempt(index: int) -> str | None:
            try:
                read_image(self.paths[index], self.shape[1:], self.fit)
            except UserError as error:
                return str(error)
            return None

        # Pillow decodes outside the interpreter's lock.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = dict(enumerate(pool.map(attempt, range(len(self.paths)), chunksize=16)))
        return {index: reason for index, reason in found.items() if reason is not None}

    def without(self, dropped: dict[int, str]) -> "ImageFiles":
        """The same files without some."""
        kept = [index for index in range(len(self.paths)) if index not in dropped]
        paths = [self.paths[index] for index in kept]
        return ImageFiles(paths, self.labels[kept], self.root, self.shape[1:], self.fit)

    def fingerprint(self) -> str:
        """Of the files' names below their root, sizes and times of change, and of how they are decoded."""
        lines = [repr((self.shape, self.fit))]
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            status = path.stat()
            lines.append(f"{path.relative_to(self.root)} {label} {status.st_size} {status.st_mtime_ns}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@datasets.register("image-folder")
class ImageFolder(Dataset):
    """Your own pictures in `root`: train/<class>/ and val/<class>/ (or test/), or <class>/ and a split drawn by seed.

    Pictures are scaled to `size` (pixels, or height and width): "crop" keeps their proportions and cuts the middle out,
    "stretch" does not. `grey` makes them one channel. Without val/ or test/, `val_fraction` of each class is drawn with
    `split_seed`, at least one. Files that cannot be decoded are an error, unless `skip_unreadable`; hidden files and
    those of other endings are left alone. `num_classes` is checked if given. `mean` and `std`, in [0, 1], are what
    images are normalised with; left out, ImageNet's.

    Raises:
        UserError: `mean` or `std` does not suit the channels; from the first look at `classes`, `train_size` or
            `test_size`: everything that is wrong with the folders.
    """

    augment = ()

    def __init__(
        self,
        root: Path | str = "data",
        *,
        size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)],
        grey: bool = False,
        fit: Literal["crop", "stretch"] = "crop",
        val_fraction: Share = 0.2,
        split_seed: int = 0,
        skip_unreadable: bool = False,
        num_classes: Annotated[int, Field(ge=2)] | None = None,
        mean: list[Unit] | None = None,
        std: list[Positive] | None = None,
    ):
        self.root = Path(root)
        self.height, self.width = (size, size) if isinstance(size, int) else size
        self.channels = 1 if grey else 3
        self.fit = fit
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.skip_unreadable = skip_unreadable
        self.num_classes = num_classes
        self.mean = tuple(mean or (GREY_MEAN if grey else MEAN))
        self.std = tuple(std or (GREY_STD if grey else STD))
        wrong = [
            f"{name} has {len(values)} values; the images have {self.channels} channels"
            for name, values in (("mean", self.mean), ("std", self.std))
            if len(values) != self.channels
        ]
        if wrong:
            raise UserError(*wrong)
        self._skipped = (0, 0)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._found[0]

    @property
    def train_size(self) -> int:
        return len(self._found[1].paths) - self._skipped[0]

    @property
    def test_size(self) -> int:
        return len(self._found[2].paths) - self._skipped[1]

    def load(self) -> tuple[ImageFiles, ImageFiles]:
        """Decode every file once, to know that all can be.

        Raises:
            UserError: files that cannot be decoded, named and counted; with `skip_unreadable` only if all of a class
                are.
        """
        splits = self._found[1:]
        bad = [split.unreadable() for split in splits]
        reasons = [reason for found in bad for reason in found.values()]
        if reasons and not self.skip_unreadable:
            raise unreadable(reasons, sum(len(split.paths) for split in splits))
        kept = [split.without(found) for split, found in zip(splits, bad, strict=True)]
        missing = [
            f"{self.root}: no readable {what} picture of class {self.classes[label]!r}"
            for what, split in zip(("training", "test"), kept, strict=True)
            for label in sorted(set(range(len(self.classes))) - set(split.labels.tolist()))
        ]
        if missing:
            raise UserError(*missing)
        self._skipped = (len(bad[0]), len(bad[1]))
        self.source = f"{self.root}" + (f", {len(reasons)} unreadable pictures skipped" if reasons else "")
        return kept[0], kept[1]

    @cached_property
    def _found(self) -> tuple[tuple[str, ...], ImageFiles, ImageFiles]:
        """Classes, training and test files; nothing is decoded."""
        root, problems = self.root, []
        if not root.is_dir():
            raise UserError(f"no folder {root}; data.root names the folder of the pictures")
        test_name = next((name for name in TEST_NAMES if (root / name).is_dir()), None)
        split = (root / "train").is_dir()
        if split and test_name is None:
            raise UserError(
                f"{root} has train but neither val nor test; add one, or put the classes into {root} itself"
            )
        if test_name and not split:
            raise UserError(f"{root} has {test_name} but no train; add it, or put the classes into {root} itself")
        train = _pictures(root / "train" if split else root, problems)
        test = _pictures(root / test_name, problems) if split else {}
        classes = tuple(sorted(train))
        folded = [name.casefold() for name in classes]
        problems += [
            f"{root}: the classes {', '.join(n for n in classes if n.casefold() == name)} differ in case only"
            for name in sorted(set(folded))
            if folded.count(name) > 1
        ]
        if split and set(test) != set(train):
            for here, there, names in (("train", test_name, train), (test_name, "train", test)):
                only = sorted(set(names) - set(test if here == "train" else train))
                if only:
                    problems.append(f"{root}: classes in {here} but not in {there}: {', '.join(only)}")
        if len(classes) < 2 and not problems:
            problems.append(f"{root}: {len(classes)} folders of classes; at least 2 are needed")
        if self.num_classes not in (None, len(classes)):
            problems.append(f"{root}: {len(classes)} classes; data.num_classes says {self.num_classes}")
        if not split:
            for name, paths in train.items():
                if len(paths) == 1:
                    problems.append(f"{root / name}: one picture cannot be split into training and test")
                count = max(1, round(self.val_fraction * len(paths)))
                order = torch.randperm(len(paths), generator=generator(self.split_seed, "split", name)).tolist()
                drawn = set(order[: min(count, len(paths) - 1)])
                test[name] = [path for index, path in enumerate(paths) if index in drawn]
                train[name] = [path for index, path in enumerate(paths) if index not in drawn]
        if problems:
            raise UserError(*problems)
        shape = (self.channels, self.height, self.width)
        splits = [
            ImageFiles(
                [path for name in classes for path in files[name]],
                torch.tensor([label for label, name in enumerate(classes) for _ in files[name]], dtype=torch.int64),
                root,
                shape,
                self.fit,
            )
            for files in (train, test)
        ]
        return classes, splits[0], splits[1]


def _pictures(folder: Path, problems: list[str]) -> dict[str, list[Path]]:
    """{class: its picture files, also those in folders below it}, both in the order of their names."""
    found = {}
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(path for path in inner.rglob("*") if path.is_file() and not path.name.startswith("."))
        found[inner.name] = [path for path in files if path.suffix.lower() in ENDINGS]
        if not found[inner.name]:
            others = f" ({len(files)} files of other kinds)" if files else ""
            problems.append(f"{inner}: no pictures in it{others}; known endings: {', '.join(ENDINGS)}")
    if not found:
        problems.append(f"{folder}: no folders of classes in it")
    return found


def read_image(path: Path, shape: tuple[int, int, int], fit: str) -> np.ndarray:
    """A picture as uint8 [C, H, W]: the first frame, turned as its EXIF data say, transparency on black.

    Raises:
        UserError: the file cannot be read or decoded; one line that names it.
    """
    channels, height, width = shape
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: empty")
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16") or image.mode == "I":
                # Pillow would clip the 16 bits to 8.
                image = Image.fromarray((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
            image = image.convert("L" if channels == 1 else "RGB")
            if fit == "crop":
                image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
            elif image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.array(image)
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not a picture") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too large ({error})") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{path}: truncated or damaged ({' '.join(str(error).split())})") from error
    return np.atleast_3d(pixels).transpose(2, 0, 1)
