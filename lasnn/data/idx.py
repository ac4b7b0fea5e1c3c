"""idx files, the format of MNIST and its kin: a magic number, the dimensions, then the bytes.

The magic number is 0x000008nn for unsigned bytes in nn dimensions; it and each dimension are 4 bytes, most
significant byte first (http://yann.lecun.com/exdb/mnist, "The IDX file format").
"""

import gzip
import os
import re
import sys
import zlib
from contextlib import redirect_stdout
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np
import torch

from lasnn.data.dataset import Dataset, Images
from lasnn.errors import MachineError, UserError, not_read

# Where a data set lies unless its user says so.
ROOT = Path("data")


class IdxDataset(Dataset):
    """A data set of four idx files that torchvision can fetch: MNIST and its kin."""

    channels, height, width = 1, 28, 28
    train_size, test_size = 60_000, 10_000
    title: str
    torchvision_name: str
    # Folders to look into where `root` does not hold the set, and how to fill them.
    elsewhere: tuple[Path, ...] = ()
    remedy = ""
    # Of the training and of the test images: all these sets have the same file names and sizes, and one is easily taken
    # for another.
    first_labels: tuple[tuple[int, ...], tuple[int, ...]]
    kin: ClassVar[dict[tuple[int, ...], str]] = {}

    def __init_subclass__(cls) -> None:
        cls.kin.update(dict.fromkeys(cls.first_labels, cls.title))

    def __init__(self, root: Path | str = ROOT, *, download: bool = False):
        self.root = Path(root)
        self.download = download

    def load(self) -> tuple[Images, Images]:
        """Read the training and the test images, on the CPU.

        Raises:
            UserError: the data is not there, a file is broken, or they are another set's; one line that names it.
            MachineError: the download failed.
        """
        raw = self.root / self.torchvision_name / "raw"
        # Where a folder was named, no other folder's images are read in its place. A run knows the default by its whole
        # path.
        elsewhere = self.elsewhere if self.root.name == ROOT.name else ()
        places = (self.root, raw, *_of_other_spelling(self.root, self.torchvision_name), *elsewhere)
        folder = next((place for place in places if _holds_any_file(place)), None)
        if folder is None and self.download:
            _download(self, raw)
            folder = raw
        if folder is None:
            remedy = self.remedy if elsewhere else ""
            raise UserError(
                f"{self.title} is in none of {', '.join(map(str, places))}; put its four gz files into "
                f"data.root (the first), {remedy}or set data.download = true"
            )
        images = read_splits(self, folder)
        for what, split, own in zip(("training", "test"), images, self.first_labels, strict=True):
            found = self.kin.get(tuple(split.labels[: len(own)].tolist()), self.title)
            if found != self.title:
                raise UserError(f"{folder} holds {found}'s {what} labels, not {self.title}'s; give another data.root")
        self.source = str(folder)
        return images


def read_splits(data: Dataset, folder: Path) -> tuple[Images, Images]:
    """The training and the test images of a data set in `folder`; errors as for `read_split`."""
    train, test = (
        read_split(folder, split, (size, data.height, data.width), len(data.classes))
        for split, size in (("train", data.train_size), ("t10k", data.test_size))
    )
    return train, test


