"""CIFAR-10, CIFAR-100 and MNIST on small files in exactly their formats, and archives."""

import gzip
import io
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets as published

from lasnn.data.archive import Archive, extract, md5
from lasnn.data.cifar import Cifar10, Cifar100
from lasnn.data.fashion_mnist import FashionMnist
from lasnn.data.idx import write_idx
from lasnn.data.mnist import Mnist
from lasnn.errors import MachineError, UserError

PER_FILE = 4
SETS = {"CIFAR10": Cifar10, "CIFAR100": Cifar100}


def batch(name: str, count: int, seed: int) -> dict:
    """What a file of the Python version holds."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, 10, count).tolist()
    keys = {"labels": labels} if name == "CIFAR10" else {"fine_labels": labels, "coarse_labels": labels}
    pixels = draws.integers(0, 256, (count, 3072), np.uint8)
    return {"data": pixels, "filenames": [f"{i}.png" for i in range(count)], "batch_label": "x", **keys}


@pytest.fixture(params=SETS)
def cifar(request, tmp_path, monkeypatch):
    """(data set, folder) of a small CIFAR with checksums of its own."""
    name, kind = request.param, SETS[request.param]
    known = getattr(published, name)
    folder = tmp_path / known.base_folder
    folder.mkdir()
    lists = {}
    for which in ("train_list", "test_list"):
        files = []
        for file, _ in getattr(known, which):
            # Python 2 wrote the files: protocol 2 is theirs.
            (folder / file).write_bytes(pickle.dumps(batch(name, PER_FILE, len(files)), protocol=2))
            files.append([file, md5(folder / file)])
        lists[which] = files
        monkeypatch.setattr(known, which, files)
    monkeypatch.setattr(kind, "train_size", PER_FILE * len(lists["train_list"]))
    monkeypatch.setattr(kind, "test_size", PER_FILE)
    return kind(tmp_path), folder


def failure(data) -> str:
    with pytest.raises(UserError) as error:
        data.load()
    assert "\n" not in str(error.value)
    assert data.source == ""
    return str(error.value)


def pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, folder.name)


def test_every_image_and_label(cifar):
    data, folder = cifar
    train, test = data.load()
    assert data.source == str(folder)
    assert (len(train), len(test)) == (data.train_size, data.test_size)
    content = pickle.loads(next(folder.glob("test*")).read_bytes())
    assert np.array_equal(test.pixels.numpy().reshape(PER_FILE, -1), content["data"])
    assert test.labels.tolist() == content.get("labels", content.get("fine_labels"))
    # Red comes first, row by row.
    assert test.pixels[0, 0, 0, :5].tolist() == content["data"][0, :5].tolist()
    inner, _ = type(data)(folder).load()
    assert inner.pixels.equal(train.pixels)


def test_a_damaged_file_is_not_opened(cifar, monkeypatch):
    data, folder = cifar
    path = next(folder.glob("*train*" if "100" in folder.name else "data_batch_1"))
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("opened"))
    assert failure(data).startswith(f"{path}: its md5 is")


def test_half_of_the_files(cifar):
    data, folder = cifar
    next(folder.glob("*train*" if "100" in folder.name else "data_batch_3")).unlink()
    assert re.search(r"has no (data_batch_3|train): it is not whole", failure(data))


def test_missing_and_packed(cifar, monkeypatch):
    data, folder = cifar
    known = getattr(published, data.torchvision_name)
    archive = folder.parent / known.filename
    pack(folder, archive)
    for file in folder.iterdir():
        file.unlink()
    assert "it is not whole; remove it" in failure(data)
    folder.rmdir()
    assert "truncated or damaged; fetch it again" in failure(data)
    assert sorted(path.name for path in folder.parent.iterdir()) == [archive.name]
    monkeypatch.setattr(known, "tgz_md5", md5(archive))
    assert len(data.load()[1]) == PER_FILE
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([archive.name, folder.name])
    empty = type(data)(folder.parent / "nowhere")
    found = failure(empty)
    for part in (known.url, "data.download = true", "nowhere"):
        assert part in found


def test_download(cifar, monkeypatch, tmp_path, capsys):
    data, folder = cifar
    known = getattr(published, data.torchvision_name)
    packed = tmp_path / "packed"
    pack(folder, packed)
    monkeypatch.setattr(known, "tgz_md5", md5(packed))

    def fetch(url, root, name, checksum):
        print("a progress bar")
        assert (url, checksum) == (known.url, md5(packed))
        Path(root, name).write_bytes(packed.read_bytes())

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    root = tmp_path / "data"
    assert len(type(data)(root, download=True).load()[1]) == PER_FILE
    assert capsys.readouterr().out == ""

    def fail(*_):
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)
    with pytest.raises(MachineError, match="no network"):
        type(data)(tmp_path / "other", download=True).load()
    assert not list((tmp_path / "other").iterdir())


@pytest.fixture
def into(tmp_path):
    folder = tmp_path / "inner" / "into"
    folder.mkdir(parents=True)
    return folder


def write_archive(path: Path, name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
    """A tar or zip of a good file and a member, which may be a link to a target."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/good", "a")
            archive.writestr(name, "b")
        return
    with tarfile.open(path, "w") as archive:
        for inner, what, linked in (("x/good", tarfile.REGTYPE, ""), (name, kind, target)):
            member = tarfile.TarInfo(inner)
            member.type, member.linkname = what, linked
            member.size = int(what == tarfile.REGTYPE)
            archive.addfile(member, io.BytesIO(b"a"))


