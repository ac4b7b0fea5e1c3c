"""Data sets and their files, and the loader."""

import gzip
import hashlib
import re
import struct
import sys
import zlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from lasnn.data import Batches, Images
from lasnn.data.fashion_mnist import DEBIAN, MINI, FashionMnist
from lasnn.data.make_mini import make_mini
from lasnn.errors import MachineError, UserError
from lasnn.registry import datasets

FILES = [f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
TRAIN, TEST = 30, 20

needs_full_set = pytest.mark.skipif(
    not (DEBIAN / FILES[0]).exists(), reason="the package dataset-fashion-mnist is not installed"
)


def idx(magic: int, shape: tuple[int, ...], values: bytes) -> bytes:
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + values


def images_file(count: int, seed: int = 0) -> bytes:
    return idx(0x803, (count, 28, 28), np.random.default_rng(seed).bytes(count * 784))


def labels_file(count: int) -> bytes:
    return idx(0x801, (count,), bytes(i % 10 for i in range(count)))


def write_set(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    contents = [images_file(TRAIN), labels_file(TRAIN), images_file(TEST, 1), labels_file(TEST)]
    for name, content in zip(FILES, contents, strict=True):
        (folder / name).write_bytes(gzip.compress(content))
    return folder


def unpack(path: Path) -> None:
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Fashion-MNIST shrunk to 30 and 20 images, on a machine without Debian's package."""
    monkeypatch.setattr(FashionMnist, "train_size", TRAIN)
    monkeypatch.setattr(FashionMnist, "test_size", TEST)
    monkeypatch.setattr(FashionMnist, "elsewhere", (tmp_path / "debian",))
    return tmp_path


@pytest.fixture(scope="module")
def mini():
    return datasets.build("fashion-mnist-mini").load()


def message(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Every data set


# What image-folder is depends on the folder.
@pytest.mark.parametrize("name", [name for name in datasets.names() if name != "image-folder"])
def test_describes_itself_without_touching_a_file(name, monkeypatch):
    for opener in ("builtins.open", "gzip.open", "os.path.exists", "os.stat", "os.listdir"):
        monkeypatch.setattr(opener, lambda *_, **__: pytest.fail("touched the disk"))
    dataset = datasets.build(name, Path("nowhere"))
    monkeypatch.undo()
    assert len(dataset.mean) == len(dataset.std) == dataset.channels
    assert dataset.height > 0
    assert dataset.width > 0
    assert len(set(dataset.classes)) == len(dataset.classes) > 1
    assert dataset.train_size > 0
    assert dataset.test_size > 0
    assert isinstance(dataset.augment, tuple)
    assert datasets[name].description


def test_images_refuse_what_they_are_not():
    pixels, labels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    assert len(Images(pixels, labels)) == 3
    with pytest.raises(ValueError, match="uint8"):
        Images(pixels.float(), labels)
    with pytest.raises(ValueError, match=r"int64 \[3\]"):
        Images(pixels, labels[:2])


# The small set


def test_mini_is_balanced(mini):
    for images, per_class in zip(mini, (500, 200), strict=True):
        assert images.pixels.shape == (10 * per_class, 1, 28, 28)
        assert images.pixels.dtype == torch.uint8
        assert images.labels.bincount().tolist() == [per_class] * 10
        assert images.pixels.min() == 0
        assert images.pixels.max() == 255


def test_mini_has_no_test_image_among_its_training_images(mini):
    train, test = ({image.numpy().tobytes() for image in images.pixels} for images in mini)
    assert not train & test


def test_mini_says_its_source():
    dataset = datasets.build("fashion-mnist-mini")
    assert dataset.source == ""
    dataset.load()
    assert dataset.source == "shipped with lasnn"


def test_mini_says_that_a_folder_is_not_read():
    assert not any(line.startswith("root") for line in datasets.build("fashion-mnist-mini").notes())
    notes = datasets.build("fashion-mnist-mini", root="/pictures").notes()
    assert notes[-1] == "root     /pictures is not read: the images ship with lasnn"


def test_mini_files_are_those_of_its_readme():
    stated = dict(re.findall(r"`(\S+\.gz)` \| `([0-9a-f]{64})`", (MINI / "README.md").read_text()))
    assert sorted(stated) == sorted(FILES)
    for name, digest in stated.items():
        content = (MINI / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
        assert len(content) < 4_000_000
    assert "Zalando SE" in (MINI / "LICENSE").read_text()


@needs_full_set
def test_mini_can_be_made_again(tmp_path):
    make_mini(DEBIAN, tmp_path)
    for name in FILES:
        made, shipped = (tmp_path / name).read_bytes(), (MINI / name).read_bytes()
        assert gzip.decompress(made) == gzip.decompress(shipped)
        if "ng" not in zlib.ZLIB_RUNTIME_VERSION:
            assert made == shipped


# The full set


@needs_full_set
def test_full_set(tmp_path):
    dataset = datasets.build("fashion-mnist", tmp_path / "data")
    train, test = dataset.load()
    assert dataset.source == str(DEBIAN)
    assert train.labels.bincount().tolist() == [6000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    # Exact sums of integers: no rounding enters.
    pixels = train.pixels.long()
    mean = pixels.sum().item() / pixels.numel()
    deviation = (pixels.square().sum().item() / pixels.numel() - mean**2) ** 0.5
    assert dataset.mean == pytest.approx([mean / 255], abs=5e-6)
    assert dataset.std == pytest.approx([deviation / 255], abs=5e-6)


@pytest.mark.parametrize("inner", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_reads_root_packed_or_not(small, inner, packed):
    folder = write_set(small / inner)
    if not packed:
        for name in FILES:
            unpack(folder / name)
    dataset = datasets.build("fashion-mnist", str(small))
    train, test = dataset.load()
    assert dataset.source == str(folder)
    expected = np.frombuffer(images_file(TRAIN)[16:], np.uint8).reshape(TRAIN, 1, 28, 28)
    assert np.array_equal(train.pixels.numpy(), expected)
    assert train.labels.tolist() == [i % 10 for i in range(TRAIN)]
    assert len(test) == TEST


SPELLINGS = {
    "dots": lambda name: name.replace("-idx", ".idx"),
    "underscores": lambda name: name.replace("-", "_"),
    "upper case": str.upper,
    "test for t10k": lambda name: name.replace("t10k", "test"),
    "a folder each": lambda name: f"{name.removesuffix('.gz')}/{name}",
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_reads_other_spellings_of_the_file_names(small, spelling, packed):
    write_set(small)
    for name in FILES:
        other = small / SPELLINGS[spelling](name if packed else name.removesuffix(".gz"))
        if not packed:
            unpack(small / name)
        here = small / (name if packed else name.removesuffix(".gz"))
        content = here.read_bytes()
        here.unlink()
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(content)
    train, test = datasets.build("fashion-mnist", small).load()
    assert (len(train), len(test)) == (TRAIN, TEST)


@pytest.mark.parametrize("inner", ["fashion-mnist", "fashion_mnist/raw", "FASHIONMNIST/RAW", "raw"])
def test_reads_the_folders_that_others_keep_them_in(small, inner):
    folder = write_set(small / "data" / inner)
    dataset = datasets.build("fashion-mnist", small / "data")
    dataset.load()
    assert dataset.source == str(folder)


def test_root_goes_before_debian(small):
    write_set(small / "debian")
    (small / "data").mkdir()
    dataset = datasets.build("fashion-mnist", small / "data")
    dataset.load()
    assert dataset.source == str(small / "debian")
    write_set(small / "data")
    dataset.load()
    assert dataset.source == str(small / "data")


@pytest.mark.parametrize("there", [True, False])
def test_without_a_root_debian_s_folder_is_read(small, monkeypatch, there):
    write_set(small / "debian")
    monkeypatch.chdir(small)
    if there:
        Path("data").mkdir()
    dataset = datasets.build("fashion-mnist")
    dataset.load()
    assert dataset.source == str(small / "debian")


def test_a_slip_in_root_reads_no_other_folder(small):
    write_set(small / "debian")
    with pytest.raises(UserError) as error:
        datasets.build("fashion-mnist", small / "dta").load()
    assert str(small / "dta,") in message(error)
    assert "ebian" not in message(error)


def test_not_found_names_places_and_remedies(small):
    (small / "data").mkdir()
    with pytest.raises(UserError) as error:
        datasets.build("fashion-mnist", small / "data").load()
    text = message(error)
    for part in (small / "data,", small / "data/FashionMNIST/raw,", small / "debian;"):
        assert str(part) in text
    for remedy in ("data.root", "dataset-fashion-mnist", "data.download = true"):
        assert remedy in text


def repack(change):
    """Damage what is inside the gzip file."""
    return lambda content: gzip.compress(change(gzip.decompress(content)))


def set_byte(at: int, value: int):
    return lambda content: content[:at] + bytes([value]) + content[at + 1 :]


DAMAGE = {
    "gzip cut short": (0, lambda content: content[:-100], "truncated or damaged gzip"),
    "gzip header cut": (2, lambda content: content[:5], "truncated or damaged gzip"),
    "empty": (1, lambda content: b"", "inside its header"),
    "not gzip": (1, lambda content: b"<html>not found</html>", "damaged gzip"),
    "checksum": (0, lambda content: set_byte(-8, content[-8] ^ 1)(content), "CRC"),
    "bits flipped": (2, lambda content: content[:5000] + bytes(64) + content[5064:], "damaged gzip"),
    "labels for images": (0, lambda content: gzip.compress(labels_file(TRAIN)), "0x00000801"),
    "magic number": (3, repack(set_byte(2, 0x0D)), "0x00000d01, not the 0x00000801"),
    "header only": (1, repack(lambda content: content[:6]), "ends after 6 bytes"),
    "too few images": (2, lambda content: gzip.compress(images_file(TEST - 1)), "19 x 28 x 28; 20 x 28 x 28"),
    "image size": (0, repack(set_byte(11, 32)), "30 x 32 x 28; 30 x 28 x 28"),
    "labels of another set": (1, lambda content: gzip.compress(labels_file(TEST)), "says 20; 30 expected"),
    "pixels missing": (0, repack(lambda content: content[:-1]), "23535 bytes long"),
    "pixels left over": (0, repack(lambda content: content + b"\0"), "23537 bytes long"),
    "label 10": (3, repack(set_byte(8 + 7, 10)), "label 10 at index 7"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_file_is_named(small, damage):
    number, change, reason = DAMAGE[damage]
    path = write_set(small) / FILES[number]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError) as error:
        datasets.build("fashion-mnist", small).load()
    text = message(error)
    assert text.startswith(f"{path}: ")
    assert reason in text


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named_and_no_other_folder_is_read(small, name):
    write_set(small / "debian")
    (write_set(small / "data") / name).unlink()
    with pytest.raises(UserError) as error:
        datasets.build("fashion-mnist", small / "data").load()
    assert message(error).startswith(f"{small / 'data' / name} is missing")


def test_folder_in_place_of_a_file(small):
    path = write_set(small) / FILES[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError) as error:
        datasets.build("fashion-mnist", small).load()
    assert message(error).startswith(f"{path}: cannot be read")


def test_unpacked_file_cut_short(small):
    path = write_set(small) / FILES[0]
    unpack(path)
    path = path.with_suffix("")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="1000 bytes long") as error:
        datasets.build("fashion-mnist", small).load()
    assert message(error).startswith(f"{path}: ")


def test_download(small, monkeypatch, capsys):
    def fetch(folder, download):
        print("a progress bar")
        assert download
        write_set(Path(folder, "FashionMNIST", "raw"))

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fetch)
    dataset = datasets.build("fashion-mnist", small / "data", download=True)
    train, _ = dataset.load()
    assert len(train) == TRAIN
    assert dataset.source == str(small / "data/FashionMNIST/raw")
    assert [path.name for path in (small / "data").iterdir()] == ["FashionMNIST"]
    assert capsys.readouterr().out == ""
    # What is there is not fetched again.
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", None)
    dataset.load()


def test_failed_download_leaves_nothing(small, monkeypatch):
    def fetch(folder, download):
        raw = write_set(Path(folder, "FashionMNIST", "raw"))
        (raw / FILES[3]).unlink()
        raise RuntimeError("Error downloading:\nno network")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fetch)
    with pytest.raises(MachineError) as error:
        datasets.build("fashion-mnist", small / "data", download=True).load()
    assert "Error downloading: no network" in message(error)
    assert list((small / "data").iterdir()) == []


def test_no_download_unless_asked(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(UserError):
        datasets.build("fashion-mnist", small).load()


# The loader


@pytest.fixture
def numbered():
    """23 images whose label is their number and whose pixels are all that number."""
    labels = torch.arange(23)
    return Images(labels.to(torch.uint8)[:, None, None, None].expand(23, 3, 8, 6), labels)


def labels_of(batches) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches]


def test_every_image_once_with_a_short_last_batch(numbered):
    batches = Batches(numbered, 5, seed=0, epoch=0)
    seen = labels_of(batches)
    assert [len(labels) for labels in seen] == [5, 5, 5, 5, 3]
    assert len(batches) == 5
    assert sorted(chain(*seen)) == list(range(23))


def test_images_are_floats_in_range_and_keep_their_labels(numbered):
    for images, labels in Batches(numbered, 5, seed=0, epoch=0):
        assert images.dtype == torch.float32
        assert images.shape[1:] == (3, 8, 6)
        assert torch.equal(images, (labels / 255).view(-1, 1, 1, 1).expand_as(images))
    white = Images(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    ((images, _),) = Batches(white, 1, seed=0, epoch=0)
    assert images.max() == 1


def test_order_is_a_function_of_seed_and_epoch(numbered):
    def order(**changes):
        given = {"batch_size": 5, "seed": 0, "epoch": 0} | changes
        torch.manual_seed(len(changes))
        return list(chain(*labels_of(Batches(numbered, given.pop("batch_size"), **given))))

    assert order() == order() == order(batch_size=7) == order(augment=("crop", "flip"))
    assert order() != order(seed=1)
    assert order() != order(epoch=1)
    assert order(seed=1) != order(epoch=1)
    assert order(shuffle=False) == list(range(23))


@pytest.mark.parametrize("start", [0, 1, 4, 5])
@pytest.mark.parametrize("shuffle", [True, False])
def test_resumes_with_the_batches_that_were_left(mini, start, shuffle):
    images = Images(mini[0].pixels[:100], mini[0].labels[:100])
    given = {"seed": 3, "epoch": 2, "augment": ("crop", "flip"), "shuffle": shuffle}
    whole = list(Batches(images, 24, **given))
    rest = Batches(images, 24, **given, start=start)
    assert len(rest) == len(whole) - start
    for (x, y), (expected_x, expected_y) in zip(rest, whole[start:], strict=True):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)


def test_augmentation_differs_between_steps_and_epochs():
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    images = Images(image.expand(64, 1, 8, 8), torch.zeros(64, dtype=torch.int64))
    first, second = (x for x, _ in Batches(images, 32, seed=0, epoch=0, augment=("crop",)))
    other, _ = (x for x, _ in Batches(images, 32, seed=0, epoch=1, augment=("crop",)))
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_iterating_twice_gives_the_same(numbered):
    batches = Batches(numbered, 4, seed=0, epoch=0, augment=("flip",))
    assert labels_of(batches) == labels_of(batches)


def test_batches_leave_the_images_alone(mini):
    before = mini[1].pixels.clone()
    for images, _ in Batches(mini[1], 500, seed=0, epoch=0, shuffle=False):
        images.zero_()
    assert torch.equal(mini[1].pixels, before)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"start": -1}, {"start": 6}])
def test_wrong_numbers_are_named(numbered, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Batches(numbered, **({"batch_size": 5, "seed": 0, "epoch": 0} | wrong))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_order_and_range_are_the_same_on_a_gpu(mini):
    given = {"seed": 0, "epoch": 0}
    here, there = Batches(mini[1], 300, **given), Batches(mini[1].to("cuda"), 300, **given)
    for (x, y), (gpu_x, gpu_y) in zip(here, there, strict=True):
        assert gpu_x.is_cuda
        assert torch.equal(y, gpu_y.cpu())
        torch.testing.assert_close(x, gpu_x.cpu())
        assert gpu_x.max() <= 1
