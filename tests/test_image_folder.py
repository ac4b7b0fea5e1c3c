"""The user's own pictures, and images that are streamed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lasnn.data import Batches, Images, Streamed
from lasnn.data.image_folder import ImageFolder, read_image
from lasnn.data.stream import InMemory, place
from lasnn.errors import UserError

CPU = torch.device("cpu")
COLOURS = {"cats": (200, 10, 10), "dogs": (10, 200, 10), "Eels": (10, 10, 200)}


def picture(path: Path, colour, size=(20, 12), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Three classes with ten pictures each, of several formats and sizes."""
    root = tmp_path / "pictures"
    endings = ("png", "jpg", "JPEG", "bmp", "gif", "webp", "tif", "png", "png", "png")
    for name, colour in COLOURS.items():
        for number, ending in enumerate(endings):
            picture(root / name / f"{number}.{ending}", colour, (20 + number, 12))
        (root / name / ".hidden.png").write_bytes(b"")
        (root / name / "notes.txt").write_text("x")
    (root / ".cache").mkdir()
    return root


def problems(data, act=lambda data: data.classes) -> list[str]:
    with pytest.raises(UserError) as error:
        act(data)
    assert not any("\n" in problem for problem in error.value.problems)
    return list(error.value.problems)


def test_a_split_by_content_and_seed(folder):
    data = ImageFolder(folder, size=[8, 10])
    assert data.classes == ("Eels", "cats", "dogs")
    assert (data.channels, data.height, data.width) == (3, 8, 10)
    assert data.train_size + data.test_size == 30
    train, test = data.load()
    assert not set(train.paths) & set(test.paths)
    assert all(1 <= count <= 5 for count in test.labels.bincount().tolist())
    assert train.read([0, 5]).shape == (2, 3, 8, 10)
    for split in (train, test):
        pixels = split.read(range(len(split.labels))).float().mean((2, 3))
        wanted = torch.tensor([COLOURS[data.classes[label]] for label in split.labels], dtype=torch.float32)
        assert (pixels - wanted).abs().max() < 12
    again = ImageFolder(folder, size=[8, 10])
    assert again.load()[1].paths == test.paths
    assert ImageFolder(folder, size=8, split_seed=1).load()[1].paths != test.paths


@pytest.mark.parametrize("name", ["val", "test"])
def test_a_split_that_is_there(tmp_path, name):
    for split, count in (("train", 3), (name, 1)):
        for kind, colour in COLOURS.items():
            for number in range(count):
                picture(tmp_path / split / kind / "deeper" / f"{number}.png", colour)
    data = ImageFolder(tmp_path, size=4, grey=True, num_classes=3)
    assert (data.train_size, data.test_size, len(data.mean)) == (9, 3, 1)
    assert data.load()[0].read([0]).shape == (1, 1, 4, 4)


def test_what_is_wrong_with_the_folders_comes_together(tmp_path):
    assert problems(ImageFolder(tmp_path / "no", size=4)) == [
        f"no folder {tmp_path / 'no'}; data.root names the folder of the pictures"
    ]
    assert "no folders of classes" in problems(ImageFolder(tmp_path, size=4))[0]
    picture(tmp_path / "train/a/1.png", 0)
    assert "neither val nor test" in problems(ImageFolder(tmp_path, size=4))[0]
    picture(tmp_path / "val/b/1.png", 0)
    (tmp_path / "train/B").mkdir()
    (tmp_path / "train/B/notes.txt").write_text("x")
    picture(tmp_path / "train/b/1.png", 0)
    found = problems(ImageFolder(tmp_path, size=4, num_classes=7))
    for part in (
        "train/B: no pictures in it (1 files of other kinds)",
        "the classes B, b differ in case only",
        "classes in train but not in val: B, a",
        "3 classes; data.num_classes says 7",
    ):
        assert any(part in line for line in found), part
    assert "train: 3 values" not in found
    assert (
        "mean has 3 values"
        in problems(lambda: None, lambda _: ImageFolder(tmp_path, size=4, grey=True, mean=[0, 0, 0]))[0]
    )


def test_one_class_and_one_picture(tmp_path):
    picture(tmp_path / "a/1.png", 0)
    assert "at least 2 are needed" in problems(ImageFolder(tmp_path, size=4))[0]
    picture(tmp_path / "b/1.png", 0)
    assert "one picture cannot be split" in problems(ImageFolder(tmp_path, size=4))[0]


def damage(folder: Path) -> list[Path]:
    bad = [folder / "cats/0.png", folder / "cats/1.jpg", folder / "dogs/2.JPEG", folder / "dogs/9.png"]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(bad[1].read_bytes()[:-300])
    bad[2].write_bytes(b"<html>not found</html>")
    content = bad[3].read_bytes()
    bad[3].write_bytes(content[:45] + bytes(8) + content[53:])
    return bad


def test_unreadable_pictures_are_named_and_counted(folder):
    bad = damage(folder)
    found = problems(ImageFolder(folder, size=8), lambda data: data.load())
    assert found[-1].startswith("4 of 30 images cannot be read")
    assert len(found) == 5
    for path, reason in zip(bad, ("empty", "truncated or damaged", "not a picture", "damaged"), strict=True):
        assert any(line.startswith(f"{path}: ") and reason in line for line in found[:-1]), path


def test_unreadable_pictures_are_skipped_if_asked(folder):
    bad = damage(folder)
    data = ImageFolder(folder, size=8, skip_unreadable=True)
    train, test = data.load()
    assert data.train_size + data.test_size == len(train.paths) + len(test.paths) == 26
    assert not set(bad) & {*train.paths, *test.paths}
    assert data.source == f"{folder}, 4 unreadable pictures skipped"
    for number, path in enumerate((folder / "Eels").glob("*.*")):
        path.write_bytes(bytes([number]))
    found = problems(ImageFolder(folder, size=8, skip_unreadable=True), lambda data: data.load())
    assert found[0].endswith("no readable training picture of class 'Eels'")


