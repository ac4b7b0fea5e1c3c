"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009)."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lasnn.data.archive import Archive, md5
from lasnn.data.dataset import Dataset, Images
from lasnn.errors import UserError
from lasnn.registry import datasets


class _Cifar(Dataset):
    """What the two sets have in common: batches of pickled arrays, [N, 3072] bytes and N labels."""

    channels, height, width = 3, 32, 32
    train_size, test_size = 50_000, 10_000
    augment = ("crop", "flip")
    # The name of the files' labels, and of torchvision's class, which knows their checksums.
    labels_key: str
    torchvision_name: str

    def __init__(self, root: Path | str = "data", *, download: bool = False):
        self.root = Path(root)
        self.download = download

    def load(self) -> tuple[Images, Images]:
        """Read the training and the test images, on the CPU.

        Raises:
            UserError: the data is not there, or a file is missing, damaged or another one.
            MachineError: the download failed.
        """
        from torchvision import datasets as published

        known = getattr(published, self.torchvision_name)
        train, test = known.train_list, known.test_list
        title = self.torchvision_name.replace("CIFAR", "CIFAR-")
        archive = Archive(title, known.url, known.tgz_md5, known.base_folder)
        folder = archive.find(self.root, test[0][0], download=self.download)
        missing = [name for name, _ in (*train, *test) if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder} has no {', '.join(missing)}: it is not whole; remove it, and unpack {archive.name} again"
            )
        splits = []
        for files, size in ((train, self.train_size), (test, self.test_size)):
            batches = [self._read(folder / name, checksum) for name, checksum in files]
            pixels, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            if len(labels) != size:
                raise UserError(f"{folder}: {len(labels)} images in {len(files)} files; {size} expected")
            splits.append(Images(pixels, labels))
        self.source = str(folder)
        return splits[0], splits[1]

    def _read(self, path: Path, checksum: str) -> tuple[Tensor, Tensor]:
        found = md5(path)
        if found != checksum:
            # A pickle can run code: only the published files are opened at all.
            raise UserError(f"{path}: its md5 is {found}, not {checksum}: damaged, or another file; unpack it again")
        with open(path, "rb") as file:
            batch: dict[str, Any] = pickle.load(file, encoding="latin1")
        pixels = np.asarray(batch["data"], np.uint8).reshape(-1, self.channels, self.height, self.width)
        return torch.from_numpy(pixels.copy()), torch.tensor(batch[self.labels_key], dtype=torch.int64)


@datasets.register("cifar10")
class Cifar10(_Cifar):
    """CIFAR-10: 50,000 training and 10,000 test images, 3 x 32 x 32, ten classes of animals and vehicles.

    The Python version's files are read from `root`/cifar-10-batches-py or `root`; the archive cifar-10-python.tar.gz
    in `root` is unpacked, and with `download` fetched. Every file's checksum is that which torchvision publishes.
    """

    labels_key, torchvision_name = "labels", "CIFAR10"
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    # Over the training images, as public training code rounds them; not measured here, for lack of the data.
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


# In the order of the labels.
FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""


@datasets.register("cifar100")
class Cifar100(_Cifar):
    """CIFAR-100: 50,000 training and 10,000 test images, 3 x 32 x 32, a hundred classes ("fine" labels).

    The Python version's files are read from `root`/cifar-100-python or `root`; the archive cifar-100-python.tar.gz
    in `root` is unpacked, and with `download` fetched. Every file's checksum is that which torchvision publishes.
    """

    labels_key, torchvision_name = "fine_labels", "CIFAR100"
    classes = tuple(FINE.split())
    # As above.
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
