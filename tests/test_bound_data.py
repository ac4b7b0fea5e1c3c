"""A run is bound to the data that it was trained on: it needs no folder for its networks, and notices another one."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lasnn import distill, load_run
from lasnn.bound_data import as_metadata, from_metadata
from lasnn.errors import UserError

RECIPE = """
[data]
name = "image-folder"
root = "pictures"
size = 28
batch_size = 8
[student]
architecture = "vgg5"
width = 4
timesteps = 2
[distill]
epochs = 1
"""


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with pictures of two classes, split by hand, and a finished run on them."""
    folder = tmp_path_factory.mktemp("bound")
    for number, (split, name) in enumerate((s, n) for s in ("train", "val") for n in ("cat", "dog")):
        for index in range(6):
            picture(folder / "pictures" / split / name / f"{index}.png", 10 * number + index)
    (folder / "own.toml").write_text(RECIPE)
    before = os.getcwd()
    os.chdir(folder)
    try:
        distill("own.toml", "run")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def bound(trained, lasnn, monkeypatch):
    """A copy of it, the working directory of the test and of `lasnn`."""
    shutil.copytree(trained, lasnn.folder, dirs_exist_ok=True)
    # What env.json recorded is of the folder that this is a copy of.
    env = json.loads((lasnn.folder / "run" / "env.json").read_text())
    here = {**env, "data_root": str(lasnn.folder / "pictures")}
    (lasnn.folder / "run" / "env.json").write_text(json.dumps(here))
    monkeypatch.chdir(lasnn.folder)
    return lasnn


def test_nothing_is_said_where_nothing_changed(bound):
    assert bound.json("evaluate", "run")["data_changes"] == []
    assert "changed" not in bound("evaluate", "run").stdout


def test_a_picture_more_is_said(bound):
    picture(bound.folder / "pictures" / "val" / "cat" / "new.png", 99)
    [line] = bound.json("evaluate", "run")["data_changes"]
    assert line.startswith("1 picture added")
    assert f"data changed since the run began: {line}" in bound("evaluate", "run").stdout
    assert bound.json("export", "run", "--format", "safetensors")["data_changes"] == [line]


@pytest.mark.parametrize(
    ("move", "reason"),
    [
        (("train/cat/0.png", "val/cat/other.png"), "1 of its test images were trained on"),
        (("train/dog/3.png", "val/dog/3.jpg.png"), "1 of its test images were trained on"),
    ],
)
@pytest.mark.parametrize("command", [("evaluate",), ("export", "--format", "onnx"), ("report",)])
def test_training_pictures_are_no_test_pictures(bound, move, reason, command):
    (bound.folder / "pictures" / move[0]).rename(bound.folder / "pictures" / move[1])
    assert reason in bound(command[0], "run", *command[1:], code=2).stderr
    assert not list((bound.folder / "run").glob("*.onnx"))


@pytest.mark.parametrize("command", [("evaluate",), ("export", "--format", "onnx"), ("report",)])
def test_another_class_is_refused(bound, command):
    for split in ("train", "val"):
        (bound.folder / "pictures" / split / "cat").rename(bound.folder / "pictures" / split / "wolf")
    said = bound(command[0], "run", *command[1:], code=2).stderr
    assert "class 'cat' is called 'wolf' now" in said
    assert "its classes are others" in said


def test_a_student_needs_no_data_folder(bound):
    file = bound.json("export", "run", "--format", "safetensors")["file"]
    shutil.rmtree("pictures")
    images = torch.rand(2, 3, 28, 28)
    wanted = load_run("run").student(images)
    elsewhere = bound.folder / "elsewhere"
    elsewhere.mkdir()
    shutil.move(file, elsewhere / "student.safetensors")
    found = load_run(elsewhere / "student.safetensors")
    assert torch.equal(found.student(images), wanted)
    assert found.description.classes == ("cat", "dog")
    with pytest.raises(UserError, match="pictures"):
        load_run("run").images  # noqa: B018


def test_metadata_say_what_data_json_does_without_the_files():
    from lasnn.data.description import DatasetDescription

    known = DatasetDescription(
        "own", 1, 8, 9, ("a", "b"), (0.5,), (0.2,), 20, 10, "crop", ((b"",) * 2,) * 2, ("x", "y")
    )
    found = from_metadata(json.loads(json.dumps(as_metadata(known))), "file")
    assert found.keys == ()
    assert as_metadata(found) == as_metadata(known)
    assert from_metadata({"num_classes": 2}, "a file of an earlier lasnn") is None


def test_a_run_finds_its_data_from_another_directory(bound, monkeypatch):
    elsewhere = bound.folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = bound.folder / "run"
    assert 'root = "pictures"' in (run / "recipe.toml").read_text(), "as it was written"
    assert str(bound.folder) not in (run / "recipe.toml").read_text()
    assert load_run(run).images.changes == []
