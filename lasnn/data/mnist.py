"""MNIST, handwritten digits (LeCun, Bottou, Bengio and Haffner, Proceedings of the IEEE 1998)."""

from lasnn.data.idx import IdxDataset
from lasnn.registry import datasets


@datasets.register("mnist")
class Mnist(IdxDataset):
    """MNIST: 60,000 training and 10,000 test images, 28 x 28, the ten digits.

    The four idx files, gzipped or not, are read from `root` or `root`/MNIST/raw (where torchvision keeps them),
    otherwise, with `download`, fetched by torchvision. The first folder that holds any of the four is taken.
    Crops are the only augmentation: a digit's mirror image is another sign.
    """

    title, torchvision_name = "MNIST", "MNIST"
    classes = tuple("0123456789")
    first_labels = (5, 0, 4, 1, 9, 2, 1, 3, 1, 4), (7, 2, 1, 0, 4, 1, 4, 9, 5, 9)
    # Over the training images, as PyTorch's own example rounds them; not measured here, for lack of the data.
    mean, std = (0.1307,), (0.3081,)
    augment = ("crop",)
