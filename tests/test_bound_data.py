"""A run is bound to the data that it was trained on: it needs no folder for its networks, and notices another one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lasnn import distill, evaluate, load_run
from lasnn.data import DatasetDescription
from lasnn.description import data_described
from lasnn.errors import UserError
from lasnn.evaluation.evaluate import conditions
from lasnn.export import export
from lasnn.report import report
from lasnn.weights import load_weights

RECIPE = """
device = "cpu"
[data]
name = "image-folder"
root = "pictures"
size = 16
batch_size = 8
[student]
architecture = "vgg5"
width = 2
timesteps = 1
[distill]
epochs = 1
"""
PICTURES = Path("pictures")


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def measured(run="run", **options):
    """What `lasnn evaluate` prints, in short."""
    loaded = load_run(run, **options)
    [result] = evaluate(loaded, include_speed=False)
    return {**conditions(loaded), **result}


def exported(run="run", form="safetensors", **options):
    return export(run, form, force=True, **options)


# What the commands that measure a run say of its data, or raise.
COMMANDS = {
    "evaluate": lambda: measured()["data_changes"],
    "report": lambda: report("run", converted="none")["data_changes"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two folders with pictures of two classes and a finished run on each: split by hand, and split by a draw."""
    folder = tmp_path_factory.mktemp("bound")
    seeds = iter(range(1000))
    with pytest.MonkeyPatch.context() as patch:
        for kind, splits in (("split", ("train", "val")), ("drawn", ("",))):
            (folder / kind).mkdir()
            patch.chdir(folder / kind)
            for split in splits:
                for name in ("cat", "dog"):
                    for index in range(8):
                        picture(PICTURES / split / name / f"{index}.png", next(seeds))
            Path("own.toml").write_text(RECIPE)
            distill("own.toml", "run")
    return folder


@pytest.fixture(params=["split", "drawn"])
def bound(request, trained, tmp_path, monkeypatch):
    """A copy of one of them, made the working directory."""
    return copied(trained / request.param, tmp_path, monkeypatch)


@pytest.fixture
def split(trained, tmp_path, monkeypatch):
    """A copy of that which is split by hand."""
    return copied(trained / "split", tmp_path, monkeypatch)


def copied(source, folder, monkeypatch):
    shutil.copytree(source, folder, dirs_exist_ok=True)
    # What was recorded is of the folder that this is a copy of.
    env = json.loads((folder / "run/env.json").read_text())
    (folder / "run/env.json").write_text(json.dumps({**env, "data_root": str(folder / "pictures")}))
    monkeypatch.chdir(folder)
    return folder


def class_folders(name):
    return [path for path in PICTURES.rglob(name) if path.is_dir()]


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_said_where_nothing_changed(bound, command):
    assert COMMANDS[command]() == []
    found = exported()
    assert found["data_changes"] == []
    assert found["verified_on"] == "test images"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_picture_added_to_each_class_is_said_and_moves_no_other(bound, command):
    folders = class_folders("cat") + class_folders("dog")
    for number, folder in enumerate(folders):
        picture(folder / "a-new-one.png", 5000 + number)
    [line] = COMMANDS[command]()
    assert line.startswith(f"{len(folders)} pictures added (")
    if command == "report":
        assert f"Data changed since the run began: {line}." in Path("run/report.html").read_text()
    assert exported()["data_changes"] == [line]


