"""What a run keeps of its data set: enough to know it again, and to use the run's networks without it."""

from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from lasnn.data.picture import KEY_BYTES
from lasnn.errors import UserError, printable

SHOWN = 12


def some(names: Sequence[str]) -> str:
    """The names, or the first few and how many more there are."""
    shown = ", ".join(map(printable, names[:SHOWN]))
    return shown + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


@dataclass(frozen=True)
class DatasetDescription:
    """A data set, told from others.

    Args:
        name: that under which it is registered.
        channels, height, width: of an image.
        classes: their names, in the order of the labels.
        mean, std: of each channel, in [0, 1]; what images are normalised with.
        train_size, test_size: images.
        decoding: how files became pixels, where that is the user's choice.
        keys: of a data set of the user's own files, for the training and the test split, for each class: what tells
            each file's content from others, `KEY_BYTES` bytes each, one after the other; else empty.
        fingerprints: of the training and the test images, where they were loaded; else empty.
        validation: how many of the training images the run holds out.
    """

    name: str
    channels: int
    height: int
    width: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    test_size: int
    decoding: str = ""
    keys: tuple[tuple[bytes, ...], ...] = ()
    fingerprints: tuple[str, ...] = ()
    # Of the run, not of the data set: a student's file has it in its recipe.
    validation: int = field(default=0, compare=False)
    # A run begins once its images are loaded.
    classes_known: ClassVar[bool] = True

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; about 11 characters for each file of the user's own."""
        keys = [[b64encode(found).decode() for found in split] for split in self.keys]
        return {**asdict(self), "keys": keys}

    @classmethod
    def from_json(
        cls, value: Mapping[str, Any], where: str = "the description of the data set"
    ) -> "DatasetDescription":
        """What `as_json` gave.

        Raises:
            UserError: it is something else, or damaged; `where` names it.
        """
        try:
            lists = {key: tuple(value[key]) for key in ("classes", "mean", "std", "fingerprints")}
            keys = tuple(tuple(b64decode(found, validate=True) for found in split) for split in value["keys"])
            made = cls(**{**value, **lists, "keys": keys})
            whole = all(len(found) % KEY_BYTES == 0 for split in keys for found in split)
            sizes = (made.channels, made.height, made.width, made.train_size, made.test_size)
            if not (whole and all(isinstance(size, int) and size > 0 for size in sizes)):
                raise ValueError("its numbers are none of a data set")
            if not (made.channels == len(made.mean) == len(made.std) and all(isinstance(n, str) for n in made.classes)):
                raise ValueError("its parts do not belong together")
            if not all(isinstance(number, int | float) for number in (*made.mean, *made.std)):
                raise ValueError("its mean or std is no number")
            return made
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where} is damaged: {' '.join(str(error).split())}") from error

    def differences(self, now: "DatasetDescription", loaded: bool = True) -> list[str]:
        """How a data set differs from this one, a line each.

        Args:
            loaded: whether `now` was described after its images were loaded.
        """
        lines = [
            f"{what} {_said(getattr(now, key))} now; {verb} {_said(getattr(self, key))}"
            for what, key, verb in (
                ("the data set is", "name", "it was"),
                ("the images' channels are", "channels", "they were"),
                ("the images' height is", "height", "it was"),
                ("the images' width is", "width", "it was"),
                ("the mean is", "mean", "it was"),
                ("the deviation is", "std", "it was"),
            )
            if getattr(now, key) != getattr(self, key)
        ]
        if loaded and self.decoding != now.decoding:
            lines.append(f"pictures are decoded by {now.decoding} now; it was {self.decoding}")
        if self.keys and now.keys:
            lines += _class_changes(self, now) + _file_changes(self, now)
        elif loaded or self.keys:
            if self.classes != now.classes:
                lines.append(f"the classes are {some(now.classes)} now; they were {some(self.classes)}")
            for what, key in (("training", "train_size"), ("test", "test_size")):
                if getattr(now, key) != getattr(self, key):
                    lines.append(f"{getattr(now, key):,} {what} images now; there were {getattr(self, key):,}")
        if not lines and self.fingerprints and now.fingerprints:
            for what, old, new in zip(("training", "test"), self.fingerprints, now.fingerprints, strict=False):
                if old != new:
                    lines.append(f"the {what} images, or their order, are not those that they were")
        return lines


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{one:g}" for one in value)
    return repr(value) if isinstance(value, str) else str(value)


def _files(description: DatasetDescription, split: int) -> dict[bytes, str]:
    """{key: class} of the files of a split."""
    return {
        found[start : start + KEY_BYTES]: name
        for name, found in zip(description.classes, description.keys[split], strict=True)
        for start in range(0, len(found), KEY_BYTES)
    }


def _class_changes(before: DatasetDescription, now: DatasetDescription) -> list[str]:
    """Classes that are gone, new, or have another name: that of the most of their files."""
    gone = [name for name in before.classes if name not in now.classes]
    new = [name for name in now.classes if name not in before.classes]
    old_class = _files(before, 1) | _files(before, 0)
    new_class = _files(now, 1) | _files(now, 0)
    lines = []
    for name in gone:
        moved = Counter(new_class[key] for key, old in old_class.items() if old == name and key in new_class)
        there, number = next(iter(moved.most_common(1)), ("", 0))
        if there in new and 2 * number > sum(moved.values()):
            was, is_now = before.classes.index(name), now.classes.index(there)
            order = "" if was == is_now else f", and its label {is_now}; it was {was}"
            lines.append(f"class {printable(name)!r} is called {printable(there)!r} now{order}")
            new.remove(there)
        else:
            lines.append(f"class {printable(name)!r} is gone")
    return lines + [f"class {printable(name)!r} is new" for name in new]


def _file_changes(before: DatasetDescription, now: DatasetDescription) -> list[str]:
    """Pictures that were added, removed, or are on another side of the split or in another class."""
    train, test, train_now, test_now = _files(before, 0), _files(before, 1), _files(now, 0), _files(now, 1)
    lines = []
    leaked = (train.keys() & test_now.keys()) - test.keys()
    if leaked:
        lines.append(f"{_pictures(leaked)} that it was trained on would count as test pictures now")
    back = (test.keys() & train_now.keys()) - train.keys()
    if back:
        lines.append(f"{_pictures(back)} of its test set would be training pictures now")
    for what, some_keys, others, sides in (
        ("added", train_now.keys() | test_now.keys(), train.keys() | test.keys(), (train_now, test_now)),
        ("removed", train.keys() | test.keys(), train_now.keys() | test_now.keys(), (train, test)),
    ):
        if changed := some_keys - others:
            parts = [
                f"{len(changed & side.keys()):,} {name}" for name, side in zip(("training", "test"), sides, strict=True)
            ]
            lines.append(f"{_pictures(changed)} {what} ({', '.join(parts)})")
    # Classes that keep their name: those that do not are told of already.
    old_class, new_class = test | train, test_now | train_now
    kept = set(before.classes) & set(now.classes)
    both = old_class.keys() & new_class.keys()
    moved = [key for key in both if old_class[key] != new_class[key] and {old_class[key], new_class[key]} <= kept]
    if moved:
        lines.append(f"{_pictures(moved)} in another class")
    return lines


def _pictures(keys: Sequence[bytes]) -> str:
    return f"{len(keys):,} picture{'' if len(keys) == 1 else 's'}"
