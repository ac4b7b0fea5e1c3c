"""What of a folder is read: hidden folders, links, endings, names of the splits, and the notes that count the rest."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lasnn.data.folders import is_system, role_of
from lasnn.data.image_files import drawn
from lasnn.data.image_folder import ImageFolder
from lasnn.errors import UserError


def picture(path: Path, seed: int, size=(20, 12), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def classes_of(root: Path, names=("cat", "dog"), count=6, first=0, ending="png") -> Path:
    for label, name in enumerate(names):
        for number in range(count):
            picture(root / name / f"{number}.{ending}", first + 1000 * label + number)
    return root


def names_of(data: ImageFolder) -> list[str]:
    return sorted(path.relative_to(data.root).as_posix() for split in data.splits for path in split.paths)


def refusal(root: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        _ = ImageFolder(root, size=8, **options).classes
    assert not any("\n" in problem for problem in error.value.problems)
    return "\n".join(error.value.problems)


def note(data: ImageFolder, title: str) -> str:
    [line] = [line for line in data.notes() if line.startswith(title)]
    return line


SYSTEM = (
    ".ipynb_checkpoints",
    ".thumbnails",
    ".git",
    ".@__thumb",
    "@eaDir",
    "#recycle",
    "__MACOSX",
    "$RECYCLE.BIN",
    "lost+found",
    "System Volume Information",
)


@pytest.mark.parametrize("name", SYSTEM)
@pytest.mark.parametrize("where", ["", "cat", "cat/deeper"])
def test_folders_of_systems_are_never_read(tmp_path, name, where):
    root = classes_of(tmp_path / "pictures")
    wanted = names_of(ImageFolder(root))
    picture(root / where / name / "inner" / "copy.png", 77)
    (root / "cat/deeper").mkdir(exist_ok=True)
    data = ImageFolder(root)
    assert data.classes == ("cat", "dog")
    assert names_of(data) == wanted
    assert note(data, "left out") == "left out 1 hidden or system folder"


def test_files_of_systems_are_never_read(tmp_path):
    root = classes_of(tmp_path / "pictures")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):
        shutil.copy(root / "cat/0.png", root / "dog" / name)
    assert len(names_of(data := ImageFolder(root))) == 12
    assert note(data, "left out") == "left out 4 hidden or system files"
    assert not any(map(is_system, ("cat", "@alice", "thumbs", "#1", "lost")))


def test_a_picture_is_one_by_its_content(tmp_path):
    root = classes_of(tmp_path / "pictures", count=2)
    for ending, form in (("jfif", "JPEG"), ("jp2", "JPEG2000"), ("avif", "AVIF"), ("tga", "TGA"), ("ico", "ICO")):
        picture(root / f"cat/a.{ending}", len(ending), format=form)
    picture(root / "cat/without", 5, format="PNG")
    picture(root / "cat/wrong.txt", 6, format="JPEG")
    picture(root / "cat/upper.PNG", 7)
    (root / "cat/README.txt").write_text("about")
    (root / "cat/labels.csv").write_text("P5 1 1")
    (root / "cat/LICENSE").write_text("MIT")
    (root / "dog/empty.json").write_text("")
    (root / "labels.csv").write_text("1")
    data = ImageFolder(root, size=8)
    assert len(names_of(data)) == 12
    data.load()
    line = note(data, "left out")
    assert "1 file beside the folders of classes" in line
    assert "4 files that are no pictures (" in line
    assert "no ending 1" in line


def test_a_picture_by_its_name_that_cannot_be_decoded_is_named(tmp_path):
    root = classes_of(tmp_path / "pictures", count=3)
    for number, name in enumerate(("photo.heic", "photo.nef", "photo.png", "scan.dcm")):
        (root / "cat" / name).write_bytes(b"ftypheic" + bytes([number]))
    with pytest.raises(UserError) as error:
        ImageFolder(root, size=8).load()
    text = str(error.value)
    assert "photo.heic: not a picture; Pillow cannot read .heic here: convert it" in text
    assert "photo.nef: a camera's raw data" in text
    assert "photo.png: not a picture" in text
    assert text.endswith("4 of 10 images cannot be read: replace them, or set data.skip_unreadable = true")
    data = ImageFolder(root, size=8, skip_unreadable=True)
    data.load()
    assert note(data, "left out") == "left out 4 unreadable pictures"


def test_links(tmp_path):
    root = classes_of(tmp_path / "pictures")
    elsewhere = classes_of(tmp_path / "store", names=("eel",), first=5000)
    (root / "eel").symlink_to(elsewhere / "eel")
    (root / "cat/again").symlink_to(root / "cat")
    (root / "cat/all").symlink_to(root)
    (root / "cat/others").symlink_to(root / "dog")
    (root / "cat/above").symlink_to(tmp_path)
    (elsewhere / "eel/loop").symlink_to(elsewhere / "eel")
    os.mkfifo(root / "dog/pipe.png")
    data = ImageFolder(root)
    assert data.classes == ("cat", "dog", "eel")
    assert len(names_of(data)) == 18
    left = note(data, "left out")
    assert left == "left out 5 links to a folder of the same pictures, 1 special file (a pipe or device)"
    (root / "dog/gone.png").symlink_to(tmp_path / "nowhere.png")
    assert "dog/gone.png: a link to what is not there\n1 of 19 images cannot be read" in refusal(root)
    data = ImageFolder(root, skip_unreadable=True)
    assert len(names_of(data)) == 18
    assert "1 unreadable picture" in note(data, "left out")


def test_links_that_all_lead_nowhere(tmp_path):
    """As of a store that is not mounted: the notes say it, and there is nothing to load."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(6):
            (tmp_path / name / f"{number}.png").symlink_to(tmp_path / "store" / f"{number}.png")
    data = ImageFolder(tmp_path, skip_unreadable=True)
    assert "no picture's size is known" in note(data, "size")
    assert "12 unreadable pictures" in note(data, "left out")
    with pytest.raises(UserError, match="cat"):
        data.load()


