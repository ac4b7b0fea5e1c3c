"""Data sets, one file each, and what every one of them shares: augmentation and the device-resident loader.

A data set of your own is a `Dataset` subclass under `@datasets.register(name)` in a plugin, a file beside the recipe
(docs/tutorials/parts.md). Its first positional parameter is the folder `root`; its keyword-only parameters are the
options that a recipe's `[data]` section may set. Those that ship with lasnn lie in files here, imported below.
"""

from lasnn.data import cifar, fashion_mnist, image_folder, mnist, tiny_imagenet  # noqa: F401  (importing a data set's file registers it)
from lasnn.data.augment import Augmentation
from lasnn.data.dataset import Dataset, Images
from lasnn.data.description import DatasetDescription
from lasnn.data.hold_out import by_class, hold_out
from lasnn.data.loader import Batches
from lasnn.data.stream import Streamed
from lasnn.data.workers import BatchFailed, BatchLost, Source, UnreadableBatch

__all__ = [
    "Augmentation",
    "BatchFailed",
    "BatchLost",
    "Batches",
    "Dataset",
    "DatasetDescription",
    "Images",
    "Source",
    "Streamed",
    "UnreadableBatch",
    "by_class",
    "hold_out",
]
