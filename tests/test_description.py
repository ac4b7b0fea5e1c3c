"""A data set told from others: what a run keeps of it, and what has changed since."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lasnn.data import DatasetDescription
from lasnn.data.image_folder import ImageFolder
from lasnn.errors import UserError
from lasnn.registry import datasets


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        for number in range(20):
            picture(tmp_path / "pictures" / name / f"{number}.png", 100 * label + number)
    return tmp_path / "pictures"


@pytest.fixture
def before(folder):
    data = ImageFolder(folder, size=8)
    # As a run stores it.
    return DatasetDescription.from_json(json.loads(json.dumps(data.describe("image-folder", data.load()).as_json())))


def changes(folder: Path, before: DatasetDescription, **options) -> str:
    return "\n".join(ImageFolder(folder, **{"size": 8} | options).changes_since(before))


def test_the_same_pictures_elsewhere_are_no_change(folder, before, tmp_path):
    assert changes(folder, before) == ""
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    data = ImageFolder(tmp_path / "copy", size=8)
    assert data.changes_since(before, data.load()) == []


def test_pictures_that_come_and_go(folder, before):
    picture(folder / "cat/new.png", 7777)
    assert changes(folder, before).startswith("1 picture added (")
    (folder / "cat/new.png").unlink()
    (folder / "dog/3.png").rename(folder / "cat/3-of-dog.png")
    assert changes(folder, before) == "1 picture in another class"
    (folder / "cat/3-of-dog.png").unlink()
    assert changes(folder, before).startswith("1 picture removed (")


def test_pictures_that_were_trained_on_are_never_test_pictures_without_a_word(folder, before):
    said = changes(folder, before, split_seed=1)
    assert "that it was trained on would count as test pictures now" in said
    assert "of its test set would be training pictures now" in said


def test_classes_that_are_renamed_added_or_gone(folder, before):
    (folder / "cat").rename(folder / "wolf")
    assert "class 'cat' is called 'wolf' now, and its label 1; it was 0" in changes(folder, before)
    for number in range(4):
        picture(folder / "eel" / f"{number}.png", 9000 + number)
    assert "class 'eel' is new" in changes(folder, before)
    shutil.rmtree(folder / "wolf")
    assert "class 'cat' is gone" in changes(folder, before)


def test_what_the_recipe_makes_of_them(folder, before):
    said = changes(folder, before, size=[8, 9], grey=True)
    assert "the images' width is 9 now; it was 8" in said
    assert "the images' channels are 1 now; they were 3" in said
    data = ImageFolder(folder, size=8, fit="stretch")
    assert "pictures are decoded by stretch now; it was crop" in data.changes_since(before, data.load())


@pytest.mark.parametrize("name", ["mnist", "tiny-imagenet", "fashion-mnist-mini"])
def test_every_data_set_describes_itself(name):
    data = datasets.build(name, Path("nowhere"))
    described = data.describe(name)
    assert DatasetDescription.from_json(json.loads(json.dumps(described.as_json()))) == described
    assert data.changes_since(described) == []


def test_a_damaged_description_is_a_line(before):
    whole = before.as_json()
    for wrong in (
        {"keys": [["!"]]},
        {"mean": [0.5]},
        {"mean": ["a", "b", "c"]},
        {"train_size": "9"},
        {"classes": 3},
        {"strange": 1},
    ):
        with pytest.raises(UserError, match=r"^run\.json is damaged: ") as error:
            DatasetDescription.from_json(whole | wrong, "run.json")
        assert "\n" not in str(error.value)
