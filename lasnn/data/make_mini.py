"""Make the small Fashion-MNIST that ships with lasnn from the full one.

    python -m lasnn.data.make_mini FOLDER_OF_THE_FULL_SET OUTPUT_FOLDER

The images are the first 500 of each class in the training file and the first 200 of each class in the test
file, in the order of the original files.
"""

import argparse
from pathlib import Path

import numpy as np

from lasnn.data.fashion_mnist import FashionMnist, FashionMnistMini
from lasnn.data.idx import images_and_labels, read_split, write_idx


def make_mini(source: Path, out: Path) -> None:
    """Write the four gzipped idx files of the small set to `out`, from the full set's in `source`.

    Raises:
        UserError: a file of the full set is missing or broken.
    """
    full, mini = FashionMnist, FashionMnistMini
    classes = len(full.classes)
    sizes = {"train": (full.train_size, mini.train_size), "t10k": (full.test_size, mini.test_size)}
    out.mkdir(parents=True, exist_ok=True)
    for split, (size, kept) in sizes.items():
        images = read_split(source, split, (size, full.height, full.width), classes)
        labels = images.labels.numpy()
        firsts = [np.flatnonzero(labels == label)[: kept // classes] for label in range(classes)]
        chosen = np.sort(np.concatenate(firsts))
        images_name, labels_name = images_and_labels(split)
        write_idx(out / f"{images_name}.gz", images.pixels[chosen, 0].numpy())
        write_idx(out / f"{labels_name}.gz", labels[chosen])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the small Fashion-MNIST that ships with lasnn.")
    parser.add_argument("source", type=Path, help="the folder with the full set's four files")
    parser.add_argument("out", type=Path, help="the folder to write to")
    arguments = parser.parse_args()
    make_mini(arguments.source, arguments.out)
