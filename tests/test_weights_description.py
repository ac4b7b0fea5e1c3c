"""What a file says of its network is compared whole, and travels without the machine that it was written on."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export_cases import make_run
from lasnn import distill, evaluate, load_run
from lasnn.callback import Callback
from lasnn.compatibility import fitted_weights
from lasnn.description import describe_student, describe_teacher, without_paths
from lasnn.errors import UserError
from lasnn.export import export
from lasnn.factory import make_data, make_student, make_teacher
from lasnn.recipe.schema import Recipe
from lasnn.training.teacher import near_chance
from lasnn.weights import load_weights, save_weights

SHORT = ("teacher.epochs=1", "distill.epochs=1", "teacher.width=2", "student.width=2", "student.timesteps=1")


class Notes(Callback):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture
def teacher_file(tiny, tmp_path):
    """A teacher's file with its whole description, of random weights; returns its path and its description."""

    def write(change=lambda description: description, *settings):
        recipe = Recipe.load(tiny, settings)
        data = make_data(recipe)
        network = make_teacher(recipe, data).network
        path = tmp_path / "t.safetensors"
        save_weights(path, network.state_dict(), change(describe_teacher(recipe, data, network)))
        return path

    return write


def check(recipe, path, *settings):
    recipe = Recipe.load(recipe, settings)
    data = make_data(recipe)
    network = make_teacher(recipe, data).network
    return fitted_weights(path, network, describe_teacher(recipe, data, network))


@pytest.mark.parametrize(
    ("written", "read", "message"),
    [
        (["teacher.pool=max"], [], 'with pool = "max"; the recipe has "avg": set teacher.pool = "max"'),
        ([], ["teacher.pool=max"], 'with pool = "avg"; the recipe has "max": set teacher.pool = "avg"'),
        (["teacher.width=5"], [], "with width = 5; the recipe has 4: set teacher.width = 5"),
        (["teacher.architecture=vgg9"], [], 'with architecture = "vgg9"; the recipe has "vgg5": set'),
        (["teacher.activation=qcfs"], [], 'with activation = "qcfs"; the recipe has "relu": set teacher.activation'),
        (["teacher.activation=qcfs", "teacher.levels=8"], ["teacher.activation=qcfs"], "with levels = 8; the recipe"),
    ],
)
def test_settings_that_leave_no_trace_in_the_shapes(tiny, teacher_file, written, read, message):
    path = teacher_file(lambda description: description, *written)
    with pytest.raises(UserError, match="was trained") as caught:
        check(tiny, path, *read)
    assert f"{path} was trained {message}" in str(caught.value)
    check(tiny, path, *written)


def test_a_default_that_is_written_down_is_no_difference(tiny, teacher_file):
    check(tiny, teacher_file(), "teacher.pool=avg")
    check(tiny, teacher_file(lambda description: description | {"options": {"width": 4}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"classes": d["classes"][::-1]}, "on these classes in another order, "),
        (lambda d: {"classes": ["cat", *d["classes"][1:]]}, "on other classes: 'cat' where the data set has "),
        (lambda d: {"num_classes": 3, "classes": d["classes"][:3]}, "for 3 classes; the data set has 10"),
        (lambda d: {"mean": [0.5]}, "on images normalised with mean = [0.5] and std"),
        (lambda d: {"std": [0.9]}, "on images normalised with mean"),
        (lambda d: {"in_channels": 3}, "on images of 3 channels; the data set's have 1"),
    ],
)
def test_other_images_are_named(tiny, teacher_file, change, message):
    path = teacher_file(lambda description: description | change(description))
    with pytest.raises(UserError) as caught:
        check(tiny, path)
    assert f"{path} was trained {message}" in str(caught.value)


def test_every_difference_has_its_line(tiny, teacher_file):
    path = teacher_file(lambda d: d | {"mean": [0.5], "classes": d["classes"][::-1]}, "teacher.pool=max")
    with pytest.raises(UserError) as caught:
        check(tiny, path)
    assert len(caught.value.problems) == 3


def test_what_a_file_does_not_say_is_not_compared(tiny, teacher_file):
    check(tiny, teacher_file(lambda description: {}))
    check(tiny, teacher_file(lambda d: {key: d[key] for key in ("architecture", "options", "num_classes", "data")}))


@pytest.mark.parametrize("old", [False, True])
def test_a_students_file_is_no_teacher(tiny, tmp_path, old):
    recipe = Recipe.load(tiny)
    data = make_data(recipe)
    description = describe_student(recipe, data.describe(recipe.data.name))
    path = tmp_path / "s.safetensors"
    said = {"recipe": description["recipe"]} if old else description
    save_weights(path, make_student(recipe, data).network.state_dict(), said)
    with pytest.raises(UserError, match=r"s.safetensors is a student's, a spiking network, .*: give the teacher"):
        check(tiny, path)


def test_a_run_is_of_the_classes_that_it_was_trained_on(tiny):
    """Renamed or reordered classes after the training: nothing is shown or exported under the wrong names."""
    run = distill(tiny, overrides=SHORT)
    plugin = run / "tiny_clothes.py"
    plugin.write_text(plugin.read_text().replace("FashionMnistMini.classes", "FashionMnistMini.classes[::-1]"))
    from lasnn.recipe import plugins
    from lasnn.registry import datasets

    plugins._loaded_plugins.clear()
    datasets._entries.pop("tiny-clothes")
    assert load_run(run.path).description.classes[0] == "T-shirt/top"
    with pytest.raises(UserError, match="its classes are others"):
        evaluate(run.path)
    assert load_weights(Path(export(run.path, "safetensors")["file"]))[1]["classes"][0] == "T-shirt/top"


