"""What every data set is: a description that costs nothing, and images in memory once it is loaded."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lasnn import weights
from lasnn.data.description import DatasetDescription, some
from lasnn.errors import UserError

# Of images that cannot be read, so many are named.
NAMED = 10


@dataclass(frozen=True, eq=False)
class Images:
    """Images of one size with their labels: `pixels` uint8 [N, C, H, W], `labels` int64 [N], on one device.

    `known_by` is the fingerprint of the source that they were read from, where they were streamed otherwise: a run goes
    on whether they fit the device or not. `keys` are then what tells each image from others, where the source has that.

    Raises:
        ValueError: the types, shapes or lengths are others.
    """

    pixels: Tensor
    labels: Tensor
    known_by: str | None = None
    keys: Sequence[bytes] | None = None

    def __post_init__(self) -> None:
        for name in ("pixels", "labels"):
            if not isinstance(value := getattr(self, name), Tensor):
                raise ValueError(f"{name} must be a tensor, not {type(value).__name__}; torch.as_tensor makes one")
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4:
            raise ValueError(f"pixels must be uint8 [N, C, H, W], not {_describe(self.pixels)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise ValueError(f"labels must be int64 [{len(self.pixels)}], not {_describe(self.labels)}")

    def to(self, device: torch.device | str) -> "Images":
        """The same images on `device`."""
        return Images(self.pixels.to(device), self.labels.to(device), self.known_by, self.keys)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, C, H, W."""
        images, channels, height, width = self.pixels.shape
        return images, channels, height, width

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def fingerprint(self) -> str:
        """What tells these images from others: of their content, not of where they lie."""
        if self.known_by is not None:
            return self.known_by
        return weights.digest({"pixels": self.pixels.cpu(), "labels": self.labels.cpu()})

    def batches(self, chosen: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels uint8 [b, C, H, W] and labels [b] of each of several choices of images, given on the CPU."""
        for index in chosen:
            index = index.to(self.device, non_blocking=True)
            yield self.pixels[index], self.labels[index]


class Dataset(ABC):
    """What a run knows of a data set before it reads a byte, and the way to read it.

    Making one touches no file, so that a dry run needs no data on disk. A subclass sets the attributes below:
    `mean` and `std` are per channel, of training pixels in [0, 1]; `augment` names the augmentations that are
    used unless the recipe says otherwise; `source` says where `load` read from and is empty before that; `shipped_part`
    names a registered part of it that ships with lasnn, if there is one; `reads_root` is False where all of it does;
    `classes_known` is False as long as `classes` has the number of classes alone, their names being read by `load`.
    """

    channels: int
    height: int
    width: int
    classes: tuple[str, ...]
    classes_known: bool = True
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    test_size: int
    augment: tuple[str, ...] = ()
    source: str = ""
    shipped_part: str = ""
    reads_root: bool = True

    def notes(self) -> list[str]:
        """Lines for whoever starts a run: what the data set is and what of it is left out; more once it is loaded."""
        return [f"classes  {some(self.classes)}"]

    def describe(self, name: str = "", splits: Sequence["Images"] = ()) -> DatasetDescription:
        """What a run keeps of its data set, to know it again and to do without it.

        Args:
            name: that under which it is registered.
            splits: the training and the test images, once they are loaded; they need only have a fingerprint.

        Raises:
            UserError: the data set has to look at its files for it, and cannot.
        """
        return DatasetDescription(
            name=name,
            channels=self.channels,
            height=self.height,
            width=self.width,
            classes=tuple(self.classes),
            mean=tuple(self.mean),
            std=tuple(self.std),
            train_size=self.train_size,
            test_size=self.test_size,
            decoding=self._decoding(),
            keys=self._keys(),
            fingerprints=tuple(split.fingerprint() for split in splits),
        )

    def changes_since(self, before: DatasetDescription, splits: Sequence["Images"] = ()) -> list[str]:
        """How this data set differs from that which a run began with, a line each; none where it is the same.

        Before it is loaded, one whose files are not compared is taken at its word.

        Args:
            splits: the training and the test images, if they are loaded.
        """
        return before.differences(self.describe(before.name, splits), loaded=bool(self.source))

    def _decoding(self) -> str:
        """How files become pixels, where that is the user's choice."""
        return ""

    def _keys(self) -> tuple[tuple[bytes, ...], ...]:
        """For the training and the test split, for each class: what tells its files from others, joined."""
        return ()

    @abstractmethod
    def load(self) -> tuple[Images, Images]:
        """Read the training and the test images, on the CPU.

        Raises:
            UserError: the data is not there, or a file is broken; one line that names it.
        """


def unreadable(reasons: Sequence[str], count: int) -> UserError:
    """The error that names and counts the images that cannot be read, `reasons`, of `count`."""
    further = [f"and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else []
    what = f"{len(reasons)} of {count} images cannot be read"
    return UserError(*reasons[:NAMED], *further, f"{what}: replace them, or set data.skip_unreadable = true")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
