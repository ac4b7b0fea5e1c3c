"""Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747): the full set, and a small part of it."""

from pathlib import Path

from lasnn.data.dataset import Dataset, Images
from lasnn.data.idx import IdxDataset, read_splits
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


@datasets.register("fashion-mnist-mini")
class FashionMnistMini(_FashionMnist):
    """5,000 training and 2,000 test images of Fashion-MNIST, class-balanced, shipped with lasnn.

    `root` is not used. Mean and deviation are those of the full set, so that networks move between the two.
    """

    reads_root = False
    train_size, test_size = 5_000, 2_000
    # No crop: it needs longer runs than this set is for. A VGG of 16-32-64-64 channels trained for 6 epochs
    # reaches 0.82 with or without flips and 0.80 with crops (SGD, batch 100, means of two seeds).
    augment = ("flip",)

    def __init__(self, root: Path | str = "data"):
        self.root = root

    def notes(self) -> list[str]:
        unread = [] if str(self.root) == "data" else [f"root     {self.root} is not read: the images ship with lasnn"]
        return [*super().notes(), *unread]

    def load(self) -> tuple[Images, Images]:
        images = read_splits(self, MINI)
        self.source = "shipped with lasnn"
        return images


@datasets.register("fashion-mnist")
class FashionMnist(IdxDataset, _FashionMnist):
    """Fashion-MNIST: 60,000 training and 10,000 test images, 28 x 28, ten classes of clothing.

    The four idx files, gzipped or not, are read from `root` or `root`/FashionMNIST/raw (where torchvision
    keeps them), otherwise, where `root` is the default, "data", from the folder of Debian's package
    dataset-fashion-mnist, otherwise, with `download`, fetched by torchvision. The first folder that holds any of
    the four is taken: what is missing or broken there is an error, never a reason to read another one. Crops and
    flips are the augmentation of most residual networks in the benchmark table of the data set's README.
    """

    title, torchvision_name = "Fashion-MNIST", "FashionMNIST"
    elsewhere = (DEBIAN,)
    remedy = "install Debian's package dataset-fashion-mnist, "
    shipped_part = "fashion-mnist-mini"
    first_labels = (9, 0, 0, 3, 0, 2, 7, 2, 5, 5), (9, 2, 1, 1, 6, 1, 4, 6, 5, 7)
    augment = ("crop", "flip")
