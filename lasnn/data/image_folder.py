"""Your own pictures: a folder a class, any size, any format that Pillow reads."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
from PIL import Image
from pydantic import Field

from lasnn.data.dataset import Dataset, unreadable
from lasnn.data.folders import Found, classes_in, count, find_splits, left_out, pictures_in
from lasnn.data.image_files import ImageFiles, drawn, each
from lasnn.data.picture import Ranges, Seen, common_ranges, formats, key_of, read_image
from lasnn.errors import UserError
from lasnn.registry import datasets

__all__ = ["ImageFiles", "ImageFolder", "read_image"]

# Of ImageNet's training images, the usual choice for photographs; in grey, their luminance by the same weights as
# pillow's (0.299, 0.587, 0.114), the deviations as if the channels varied together.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.459,), (0.226,)
# Small enough to train on a CPU, large enough to tell things apart; that of Tiny ImageNet.
DEFAULT_SIZE = 64
# So many pictures are looked at for their size before all are decoded.
LOOKED_AT = 100

Side = Annotated[int, Field(ge=1)]
Sides = Annotated[list[Side], Field(min_length=2, max_length=2)]
Share = Annotated[float, Field(gt=0, lt=1)]
Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@datasets.register("image-folder")
class ImageFolder(Dataset):
    """Your own pictures in `root`: train/<class>/ and val/<class>/ (or test/), or <class>/ and a split that is drawn.

    Pictures are scaled to `size` (pixels, or height and width): "crop" keeps their proportions and cuts the middle out,
    "stretch" does not. `grey` makes them one channel. Without val/ or test/, each file's content and `split_seed` say
    whether it is a test picture, about `val_fraction` of each class and at least one. Files that cannot be decoded are
    an error, unless `skip_unreadable`. What else is left out is counted in `notes`; docs/pictures.md says what that is.
    `num_classes` is checked if given. `mean` and `std`, in [0, 1], are what images are normalised with; left out,
    ImageNet's.

    Raises:
        UserError: `mean` or `std` does not suit the channels, or `size` is neither; from the first look at `classes`,
            `train_size` or `test_size`: everything that is wrong with the folders.
    """

    augment = ()

    def __init__(
        self,
        root: Path | str = "data",
        *,
        size: Side | Sides = DEFAULT_SIZE,
        grey: bool = False,
        fit: Literal["crop", "stretch"] = "crop",
        val_fraction: Share = 0.2,
        split_seed: int = 0,
        skip_unreadable: bool = False,
        num_classes: Annotated[int, Field(ge=2)] | None = None,
        mean: list[Unit] | None = None,
        std: list[Positive] | None = None,
    ):
        sides = list(size) if isinstance(size, list | tuple) else [size, size]
        if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
            raise UserError(f"size is {size!r}; give a whole number of pixels, as 64, or [height, width]")
        self.root = Path(root)
        self.height, self.width = sides
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
        self._loaded: tuple[ImageFiles, ImageFiles] | None = None
        self._look = Found()

    @property
    def classes(self) -> tuple[str, ...]:
        return self._found[0]

    @property
    def train_size(self) -> int:
        return len(self.splits[0].paths)

    @property
    def test_size(self) -> int:
        return len(self.splits[1].paths)

    @property
    def splits(self) -> tuple[ImageFiles, ImageFiles]:
        """The training and the test files: those that are there; once they are loaded, those that can be decoded."""
        return self._loaded or self._found[1:]

    def load(self) -> tuple[ImageFiles, ImageFiles]:
        """Decode every file once, to know that all can be, and what is black and white in those deeper than 8 bits.

        Raises:
            UserError: files that cannot be decoded, named and counted; with `skip_unreadable` only if all of a class
                are.
            MachineError: the machine failed to read a file.
        """
        splits = self._found[1:]
        seen = [split.examine() for split in splits]
        reasons = [str(one) for found in seen for one in found if isinstance(one, UserError)]
        if reasons and not self.skip_unreadable:
            raise unreadable(reasons, sum(map(len, seen)))
        ranges = common_ranges(one for found in seen for one in found if isinstance(one, Seen))
        kept = [split.kept(found, ranges) for split, found in zip(splits, seen, strict=True)]
        missing = [
            f"{self.root}: no readable {what} picture of class {self.classes[label]!r}"
            for what, split in zip(("training", "test"), kept, strict=True)
            for label in sorted(set(range(len(self.classes))) - set(split.labels.tolist()))
        ]
        if missing:
            raise UserError(*missing)
        skipped = len(reasons) + len(self._look.lost)
        self._loaded = kept[0], kept[1]
        self.source = f"{self.root}" + (f", {count(skipped, 'unreadable picture')} skipped" if skipped else "")
        return self._loaded

    @cached_property
    def _found(self) -> tuple[tuple[str, ...], ImageFiles, ImageFiles]:
        """Classes, training and test files; nothing is decoded."""
        root, look = self.root, Found()
        if not root.is_dir():
            raise UserError(f"no folder {root}; data.root names the folder of the pictures")
        where = find_splits(root, look)
        train = classes_in(where.train, look)
        test = classes_in(where.test, look) if where.test else {}
        problems = look.problems
        classes = tuple(sorted(train))
        folded = [name.casefold() for name in classes]
        problems += [
            f"{root}: the classes {', '.join(n for n in classes if n.casefold() == name)} differ in case only"
            for name in sorted(set(folded))
            if folded.count(name) > 1
        ]
        if where.test and set(test) != set(train):
            sides = (where.train.name, where.test.name)
            for here, there, names, others in ((*sides, train, test), (*sides[::-1], test, train)):
                if only := sorted(set(names) - set(others)):
                    problems.append(f"{root}: classes in {here} but not in {there}: {', '.join(only)}")
        if len(classes) < 2 and not problems:
            problems.append(f"{where.train}: one class, and at least 2 are needed")
        if self.num_classes not in (None, len(classes)):
            problems.append(f"{root}: {len(classes)} classes; data.num_classes says {self.num_classes}")
        if where.test:
            unused = f", not {where.unused.name}" if where.unused else ""
            how = f"the test pictures are those in {where.test.name}{unused}"
            if where.unused:
                pictures = len(pictures_in(where.unused, Found()))
                look.left[f"picture in {where.unused.name} ({where.test.name} is the test set)"] += pictures
        else:
            how = f"drawn by content (val_fraction {self.val_fraction:g}, split_seed {self.split_seed})"
            for name, paths in train.items():
                train[name], test[name] = self._draw(where.train / name, paths, look)
        look.said.insert(0, how)
        if look.lost and not self.skip_unreadable:
            total = sum(map(len, (*train.values(), *test.values()))) + len(look.lost)
            problems += unreadable(list(look.lost.values()), total).problems
        if problems:
            raise UserError(*problems)
        self._look = look
        train_files, test_files = (self._files(classes, files) for files in (train, test))
        return classes, train_files, test_files

    def _draw(self, folder: Path, paths: list[Path], look: Found) -> tuple[list[Path], list[Path]]:
        """The training and the test pictures of a class."""
        found = each(paths, key_of)
        look.lost |= {path: str(one) for path, one in zip(paths, found, strict=True) if isinstance(one, UserError)}
        keys = {path: one for path, one in zip(paths, found, strict=True) if not isinstance(one, UserError)}
        if paths and len(set(keys.values())) < 2:
            what = "one picture" if len(keys) < 2 else f"{len(keys)} pictures that are all the same"
            look.problems.append(f"{folder}: {what} cannot be split into training and test")
            return list(keys), []
        sides = drawn(list(keys.values()), self.val_fraction, self.split_seed) if keys else []
        chosen = dict(zip(keys, sides, strict=True))
        return [path for path in keys if not chosen[path]], [path for path in keys if chosen[path]]

    def _files(self, classes: Sequence[str], files: dict[str, list[Path]]) -> ImageFiles:
        labels = [label for label, name in enumerate(classes) for _ in files[name]]
        paths = [path for name in classes for path in files[name]]
        shape = (self.channels, self.height, self.width)
        return ImageFiles(paths, torch.tensor(labels, dtype=torch.int64), shape, self.fit)

    def _decoding(self) -> str:
        ranges = self._loaded[0].ranges if self._loaded else None
        deep = {kind: limits for kind, limits in vars(ranges or Ranges()).items() if limits}
        values = "".join(f", {kind} from {low:g} to {high:g}" for kind, (low, high) in deep.items())
        return f"{self.fit}{values}"

    def _keys(self) -> tuple[tuple[bytes, ...], ...]:
        """For the training and the test split, for each class: the keys of its files, joined."""
        found = []
        for split in self.splits:
            keys: list[list[bytes]] = [[] for _ in self.classes]
            for key, label in zip(split.keys(), split.labels.tolist(), strict=True):
                keys[label].append(key)
            found.append(tuple(b"".join(sorted(some)) for some in keys))
        return tuple(found)

    def notes(self) -> list[str]:
        """The classes, the pictures of each split, their size, and what was left out; more once they are loaded."""
        how, *further = self._look.said if self._found else []
        default = " (the default)" if (self.height, self.width) == (DEFAULT_SIZE, DEFAULT_SIZE) else ""
        sides = f"{self.height} x {self.width}"
        lines = [
            *super().notes(),
            f"pictures {self.train_size:,} training, {self.test_size:,} test; {how}",
            *(f"         {line}" for line in further),
            f"size     {sides}{default}, {self.fit}; {self._sizes()}",
        ]
        left = left_out(self._look)
        if self._loaded:
            lines += self._seen_notes()
            framed = sum(one.framed for split in self._loaded for one in split.seen)
            left += [f"further frames or pages of {count(framed, 'picture')}"] if framed else []
        skipped = len(self._look.lost)
        if self._loaded:
            skipped += sum(len(split.paths) for split in self._found[1:]) - self.train_size - self.test_size
        left += [f"{count(skipped, 'unreadable picture')}"] if skipped else []
        return [*lines, f"left out {', '.join(left) or 'nothing'}"]

    def _seen_notes(self) -> list[str]:
        """What was found out while all pictures were decoded."""
        train, test = self._loaded
        lines = []
        for kind, what in (("integers", "deeper than 8 bits"), ("floats", "of floating-point values")):
            deep = sum(one.kind == kind for split in self._loaded for one in split.seen)
            if deep:
                low, high = getattr(train.ranges, kind)
                pictures = count(deep, "picture")
                lines.append(f"values   of {pictures} {what}: {low:,g} becomes black, {high:,g} white, in all alike")
        both = len(set(train.keys()) & set(test.keys()))
        if both:
            lines.append(f"twice    {count(both, 'picture')} in the training and in the test set")
        return lines

    def _sizes(self) -> str:
        """The median size of the pictures: of all that were decoded, otherwise of some."""
        if self._loaded:
            sizes = [one.size for split in self._loaded for one in split.seen]
        else:
            paths = [path for split in self._found[1:] for path in split.paths]
            found = each(paths[:: max(1, -(-len(paths) // LOOKED_AT))], _size)
            sizes = [size for size in found if isinstance(size, tuple)]
        if not sizes:
            return "no picture's size is known"
        width, height = (int(median(side)) for side in zip(*sizes, strict=True))
        some = "" if self._loaded else f" (of {count(len(sizes), 'picture')})"
        return f"the pictures are {height} x {width} (height x width) in the median{some}"


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height as a picture's header says, None where it says nothing."""
    try:
        with Image.open(path, formats=formats()) as image:
            return image.size
    except Exception:
        # Whoever decodes it says what is wrong.
        return None
