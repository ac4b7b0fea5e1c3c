"""The data set that a run is bound to, and what today's images may differ in before they are another run's.

A run writes `data.json` when it begins; an exported student has the same in its metadata, without what tells each file
from others. The run's networks are built from it alone. Whatever measures the run on images compares them with it.
"""

from collections.abc import Sequence

from lasnn.data import Dataset, Images, Streamed
from lasnn.data.description import KEY_BYTES, DatasetDescription
from lasnn.errors import UserError

Splits = Sequence[Images | Streamed]


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
    renamed = data.classes_known and now.classes != before.classes
    if renamed or len(now.classes) != len(before.classes):
        reasons.append("its classes are others")
    if (now.channels, now.height, now.width) != (before.channels, before.height, before.width):
        reasons.append("its images have another shape")
    if leaked := len(trained_on(before, now)):
        # A recipe may have been chosen by those that are held out.
        held_out = " or held out of the training" if before.validation else ""
        reasons.append(f"{leaked:,} of its test images were trained on{held_out}")
    if reasons:
        raise UserError(
            *lines,
            f"this is not the data set that the run was trained on any more ({', '.join(reasons)}): put it back as it "
            "was, name a copy of it with --data, or train a new run",
        )
    if not before.keys and before.fingerprints[1:] != now.fingerprints[1:] and now.fingerprints:
        lines.append("whether any of the test images were trained on is not known: only the run's folder could tell")
    return lines


def trained_on(before: DatasetDescription, now: DatasetDescription) -> set[bytes]:
    """The keys of the files that were the run's training images, held out or not, and that are test images now."""
    if not (before.keys and now.keys):
        return set()
    return (_keys(before, 0) & _keys(now, 1)) - _keys(before, 1)


def _keys(description: DatasetDescription, split: int) -> set[bytes]:
    joined = b"".join(description.keys[split])
    return {joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)}
