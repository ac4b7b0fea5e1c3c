"""Tiny ImageNet: 200 classes of ImageNet at 64 x 64 pixels (Le and Yang, Stanford CS231N report, 2015)."""

import os
import re
from collections.abc import Callable
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from lasnn.data.archive import Archive
from lasnn.data.dataset import Dataset, Images, unreadable
from lasnn.errors import UserError, not_read
from lasnn.registry import datasets

FOLDER = "tiny-imagenet-200"
URL = f"http://cs231n.stanford.edu/{FOLDER}.zip"
# As public loaders know it; not verified here, for lack of the file.
ARCHIVE = Archive("Tiny ImageNet", URL, "90528d7ca1a48142e341f4ef8d21d0de", FOLDER)

Content = TypeVar("Content")


@datasets.register("tiny-imagenet")
class TinyImageNet(Dataset):
    """Tiny ImageNet: 100,000 training images and 10,000 validation images as test, 64 x 64, 200 classes.

    It is read from `root`/tiny-imagenet-200 or, where that holds no wnids.txt, from `root` itself; the archive
    tiny-imagenet-200.zip in `root` is unpacked, and with `download` fetched. The labels of its own test images were
    never published; as is usual, its validation images take their place.

    The names of the classes stand only on disk: `classes` holds the labels as text ("0" to "199") until `load`
    replaces them by the WordNet ids of wnids.txt, whose line number is the label. (The words of words.txt are
    not read; they need not be unique.)

    Training images come class by class and, within a class, by the number in the file name; validation images
    by that number. Images that cannot be decoded are an error, unless `skip_unreadable`; a missing one always is.
    """

    channels, height, width = 3, 64, 64
    classes = tuple(map(str, range(200)))
    classes_known = False
    train_size, test_size = 100_000, 10_000
    # Taken from public training code, where these are the usual ones; not measured here, for lack of the data.
    # The same means also come with the deviations (0.2302, 0.2265, 0.2262) there.
    mean, std = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
    augment = ("crop", "flip")

    def __init__(self, root: Path | str = "data", *, download: bool = False, skip_unreadable: bool = False):
        self.root = Path(root)
        self.download = download
        self.skip_unreadable = skip_unreadable

    def load(self) -> tuple[Images, Images]:
        """Read the training and the validation images, on the CPU: pixels [N, 3, 64, 64], greyscale as RGB.

        Raises:
            UserError: the data is not there, or broken: the file that is, or all images that cannot be decoded, named
                and counted; with `skip_unreadable` only if all of a class are.
            MachineError: the machine failed to read a file, or the download failed.
        """
        # Some unpackers make a folder of the archive's name around the one that is in it.
        nested = self.root / FOLDER / FOLDER
        if os.path.exists(nested / "wnids.txt"):
            folder = nested
        else:
            folder = ARCHIVE.find(self.root, "wnids.txt", download=self.download)
        classes = self._read_classes(folder / "wnids.txt")
        # All names before the first image: what is missing shows at once.
        train, test = self._find_train(folder / "train", classes), self._find_test(folder / "val", classes)
        reasons: list[str] = []
        images = self._read(*train, reasons), self._read(*test, reasons)
        if reasons and not self.skip_unreadable:
            raise unreadable(reasons, len(train[0]) + len(test[0]))
        lost = [
            f"{folder}: no readable {what} image of class {wnid}"
            for what, split in zip(("training", "validation"), images, strict=True)
            for wnid, count in zip(classes, split.labels.bincount(minlength=len(classes)).tolist(), strict=True)
            if count == 0
        ]
        if lost:
            raise UserError(*lost)
        self.train_size, self.test_size = map(len, images)
        self.classes, self.classes_known = classes, True
        self.source = f"{folder}" + (f", {len(reasons)} unreadable images skipped" if reasons else "")
        return images

    def _read_classes(self, path: Path) -> tuple[str, ...]:
        classes = tuple(_read_text(path).split())
        if len(classes) != len(self.classes):
            raise UserError(f"{path}: {len(classes)} classes; {len(self.classes)} expected")
        if twice := _first_repeated(classes):
            raise UserError(f"{path}: {twice!r} is there twice")
        return classes

    def _find_train(self, folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], list[int]]:
        """Path and label of every training image, in the order of the data set."""
        # What the set has, not what an earlier call could read of it.
        expected = type(self).train_size // len(classes)
        paths, labels = [], []
        for label, wnid in enumerate(classes):
            inner = folder / wnid / "images"
            if not inner.exists() and _numbered(folder / wnid, wnid):
                # Scripts that sort the images leave the inner folder out.
                inner = folder / wnid
            names = _numbered(inner, wnid)
            if len(names) != expected:
                raise UserError(f"{inner}: {len(names)} images {wnid}_<number>.JPEG; {expected} expected")
            paths += [inner / name for name in names]
            labels += [label] * expected
        return paths, labels

    def _find_test(self, folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], list[int]]:
        """Path and label of every validation image, in the order of the data set.

        As archived they lie in one folder; scripts that suit other loaders sort them into a folder a class. In the one
        folder, val_annotations.txt has a line for each: file name, WordNet id and the four
        numbers of a box, separated by tabs.
        """
        inner, annotations = folder / "images", folder / "val_annotations.txt"
        if not (inner.is_dir() and _numbered(inner, "val")) and any((folder / wnid).is_dir() for wnid in classes):
            return self._find_sorted(folder, classes)
        names = _numbered(inner, "val")
        present, label_of = set(names), {wnid: label for label, wnid in enumerate(classes)}
        other_ending = {name.rpartition(".")[0].lower(): name for name in names}
        labels: dict[str, int] = {}
        for number, line in enumerate(_read_text(annotations).splitlines(), 1):
            where = f"{annotations}, line {number}"
            fields = line.split("\t")
            if len(fields) != 6:
                raise UserError(f"{where}: {len(fields)} fields separated by tabs; 6 expected")
            name, wnid = fields[:2]
            name = other_ending.get(name.removesuffix(".JPEG").lower(), name)
            if wnid not in label_of:
                raise UserError(f"{where}: {wnid!r} is not in wnids.txt")
            if name not in present:
                raise UserError(f"{where}: there is no image {name!r} in {inner}")
            if name in labels:
                raise UserError(f"{where}: {name!r} has an earlier line")
            labels[name] = label_of[wnid]
        for name in names:
            if name not in labels:
                raise UserError(f"{inner / name}: has no line in {annotations}")
        size = type(self).test_size
        if len(names) != size:
            raise UserError(f"{inner}: {len(names)} images val_<number>.JPEG; {size} expected")
        # The validation images are balanced, so a changed label shows.
        expected = size // len(classes)
        ordered = [labels[name] for name in names]
        for wnid, count in zip(classes, np.bincount(ordered, minlength=len(classes)), strict=True):
            if count != expected:
                raise UserError(f"{annotations}: {count} images of class {wnid}; {expected} expected")
        return [inner / name for name in names], ordered

    def _find_sorted(self, folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], list[int]]:
        """Path and label of every validation image where each lies in the folder of its class, in the same order."""
        expected = type(self).test_size // len(classes)
        found: list[tuple[int, Path, int]] = []
        for label, wnid in enumerate(classes):
            inner = folder / wnid
            if (inner / "images").is_dir():
                inner = inner / "images"
            names = _numbered(inner, "val")
            if len(names) != expected:
                raise UserError(f"{inner}: {len(names)} images val_<number>.JPEG; {expected} expected")
            found += [(int(re.findall("[0-9]+", name)[0]), inner / name, label) for name in names]
        found.sort()
        for (number, path, _), (following, other, _) in pairwise(found):
            if number == following:
                raise UserError(f"{path} and {other} are both number {number}")
        return [path for _, path, _ in found], [label for _, _, label in found]

    def _read(self, paths: list[Path], labels: list[int], reasons: list[str]) -> Images:
        """The images that can be decoded; of the others, the reasons are added."""
        pixels, kept = np.empty((len(paths), self.channels, self.height, self.width), np.uint8), []
        # One thread: files of 2 KB take 0.15 ms each, mostly under the interpreter's lock, and a pool on two
        # cores was no faster.
        for path, label in zip(paths, labels, strict=True):
            try:
                pixels[len(kept)] = _read_image(path, self.height, self.width)
                kept.append(label)
            except UserError as error:
                reasons.append(str(error))
        return Images(torch.from_numpy(pixels)[: len(kept)], torch.tensor(kept, dtype=torch.int64))