@pytest.mark.parametrize(
    ("archive", "member"),
    [
        ("x.zip", ("../evil",)),
        ("x.zip", ("x/../../evil",)),
        ("x.zip", ("OUTSIDE/evil",)),
        ("x.tar", ("../evil",)),
        ("x.tar", ("x/evil", tarfile.SYMTYPE, "../../outside")),
        ("x.tar", ("x/evil", tarfile.SYMTYPE, "OUTSIDE")),
        ("x.tar", ("x/evil", tarfile.LNKTYPE, "../outside")),
        ("x.tar", ("x/evil", tarfile.FIFOTYPE)),
    ],
)
def test_an_archive_that_leaves_its_folder_writes_nothing(into, tmp_path, archive, member):
    path, outside = tmp_path / archive, into.parent / "outside"
    outside.mkdir()
    write_archive(path, *(part.replace("OUTSIDE", str(outside)) if isinstance(part, str) else part for part in member))
    with pytest.raises(UserError, match=f"{path}: .*evil"):
        extract(path, into)
    assert not list(into.iterdir())
    assert not list(outside.iterdir())
    assert sorted(found.name for found in into.parent.iterdir()) == ["into", "outside"]


def test_a_link_within_the_folder_is_no_way_out(into, tmp_path):
    """A link to the folder itself, and a name that climbs out through it."""
    path = tmp_path / "x.tar"
    write_archive(path, "x/deep/link", tarfile.SYMTYPE, "../..")
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("x/deep/link/../evil"))
    with pytest.raises(UserError, match="evil"):
        extract(path, into)
    assert not (into.parent / "evil").exists()


def test_an_absolute_name_in_a_tar_loses_its_slash(into, tmp_path):
    write_archive(tmp_path / "x.tar", f"{tmp_path}/evil")
    extract(tmp_path / "x.tar", into)
    assert not (tmp_path / "evil").exists()
    assert (into / str(tmp_path).lstrip("/") / "evil").is_file()


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_what_is_no_archive(into, tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(b"PK no archive")
    with pytest.raises(UserError, match="no whole archive"):
        extract(path, into)


def test_an_archive_of_something_else(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("y/file", "a")
    with pytest.raises(UserError, match="has no folder x"):
        Archive("X", "http://example.org/x.zip", md5(path), "x").find(tmp_path, "file", download=False)
    assert [inner.name for inner in tmp_path.iterdir()] == ["x.zip"]


def write_mnist(folder: Path, first_labels) -> None:
    folder.mkdir(parents=True)
    for split, count, first in (("train", 20, first_labels[0]), ("t10k", 12, first_labels[1])):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        labels = np.resize(np.array(first, np.uint8), count)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)


@pytest.fixture
def small_mnist(monkeypatch):
    for kind in (Mnist, FashionMnist):
        monkeypatch.setattr(kind, "train_size", 20)
        monkeypatch.setattr(kind, "test_size", 12)
        monkeypatch.setattr(kind, "elsewhere", ())


def test_mnist(small_mnist, tmp_path):
    write_mnist(tmp_path / "MNIST/raw", Mnist.first_labels)
    data = Mnist(tmp_path)
    train, test = data.load()
    assert (train.pixels.shape, len(test)) == ((20, 1, 28, 28), 12)
    assert train.labels[:10].tolist() == list(Mnist.first_labels[0])
    assert data.source == str(tmp_path / "MNIST/raw")
    with pytest.raises(UserError, match="MNIST is in none of"):
        Mnist(tmp_path / "other").load()


def test_one_set_in_the_place_of_the_other(small_mnist, tmp_path):
    write_mnist(tmp_path / "a", FashionMnist.first_labels)
    with pytest.raises(UserError, match="a holds Fashion-MNIST's training labels, not MNIST's; give another data.root"):
        Mnist(tmp_path / "a").load()
    write_mnist(tmp_path / "b", Mnist.first_labels)
    with pytest.raises(UserError, match="b holds MNIST's training labels, not Fashion-MNIST's"):
        FashionMnist(tmp_path / "b").load()
    for path in (tmp_path / "a").glob("train*"):
        path.replace(tmp_path / "b" / path.name)
    with pytest.raises(UserError, match="b holds MNIST's test labels, not Fashion-MNIST's"):
        FashionMnist(tmp_path / "b").load()


def test_the_first_labels_are_those_of_the_real_set():
    for split, first in zip(("train", "t10k"), FashionMnist.first_labels, strict=True):
        path = Path(f"/usr/share/datasets/fashion-mnist/{split}-labels-idx1-ubyte.gz")
        if not path.exists():
            pytest.skip("the package dataset-fashion-mnist is not installed")
        with gzip.open(path) as file:
            assert tuple(file.read()[8:18]) == first