def test_a_folder_that_may_not_be_seen_is_a_mistake(tmp_path, monkeypatch):
    root = classes_of(tmp_path / "pictures")
    (root / "cat/secret").mkdir()
    scan = os.scandir

    def refuse(folder):
        if Path(folder).name == "secret":
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    for skip in (False, True):
        assert f"{root / 'cat/secret'}: cannot be read (Permission denied)" in refusal(root, skip_unreadable=skip)


SPLITS = [
    ("Train", "Test"),
    ("TRAIN", "VAL"),
    ("training", "validation"),
    ("train", "valid"),
    ("train", "eval"),
    ("trainset", "testset"),
    ("training_set", "test_set"),
    ("seg_train", "seg_test"),
    ("train2017", "val2017"),
    ("TrainImages", "TestImages"),
    ("images-train", "images-dev"),
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("train", "test"), SPLITS)
def test_names_of_the_splits(tmp_path, train, test, nested):
    for name, count in ((train, 4), (test, 2)):
        classes_of(tmp_path / name / name if nested else tmp_path / name, count=count, first=len(name) * 10_000)
    data = ImageFolder(tmp_path)
    assert (data.classes, data.train_size, data.test_size) == (("cat", "dog"), 8, 4)
    assert f"the test pictures are those in {test}" in note(data, "pictures")


def test_of_validation_and_test_the_first_is_used_and_said(tmp_path):
    for name, count in (("train", 4), ("valid", 3), ("test", 2)):
        classes_of(tmp_path / name, count=count, first=count * 10_000)
    data = ImageFolder(tmp_path)
    assert (data.train_size, data.test_size) == (8, 6)
    assert note(data, "pictures").endswith("the test pictures are those in valid, not test")
    assert "4 pictures in test (valid is the test set)" in note(data, "left out")


def test_one_folder_too_many(tmp_path):
    for name in ("train", "val"):
        classes_of(tmp_path / "archive" / name, first=len(name) * 10_000)
    data = ImageFolder(tmp_path)
    assert data.classes == ("cat", "dog")
    assert any(f"read from {tmp_path / 'archive'}" in line for line in data.notes())
    classes_of(tmp_path / "other/archive")
    assert f"set data.root to {tmp_path / 'other/archive'}" in refusal(tmp_path / "other")


NOT_CLASSES = [
    (("training", "validation"), "training: no folders of classes in it (but 3 files)"),
    (("1_train", "2_test"), "which are the training and the test pictures of 1_train, 2_test?"),
    (("train",), "has train but neither val nor test"),
    (("valid", "test"), "but no train"),
]


