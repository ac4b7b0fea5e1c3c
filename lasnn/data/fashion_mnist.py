"""Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747): the full set, and a small part of it."""

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from lasnn.data.dataset import Dataset, Images
from lasnn.data.idx import images_and_labels, read_split
from lasnn.errors import MachineError, UserError
from lasnn.registry import datasets

MINI = Path(__file__).parent / "fashion-mnist-mini"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


class _FashionMnist(Dataset):
    """What the full set and its small part have in common."""

    channels, height, width = 1, 28, 28
    classes = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    # Over all 47,040,000 pixels of the 60,000 training images, divided by 255; a test recomputes them.
    mean, std = (0.28604,), (0.35302,)

    def _read(self, folder: Path) -> tuple[Images, Images]:
        train, test = (
            read_split(folder, split, (size, self.height, self.width), len(self.classes))
            for split, size in (("train", self.train_size), ("t10k", self.test_size))
        )
        return train, test


@datasets.register("fashion-mnist-mini")
class FashionMnistMini(_FashionMnist):
    """5,000 training and 2,000 test images of Fashion-MNIST, class-balanced, shipped with lasnn.

    `root` is not used. Mean and deviation are those of the full set, so that networks move between the two.
    """

    train_size, test_size = 5_000, 2_000
    # No crop: it needs longer runs than this set is for. A VGG of 16-32-64-64 channels trained for 6 epochs
    # reaches 0.82 with or without flips and 0.80 with crops (SGD, batch 100, means of two seeds).
    augment = ("flip",)

    def __init__(self, root: Path | str = "data"):
        pass

    def load(self) -> tuple[Images, Images]:
        images = self._read(MINI)
        self.source = "shipped with lasnn"
        return images


@datasets.register("fashion-mnist")
class FashionMnist(_FashionMnist):
    """Fashion-MNIST: 60,000 training and 10,000 test images, 28 x 28, ten classes of clothing.

    The four idx files, gzipped or not, are read from `root` or `root`/FashionMNIST/raw (where torchvision
    keeps them), otherwise from the folder of Debian's package dataset-fashion-mnist, otherwise, with
    `download`, fetched by torchvision. The first folder that holds any of the four is taken: what is missing
    or broken there is an error, never a reason to read another one. Crops and flips are the augmentation of
    most residual networks in the benchmark table of the data set's README.
    """

    train_size, test_size = 60_000, 10_000
    augment = ("crop", "flip")

    def __init__(self, root: Path | str = "data", *, download: bool = False):
        self.root = Path(root)
        self.download = download

    def load(self) -> tuple[Images, Images]:
        """Read the training and the test images, on the CPU.

        Raises:
            UserError: the data is not there, or a file is broken; one line that names it.
            MachineError: the download failed.
        """
        raw = self.root / "FashionMNIST" / "raw"
        places = (self.root, raw, DEBIAN)
        folder = next((place for place in places if _holds_any_file(place)), None)
        if folder is None and self.download:
            _download(raw)
            folder = raw
        if folder is None:
            raise UserError(
                f"Fashion-MNIST is in none of {', '.join(map(str, places))}; put its four gz files into "
                "data.root (the first), install Debian's package dataset-fashion-mnist, "
                "or set data.download = true"
            )
        images = self._read(folder)
        self.source = str(folder)
        return images


def _holds_any_file(folder: Path) -> bool:
    names = (*images_and_labels("train"), *images_and_labels("t10k"))
    return any(os.path.exists(folder / f"{name}{ending}") for name in names for ending in (".gz", ""))


def _download(raw: Path) -> None:
    """Fetch the files with torchvision, which verifies their checksums, into the folder `raw`."""
    from torchvision.datasets import FashionMNIST

    root = raw.parents[1]
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Beside its place and then renamed: an interrupted download must not look like a data set.
        with TemporaryDirectory(dir=root, prefix=".download-") as folder:
            # Standard output belongs to the command's results.
            with redirect_stdout(sys.stderr):
                FashionMNIST(folder, download=True)
            raw.parent.mkdir(exist_ok=True)
            os.replace(Path(folder, "FashionMNIST", "raw"), raw)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise MachineError(f"Fashion-MNIST could not be downloaded into {root}: {reason}") from error