def test_a_picture_that_another_took_the_place_of(bound):
    old = sorted(class_folders("cat")[-1].iterdir())[0]
    picture(old, 6000)
    lines = measured()["data_changes"]
    assert [line.partition(" (")[0] for line in lines] == ["1 picture added", "1 picture removed"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kept", [True, False], ids=["copied", "moved"])
def test_training_pictures_are_never_test_pictures(split, command, kept):
    (shutil.copy if kept else shutil.move)("pictures/train/cat/0.png", "pictures/val/cat/other name.png")
    with pytest.raises(UserError, match="1 of its test images were trained on"):
        COMMANDS[command]()


def test_training_and_test_folder_swapped(split):
    (PICTURES / "train").rename("other")
    (PICTURES / "val").rename(PICTURES / "train")
    Path("other").rename(PICTURES / "val")
    with pytest.raises(UserError, match="16 of its test images were trained on"):
        measured()
    with pytest.raises(UserError, match="16 of its test images were trained on"):
        measured(exported(out="run/of-its-own.safetensors")["file"])


def test_another_test_folder_is_said(split):
    shutil.rmtree(PICTURES / "val")
    for number, name in enumerate(("cat", "dog") * 3):
        picture(PICTURES / "val" / name / f"{number}.png", 7000 + number)
    assert len(measured()["data_changes"]) == 2


def test_another_draw_of_the_split_is_refused(trained, tmp_path, monkeypatch):
    copied(trained / "drawn", tmp_path, monkeypatch)
    recipe = Path("run/recipe.toml")
    recipe.write_text(recipe.read_text().replace("size = 16", "size = 16\nsplit_seed = 5"))
    with pytest.raises(UserError, match="of its test images were trained on"):
        measured()


def renamed():
    for folder in class_folders("cat"):
        folder.rename(folder.with_name("wolf"))


def class_added():
    for split in {folder.parent for folder in class_folders("cat")}:
        for number in range(4):
            picture(split / "bear" / f"{number}.png", 8000 + number + len(str(split)))


def class_removed():
    class_added()
    for folder in class_folders("dog"):
        shutil.rmtree(folder)


CLASS_CHANGES = {
    "class 'cat' is called 'wolf' now, and its label 1; it was 0": renamed,
    "class 'bear' is new": class_added,
    "class 'dog' is gone": class_removed,
}


@pytest.mark.parametrize("said", CLASS_CHANGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_other_classes_are_refused(bound, command, said):
    CLASS_CHANGES[said]()
    with pytest.raises(UserError, match="its classes are others") as error:
        COMMANDS[command]()
    assert said in str(error.value)


@pytest.mark.parametrize("form", ["onnx", "safetensors"])
def test_an_export_has_the_classes_of_the_training(bound, form):
    renamed()
    found = exported(form=form)
    assert "class 'cat' is called 'wolf' now" in found["why_drawn"]
    assert found["verified"]
    assert found["agreements"][0]["images"] == 64
    if form == "safetensors":
        assert load_weights(Path(found["file"]))[1]["classes"] == ["cat", "dog"]


def test_a_student_needs_no_data_folder(bound):
    file = exported()["file"]
    shutil.rmtree(PICTURES)
    images = torch.rand(2, 3, 16, 16)
    wanted = load_run("run").student(images)
    again = exported()
    assert again["verified"]
    assert again["verified_on"] == "drawn images"
    assert again["why_drawn"].startswith("no folder ")
    elsewhere = bound / "elsewhere"
    elsewhere.mkdir()
    shutil.move(file, elsewhere / "student.safetensors")
    found = load_run(elsewhere / "student.safetensors")
    assert torch.equal(found.student(images), wanted)
    assert found.description.classes == ("cat", "dog")
    with pytest.raises(UserError, match=r"the images of run are looked for in .*pictures; --data names another folder"):
        measured()


def test_data_that_is_named_is_used_or_refused(bound):
    shutil.move(PICTURES, "moved")
    with pytest.raises(UserError, match="no folder"):
        measured()
    assert measured(data_root="moved")["data_changes"] == []
    assert exported(data_root="moved")["verified_on"] == "test images"
    for call in (measured, exported):
        with pytest.raises(UserError, match="no folder nowhere|no folder .*nowhere"):
            call(data_root="nowhere")
    shutil.move("moved", PICTURES)
    assert measured()["data_changes"] == []


def test_a_run_finds_its_data_from_another_directory(bound, monkeypatch):
    run = bound / "run"
    assert 'root = "pictures"' in (run / "recipe.toml").read_text(), "as it was written"
    for name in ("recipe.toml", "data.json", "student.safetensors", "last.pt"):
        assert str(bound).encode() not in (run / name).read_bytes()
    # Another folder of that name lies there.
    picture(bound / "elsewhere/pictures/cat/0.png", 0)
    monkeypatch.chdir(bound / "elsewhere")
    assert measured(run)["data_changes"] == []
    assert measured(exported(run)["file"])["data_changes"] == []


def test_home(bound, monkeypatch):
    monkeypatch.setenv("HOME", str(bound))
    monkeypatch.chdir("/")
    assert measured("~/run", data_root="~/pictures")["data_changes"] == []
    assert exported("~/run", out="~/s.safetensors")["file"] == str(bound / "s.safetensors")
    distill("~/own.toml", "~/again", overrides=["data.root=~/pictures"])
    assert 'root = "~/pictures"' in (bound / "again/recipe.toml").read_text()
    with pytest.raises(UserError, match=r"data.root ~nobody-of-that-name/x: .*; give the path without ~"):
        distill("~/own.toml", overrides=["data.root=~nobody-of-that-name/x"])


def test_a_run_of_before_there_was_a_description(split):
    """Its weights' file knows the classes and the images as a whole; an older one nothing, and the folder is read."""
    Path("run/data.json").unlink()
    assert measured()["data_changes"] == []
    picture(PICTURES / "train/cat/new.png", 9000)
    picture(PICTURES / "val/cat/new.png", 9001)
    *_, line = measured()["data_changes"]
    assert line.startswith("whether any of the test images were trained on is not known")


def test_a_file_describes_its_data_as_the_run_does_without_single_files(bound):
    run = load_run("run")
    assert run.description.keys
    description = load_weights(bound / "run/student.safetensors")[1]
    assert data_described(description, "file") == replace(run.description, keys=())
    assert data_described({"num_classes": 2}, "a file of an earlier lasnn") is None
    assert DatasetDescription.from_json(json.loads(Path("run/data.json").read_text())) == run.description


def test_a_copied_training_picture_is_not_known_from_an_exports_metadata(split):
    file = shutil.move(exported()["file"], "alone.safetensors")
    shutil.copy("pictures/train/cat/0.png", "pictures/val/cat/other.png")
    *_, line = measured(file, data_root="pictures")["data_changes"]
    assert line.startswith("whether any of the test images were trained on is not known")


def test_commands_say_it(split, lasnn):
    picture(PICTURES / "val/cat/new.png", 99)
    shutil.move(PICTURES, "moved")
    line = "data changed since the run began: 1 picture added (0 training, 1 test)"
    assert line in lasnn("evaluate", "run", "--data", "moved").stdout
    said = lasnn("export", "run", "--format", "safetensors").stdout
    assert "64 drawn images, arg-max equal on 64/64" in said
    assert "verified on drawn images, for the test images cannot be used: no folder" in said