@pytest.mark.parametrize(("names", "reason"), NOT_CLASSES)
def test_splits_without_classes_are_no_classes(tmp_path, names, reason):
    classes_of(tmp_path, names=names, count=3)
    assert reason in refusal(tmp_path)


def test_what_the_names_leave_open_is_refused(tmp_path):
    for name in ("train", "training", "test"):
        classes_of(tmp_path / "a" / name)
    assert "which are the training and the test pictures of test, train, training?" in refusal(tmp_path / "a")
    for name in ("cat", "dog"):
        classes_of(tmp_path / "b" / name, names=("train", "val"))
    assert "has splits in it; the splits come first" in refusal(tmp_path / "b")


def test_a_class_may_be_called_train(tmp_path):
    data = ImageFolder(classes_of(tmp_path, names=("bus", "train", "valid-ticket")))
    assert data.classes == ("bus", "train", "valid-ticket")
    assert role_of("seg_train") == ("train", ("seg",))
    assert [role_of(name) for name in ("trains", "invalid", "latest", "train-test")] == [None] * 4


def test_names_that_are_no_names(tmp_path):
    classes_of(tmp_path, names=("caf\u00e9", "cafe\u0301"))
    assert "two spellings of Unicode" in refusal(tmp_path)
    bad = os.fsencode(tmp_path) + b"/other"
    (tmp_path / "other").mkdir()
    classes_of(tmp_path / "other")
    os.mkdir(bad + b"/\xff")
    assert "is no UTF-8; rename it" in refusal(tmp_path / "other")


def test_a_picture_that_is_added_moves_no_other(tmp_path):
    root = classes_of(tmp_path / "pictures", count=30)

    def sides() -> dict[bytes, int]:
        train, test = (split.keys() for split in ImageFolder(root).splits)
        return dict.fromkeys(train, 0) | dict.fromkeys(test, 1)

    before = sides()
    classes_of(root / "cat", names=("more",), count=20, first=7000)
    for path in list((root / "dog").iterdir())[:9]:
        path.rename(path.with_name(f"renamed-{path.name}"))
    shutil.copytree(root, tmp_path / "copy")
    assert {key: side for key, side in sides().items() if key in before} == before
    root = tmp_path / "copy"
    assert {key: side for key, side in sides().items() if key in before} == before
    # Equal files are on the same side, under any name.
    for number, path in enumerate(list((root / "dog").iterdir())):
        shutil.copy(path, root / "dog" / f"copy-{number}.png")
    assert {key: side for key, side in sides().items() if key in before} == before
    data = ImageFolder(root)
    assert not set(data.splits[0].keys()) & set(data.splits[1].keys())


def test_a_small_class_has_pictures_on_both_sides():
    keys = [bytes([number]) * 8 for number in range(2)]
    for seed in range(50):
        assert sorted(drawn(keys, 0.01, seed)) == sorted(drawn(keys, 0.99, seed)) == [False, True]
    many = [number.to_bytes(8, "big") for number in range(2000)]
    assert 0.17 < sum(drawn(many, 0.2, 0)) / 2000 < 0.23
    assert drawn(many, 0.2, 0) != drawn(many, 0.2, 1)


def test_pictures_that_are_all_the_same_cannot_be_split(tmp_path):
    classes_of(tmp_path, names=("cat", "dog"), count=3)
    for number in range(3):
        shutil.copy(tmp_path / "cat/0.png", tmp_path / f"cat/{number}.png") if number else None
    assert f"{tmp_path / 'cat'}: 3 pictures that are all the same cannot be split" in refusal(tmp_path)


def test_the_notes(tmp_path):
    root = classes_of(tmp_path / "pictures", names=[f"c{number:02}" for number in range(15)], count=3)
    data = ImageFolder(root)
    before = data.notes()
    assert before[0].startswith("classes  c00, c01, ")
    assert before[0].endswith("c11 and 3 more")
    assert "drawn by content (val_fraction 0.2, split_seed 0)" in before[1]
    assert before[2] == (
        "size     64 x 64 (the default), crop; the pictures are 12 x 20 (height x width) in the median (of 45 pictures)"
    )
    assert before[-1] == "left out nothing"
    data.load()
    assert data.notes()[2].endswith("in the median")
    for value in ("16x16", [16], [16, 16, 3], 0, 1.5):
        with pytest.raises(UserError, match="give a whole number of pixels, as 64, or"):
            ImageFolder(root, size=value)
