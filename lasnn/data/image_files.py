"""Picture files of one split, and how a split is drawn that no other picture moves."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lasnn.data.picture import Ranges, Seen, examine, key_of, read_image
from lasnn.errors import UserError
from lasnn.random import key_to_seed

T = TypeVar("T")
# Pillow and the digests work outside the interpreter's lock.
THREADS = min(8, os.cpu_count() or 1)
# Images from which on several threads decode them.
MANY = 1024


class ImageFiles:
    """Picture files of one split, decoded when they are read; a `lasnn.data.Source`.

    Args:
        paths: the files.
        labels: int64 [N].
        shape: C, H, W of every image.
        fit: "crop" or "stretch".
        ranges: what is black and white in pictures deeper than 8 bits; None takes what each alone has.
        seen: what is known of each file, once all were decoded.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        shape: tuple[int, int, int],
        fit: str,
        ranges: Ranges | None = None,
        seen: Sequence[Seen] = (),
    ):
        self.paths = list(paths)
        self.labels = labels
        self.shape = (len(self.paths), *shape)
        self.fit = fit
        self.ranges = ranges
        self.seen = list(seen)
        self._keys: list[bytes] = []

    def read(self, chosen: Sequence[int]) -> Tensor:
        """The pixels of some images, uint8 [n, C, H, W].

        Raises:
            UserError: a file cannot be read (any more).
            MachineError: the machine failed to read it.
        """
        pixels = torch.empty((len(chosen), *self.shape[1:]), dtype=torch.uint8)

        def put(index: int) -> None:
            path = self.paths[chosen[index]]
            pixels[index] = torch.from_numpy(read_image(path, self.shape[1:], self.fit, self.ranges))

        if len(chosen) < MANY:
            # A worker process has its own.
            for index in range(len(chosen)):
                put(index)
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                for _ in pool.map(put, range(len(chosen)), chunksize=16):
                    pass
        return pixels

    def examine(self) -> list[Seen | UserError]:
        """What each file is, or why it cannot be decoded; every file is read and decoded."""
        return each(self.paths, lambda path: examine(path, self.shape[1:], self.fit))

    def kept(self, seen: Sequence[Seen | UserError], ranges: Ranges) -> "ImageFiles":
        """The files that could be decoded, with what is known of them."""
        index = [number for number, one in enumerate(seen) if isinstance(one, Seen)]
        paths, labels = [self.paths[number] for number in index], self.labels[index]
        return ImageFiles(paths, labels, self.shape[1:], self.fit, ranges, [seen[number] for number in index])

    def keys(self) -> list[bytes]:
        """What tells each file's content from others (`lasnn.data.picture.key`), whatever its place and name.

        Raises:
            UserError: a file cannot be read.
        """
        if self.seen:
            return [one.key for one in self.seen]
        if not self._keys:
            found = each(self.paths, key_of)
            if wrong := [str(one) for one in found if isinstance(one, UserError)]:
                raise UserError(*wrong)
            self._keys = found
        return self._keys

    def fingerprint(self) -> str:
        """Of the files' contents and labels in their order and of how they are decoded, not of names, places and times.

        Where they were not decoded yet (`examine`), every file is.
        """
        seen = self.seen or self.examine()
        sha = hashlib.sha256(repr((self.shape[1:], self.fit, self.ranges)).encode())
        for one, label in zip(seen, self.labels.tolist(), strict=True):
            if isinstance(one, UserError):
                raise one
            sha.update(one.digest + label.to_bytes(8, "big"))
        return sha.hexdigest()


def each(paths: Sequence[Path], make: Callable[[Path], T]) -> list[T | UserError]:
    """What `make` returns for every file, or the error that it raises because of the file."""

    def attempt(path: Path) -> T | UserError:
        try:
            return make(path)
        except UserError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(attempt, paths, chunksize=16))


def drawn(keys: Sequence[bytes], fraction: float, seed: int) -> list[bool]:
    """Which files of a class are test pictures: those whose draw, a function of the seed and their content, is below
    `fraction`.

    So equal files are on the same side, and a file that is added, removed or renamed moves no other. One exception: a
    side must not be empty. In a class that is so small the lowest draw is of the test set, or the highest of the
    training set, until another takes its place.
    """
    draws = {key: key_to_seed(seed, "split", key.hex()) / 2**63 for key in keys}
    test = {key for key, draw in draws.items() if draw < fraction}
    if not test:
        test = {min(draws, key=draws.get)}
    elif len(test) == len(draws):
        test.remove(max(draws, key=draws.get))
    return [key in test for key in keys]