def _of_other_spelling(root: Path, name: str) -> list[Path]:
    """The folders in which others keep the files: that of the set's name in any spelling, and `raw` in each."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    found = [
        folder
        for folder in _listed(root)
        if re.sub(r"[^a-z0-9]", "", folder.name.lower()) in (plain, "raw") and folder.is_dir()
    ]
    return found + [inner for folder in found for inner in _listed(folder) if inner.name.lower() == "raw"]


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing where there is no such folder, or it may not be seen."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _holds_any_file(folder: Path) -> bool:
    names = (*images_and_labels("train"), *images_and_labels("t10k"))
    return any(_spelled(folder, name) for name in names)


def _spelled(folder: Path, name: str) -> list[Path]:
    """The files in a folder that are `name`, packed ones first, then in its own spelling.

    Others write `train-images.idx3-ubyte` (Windows' unpackers), upper case or underscores, `test` for `t10k`, or put
    each file into a folder of its own name (Kaggle's).
    """
    split, kind, form, _ = name.split("-")
    first = "(t10k|test)" if split == "t10k" else split
    pattern = re.compile(rf"{first}[-_. ]{kind}[-_. ]{form}[-_. ]ubyte(\.gz)?", re.IGNORECASE)
    found = [path for path in _listed(folder) if pattern.fullmatch(path.name)]
    inner = [file for path in found if path.is_dir() for file in _listed(path) if pattern.fullmatch(file.name)]
    # A folder in the place of a file stays, so that it is named, unless the file is in it.
    found = [path for path in found if not any(file.parent == path for file in inner)] + inner
    return sorted(found, key=lambda path: (path.suffix.lower() != ".gz", not path.name.startswith(name), path))


def _download(data: IdxDataset, raw: Path) -> None:
    """Fetch the files with torchvision, which verifies their checksums, into the folder `raw`."""
    from torchvision import datasets as published

    root = raw.parents[1]
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Beside its place and then renamed: an interrupted download must not look like a data set.
        with TemporaryDirectory(dir=root, prefix=".download-") as folder:
            # Standard output belongs to the command's results.
            with redirect_stdout(sys.stderr):
                getattr(published, data.torchvision_name)(folder, download=True)
            raw.parent.mkdir(exist_ok=True)
            os.replace(Path(folder, data.torchvision_name, "raw"), raw)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise MachineError(f"{data.title} could not be downloaded into {root}: {reason}") from error


def images_and_labels(split: str) -> tuple[str, str]:
    """The names, without `.gz`, of the two files of a split: "train" or "t10k"."""
    return f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"


def read_split(folder: Path, split: str, shape: tuple[int, int, int], classes: int) -> Images:
    """The images [N, 1, H, W] and labels of one split in `folder`, checked against `shape`, (N, H, W).

    Raises:
        UserError: a file is missing, damaged, or not what its name says; one line that names the file.
        MachineError: the machine failed to read a file.
    """
    images_name, labels_name = images_and_labels(split)
    pixels = read_idx(find(folder, images_name), shape)
    labels_path = find(folder, labels_name)
    labels = read_idx(labels_path, shape[:1])
    if labels.max() >= classes:
        at = int(np.argmax(labels >= classes))
        raise UserError(f"{labels_path}: label {labels[at]} at index {at}; labels go from 0 to {classes - 1}")
    return Images(torch.from_numpy(pixels)[:, None], torch.from_numpy(labels.astype(np.int64)))


def find(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`, packed or not, in any spelling; packed first, because gzip carries a checksum.

    Raises:
        UserError: neither is there.
    """
    if found := _spelled(folder, name):
        return found[0]
    raise UserError(f"{folder / name}.gz is missing (unpacked, without .gz, would do as well)")


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The unsigned bytes of an idx file (gzipped if its name ends in `.gz`) as a writable array.

    Raises:
        UserError: the file cannot be read, is damaged, or has another shape; one line that names it.
        MachineError: the machine failed to read it.
    """
    data = _read_bytes(path)
    header = 4 + 4 * len(shape)
    if len(data) < header:
        raise UserError(f"{path}: ends after {len(data)} bytes, inside its header of {header} bytes")
    magic, *dimensions = np.frombuffer(data, ">u4", 1 + len(shape)).tolist()
    expected = 0x0800 + len(shape)
    if magic != expected:
        raise UserError(f"{path}: its magic number is 0x{magic:08x}, not the 0x{expected:08x} of such a file")
    if tuple(dimensions) != shape:
        raise UserError(f"{path}: its header says {_times(dimensions)}; {_times(shape)} expected")
    length = header + prod(shape)
    if len(data) != length:
        raise UserError(f"{path}: {len(data)} bytes long when unpacked; its header promises {length}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write unsigned bytes as a gzipped idx file; the same array always gives the same file."""
    header = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes()
    # GzipFile writes the same header in every Python release; gzip.compress does not.
    with open(path, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(header + array.astype(np.uint8).tobytes())


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix.lower() != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: truncated or damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise not_read(path, error) from error


def _times(shape: tuple[int, ...] | list[int]) -> str:
    return " x ".join(map(str, shape))