def _read_image(path: Path, height: int, width: int) -> np.ndarray:
    """The pixels [3, height, width] of a JPEG."""
    content = _attempt(Path.read_bytes, path)
    if not content:
        raise UserError(f"{path}: empty; unzip {FOLDER}.zip again")
    try:
        with Image.open(BytesIO(content), formats=["JPEG"]) as image:
            if image.size != (width, height):
                raise UserError(f"{path}: {image.width} x {image.height} pixels; {width} x {height} expected")
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not a JPEG image" if not content.startswith(b"\xff\xd8") else "truncated or damaged JPEG image"
        raise UserError(f"{path}: {reason}; unzip {FOLDER}.zip again") from error


def _numbered(folder: Path, stem: str) -> list[str]:
    """The names <stem>_<number>.JPEG in a folder by their number; what else is there is no image of the set.

    The ending may be written as others do, .jpg or in lower case.
    """
    pattern = re.compile(rf"{re.escape(stem)}_([0-9]+)\.jpe?g", re.IGNORECASE)
    found = [match for name in _attempt(os.listdir, folder) if (match := pattern.fullmatch(name))]
    return [match[0] for match in sorted(found, key=lambda match: (int(match[1]), match[0]))]


def _first_repeated(names: tuple[str, ...]) -> str | None:
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def _read_text(path: Path) -> str:
    # What is no text becomes a name that is not known, and is reported as that.
    return _attempt(Path.read_bytes, path).decode(errors="replace")


def _attempt(read: Callable[[Path], Content], path: Path) -> Content:
    """What `read` makes of a file or folder.

    Raises:
        UserError: it is missing, may not be read, or is a folder where a file belongs or the reverse.
        MachineError: the machine failed to read it.
    """
    try:
        return read(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; unzip {FOLDER}.zip again") from error
    except OSError as error:
        raise not_read(path, error) from error