def test_modes_of_pictures(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(path)
    assert read_image(path, (1, 4, 4), "stretch").tolist() == np.full((1, 4, 4), round(40_000 / 257)).tolist()
    Image.new("RGBA", (4, 4), (200, 100, 50, 0)).save(path)
    assert read_image(path, (3, 4, 4), "stretch").max() == 0
    Image.new("P", (4, 4), 0).save(path)
    assert read_image(path, (3, 4, 4), "stretch").shape == (3, 4, 4)
    Image.new("1", (4, 4), 1).save(path)
    assert read_image(path, (1, 4, 4), "crop").min() == 255
    # Left half black, right half white; EXIF says that it lies on its side.
    pixels = np.zeros((4, 8), np.uint8)
    pixels[:, 4:] = 255
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif, quality=100)
    turned = read_image(tmp_path / "x.jpg", (1, 8, 4), "stretch")[0]
    assert turned[:3].max() < 20
    assert turned[5:].min() > 235


def test_crop_keeps_proportions(tmp_path):
    pixels = np.zeros((4, 12), np.uint8)
    pixels[:, 4:8] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", (1, 4, 4), "crop").min() == 255
    assert read_image(tmp_path / "x.png", (1, 4, 4), "stretch").min() == 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_streamed_batches_are_the_resident_ones(folder, workers, shuffle):
    train, _ = ImageFolder(folder, size=8, val_fraction=0.3).load()
    [resident], said = place([train], CPU, residence="device", workers=workers)
    assert isinstance(resident, Images)
    assert 'data.residence = "device"' in said
    for source in (train, InMemory(resident)):
        streamed = Streamed(source, CPU, workers)
        assert (len(streamed), streamed.shape) == (len(train.paths), resident.shape)
        for start in (0, 2):
            options = {"seed": 3, "epoch": 1, "augment": ["flip"], "shuffle": shuffle, "start": start}
            both = [list(Batches(images, 7, **options)) for images in (resident, streamed)]
            assert len(both[0]) == len(both[1]) == -(-len(train.paths) // 7) - start
            for (pixels, labels), (other, others) in zip(*both, strict=True):
                assert pixels.equal(other)
                assert labels.equal(others)


def test_what_does_not_fit_is_streamed(monkeypatch):
    images = Images(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64))
    monkeypatch.setattr("lasnn.data.stream.free_bytes", lambda _: 2 * 10 * 192)
    [placed], said = place([images], CPU, residence="auto", workers=1)
    assert isinstance(placed, Images)
    assert said.startswith("images   on the device (0 MiB of images")
    monkeypatch.setattr("lasnn.data.stream.free_bytes", lambda _: 2 * 10 * 192 - 1)
    [placed], said = place([images], CPU, residence="auto", workers=1)
    assert isinstance(placed, Streamed)
    assert "streamed by 1 worker processes, as more than 50% would be taken" in said
    [placed], said = place([images], CPU, residence="stream", workers=1)
    assert 'as data.residence = "stream" says' in said


RECIPE = """
[data]
name = "image-folder"
root = "{root}"
size = 12
batch_size = 8
[teacher]
architecture = "vgg5"
width = 4
epochs = 1
[student]
architecture = "vgg5"
width = 4
timesteps = 2
[distill]
epochs = 1
"""


def test_a_run_on_own_pictures_streamed_or_not(lasnn, folder):
    """The same accuracy and the same weights, and the log says how; what is missing is said before anything runs."""
    damage(folder)
    recipe = lasnn.folder / "own.toml"
    recipe.write_text(RECIPE.format(root=folder))
    wrong = lasnn("distill", recipe, "--out", "a", code=2).stderr
    assert "4 of 30 images cannot be read" in wrong
    assert not (lasnn.folder / "a").exists()
    assert "no folder" in lasnn("distill", recipe, "--dry-run", "--set", "data.root=nowhere", code=2).stderr
    weights = []
    for out, residence in (("b", "device"), ("c", "stream")):
        said = lasnn(
            "distill",
            recipe,
            "--out",
            out,
            *("--set", f"data.residence={residence}"),
            *("--set", "data.skip_unreadable=true"),
        )
        assert ("streamed by 2 worker processes" in said.stdout + said.stderr) == (residence == "stream")
        weights.append((lasnn.folder / out / "student.safetensors").read_bytes()[-2000:])
    assert weights[0] == weights[1]
    assert lasnn.json("evaluate", "c")["images"] > 3


def test_a_comparison_counts_the_pictures_that_were_measured(lasnn, tmp_path):
    """Not those that cannot be read, of which the plan does not know."""
    for split, many in (("train", 8), ("test", 4)):
        for name, colour in COLOURS.items():
            for number in range(many):
                picture(tmp_path / "split" / split / name / f"{number}.png", colour, (20 + number, 12))
            (tmp_path / "split" / split / name / "0.png").write_bytes(b"<html>not found</html>")
    recipe = lasnn.folder / "own.toml"
    recipe.write_text(RECIPE.format(root=tmp_path / "split"))
    skip = ("--set", "data.skip_unreadable=true")
    assert lasnn.json("distill", recipe, "--dry-run", *skip)["images"]["test"] == 12
    lasnn("compare", recipe, "--seeds", "1", *skip, "--out", "compared")
    assert "; 9 test images." in (lasnn.folder / "compared" / "compare.md").read_text()