def test_a_students_file_travels(tiny, tmp_path, monkeypatch):
    """No path of the machine is in it; it loads, evaluates and exports elsewhere, and is the same bytes again."""
    first = distill(tiny, tmp_path / "first", overrides=[*SHORT, f"data.root={tmp_path / 'images'}"])
    checkpoint = f"teacher.checkpoint={first.path}"
    second = distill(tiny, tmp_path / "second", overrides=[*SHORT[1:], checkpoint])
    again = distill(tiny, tmp_path / "again", overrides=[*SHORT[1:], checkpoint])
    for run in (first, second):
        for name in ("teacher.safetensors", "student.safetensors"):
            assert str(tmp_path).encode() not in (run / name).read_bytes()
    assert (second / "student.safetensors").read_bytes() == (again / "student.safetensors").read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in (second / "student.safetensors", second / "tiny_clothes.py"):
        shutil.copy(file, elsewhere)
    monkeypatch.chdir(elsewhere)
    loaded = load_run("student.safetensors")
    assert loaded.description == replace(load_run(second.path).description, keys=())
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(loaded.student(images), load_run(second.path).student(images))
    [result] = evaluate("student.safetensors")
    assert result["accuracy"] == second.read_json("summary.json")["accuracy"]


def test_a_students_file_needs_no_images(tmp_path, monkeypatch):
    """Of a data set that looks at its folders to know its classes."""
    from PIL import Image

    for name in ("cat", "dog"):
        for number in range(3):
            path = tmp_path / "pictures" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), (40 * number, 90, 0)).save(path)
    tables = {
        "data": {"name": "image-folder", "root": str(tmp_path / "pictures"), "size": 12},
        "student": {"architecture": "vgg5", "width": 2, "timesteps": 1},
    }
    recipe = Recipe.from_tables(tables)
    data = make_data(recipe)
    file = tmp_path / "s.safetensors"
    described = data.describe("image-folder")
    save_weights(file, make_student(recipe, described).network.state_dict(), describe_student(recipe, described))
    assert "pictures" not in without_paths(recipe)
    shutil.rmtree(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    run = load_run(file)
    assert run.description.classes == ("cat", "dog")
    assert run.student(torch.rand(2, 3, 12, 12)).shape == (2, 2)
    where = re.escape(str(tmp_path / "data"))
    with pytest.raises(UserError, match=rf"no folder data; (.|\n)*s.safetensors are looked for in {where}; --data"):
        run.images  # noqa: B018


@pytest.mark.parametrize(
    "form", ["nir", "safetensors", *(pytest.param(form, marks=pytest.mark.full) for form in ("onnx", "pt2"))]
)
def test_exports_hold_no_path(tmp_path, form):
    run = make_run(tmp_path / "run")
    text = (run / "recipe.toml").read_text().replace('root = "data"', f'root = "{tmp_path / "images"}"')
    (run / "recipe.toml").write_text(text)
    assert str(tmp_path) in text
    files = [export(run, form, out=run / f"{number}.{form}")["file"] for number in range(2)]
    contents = [Path(file).read_bytes() for file in files]
    assert str(tmp_path).encode() not in contents[0]
    if form == "safetensors":
        assert contents[0] == contents[1]
        assert load_weights(run / "0.safetensors")[1]["role"] == "student"


def test_near_chance():
    assert near_chance(0.1, 10, 2000)
    assert not near_chance(0.13, 10, 2000)
    assert near_chance(0.6, 2, 100)
    assert not near_chance(0.7, 2, 100)
    assert not near_chance(1.0, 2, 2), "all right is never chance"


def test_a_teacher_near_chance_is_said_and_refused_where_asked(tiny, tmp_path):
    notes = Notes()
    settings = [*SHORT, "teacher.lr=1e-9"]
    run = distill(tiny, overrides=settings, progress=notes)
    [note] = [line for line in notes.lines if "near chance (1/10)" in line]
    accuracy = run.read_json("teacher.json")["accuracy"]
    assert f"its accuracy, {accuracy:.4f} on 120 test images" in note
    # Trained anew, from the cache, from a file: alike; and the cache does not depend on what is asked of a teacher.
    asked, notes = "teacher.min_accuracy=0.9", Notes()
    message = f"teacher.min_accuracy: the teacher's accuracy is {accuracy:.4f} on 120 test images, below 0.9: "
    for others in (settings, [*SHORT[1:], f"teacher.checkpoint={run.path}"]):
        with pytest.raises(UserError, match=message):
            distill(tiny, overrides=[*others, asked], progress=notes)
    assert any("from the cache" in line for line in notes.lines)
    with pytest.raises(UserError, match="teacher.min_accuracy: the teacher's accuracy"):
        distill(tiny, overrides=[*settings, asked, "seed=5"])
    notes = Notes()
    distill(tiny, overrides=[*settings, f"teacher.min_accuracy={accuracy}"], progress=notes)
