"""The data set that a run is bound to, and what today's images may differ in before they are another run's.

A run writes `data.json` when it begins; an exported student has the same in its metadata, without what tells each file
from others. The run's networks are built from it alone. Whatever measures the run on images compares them with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lasnn.data import Dataset, Images, Streamed
from lasnn.data.description import KEY_BYTES, DatasetDescription
from lasnn.errors import UserError

Splits = Sequence[Images | Streamed]


def as_metadata(description: DatasetDescription) -> dict[str, Any]:
    """What the metadata of a student's file say of its data set; no path, and nothing of single files."""
    return {
        "data": description.name,
        "in_channels": description.channels,
        "height": description.height,
        "width": description.width,
        "num_classes": len(description.classes),
        "classes": list(description.classes),
        "mean": list(description.mean),
        "std": list(description.std),
        "train_size": description.train_size,
        "test_size": description.test_size,
        "decoding": description.decoding,
        "fingerprints": list(description.fingerprints),
    }


def from_metadata(metadata: Mapping[str, Any], where: str) -> DatasetDescription | None:
    """The data set that `as_metadata` told of; None where the file is of an earlier lasnn and does not tell.

    Raises:
        UserError: it is damaged; `where` names it.
    """
    names = {"data": "name", "in_channels": "channels"}
    keys = ("data", "in_channels", "height", "width", "classes", "mean", "std", "train_size", "test_size", "decoding")
    if any(key not in metadata for key in (*keys, "fingerprints")):
        return None
    value = {names.get(key, key): metadata[key] for key in (*keys, "fingerprints")}
    return DatasetDescription.from_json({**value, "keys": []}, where)


def data_changes(before: DatasetDescription, data: Dataset, splits: Splits = ()) -> list[str]:
    """What has changed in a run's data set since the run began, a line each; none where nothing has.

    Args:
        before: of the run.
        data: as it is now, loaded where `splits` are given.
        splits: its training and test images.

    Raises:
        UserError: the images are no test of the run any more: the classes or the channels are others, or training
            images would count as test images. The lines say what has changed.
    """
    now = data.describe(before.name, splits)
    lines = data.changes_since(before, splits)
    reasons = []
    if now.classes != before.classes:
        reasons.append("its classes are others")
    if (now.channels, now.height, now.width) != (before.channels, before.height, before.width):
        reasons.append("its images have another shape")
    if leaked := len(trained_on(before, now)):
        reasons.append(f"{leaked:,} of its test images were trained on")
    if reasons:
        raise UserError(
            *lines,
            f"this is not the data set that the run was trained on any more ({', '.join(reasons)}): put it back as it "
            "was, point data.root at a copy of it, or train a new run",
        )
    if before.fingerprints and now.fingerprints and not before.keys and _all_other(before, now):
        lines.append("whether test images were trained on is not known: neither training nor test images are the same")
    return lines


def trained_on(before: DatasetDescription, now: DatasetDescription) -> set[bytes]:
    """The keys of the files that the run was trained on and that are test images now."""
    if not (before.keys and now.keys):
        return set()
    return (_keys(before, 0) & _keys(now, 1)) - _keys(before, 1)


def _keys(description: DatasetDescription, split: int) -> set[bytes]:
    joined = b"".join(description.keys[split])
    return {joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)}


def _all_other(before: DatasetDescription, now: DatasetDescription) -> bool:
    return all(old != new for old, new in zip(before.fingerprints, now.fingerprints, strict=True))
