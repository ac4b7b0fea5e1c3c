"""The students that ship: what their cards say, out of the box and by every command."""

import json
import re

import pytest

from lasnn import evaluate, load_run
from lasnn.errors import UserError
from lasnn.export import export
from lasnn.run import find_run, shipped_models

MODELS = shipped_models()
# Of all of them together, with their teachers.
LARGEST = 2 * 2**20


def test_there_are_some_and_they_are_small():
    assert len(MODELS) >= 3
    files = [path for folder in MODELS.values() for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= LARGEST
    # Nothing of the machine that they were trained on, and nothing that only a training needs.
    assert not [path for path in files if path.name in ("last.pt", "env.json", ".lock")]


@pytest.mark.parametrize("name", MODELS)
def test_the_accuracy_on_the_shipped_test_images_is_that_of_its_card(name):
    card = (MODELS[name] / "README.md").read_text()
    row = re.compile(r"^\| (\d+) \| [\d.]+ \| ([\d.]+) \|", re.M)
    said = {int(steps): float(accuracy) for steps, accuracy in row.findall(card)}
    assert set(said) >= {1, 2, 4}
    for result in evaluate(f"model:{name}", list(said), include_speed=False):
        assert result["accuracy"] == pytest.approx(said[result["timesteps"]], abs=0.002)


@pytest.mark.parametrize("name", MODELS)
def test_its_card_and_its_summary_say_the_same(name):
    """The card's second column is of all test images, at the T of its training that of summary.json."""
    card, summary = (MODELS[name] / "README.md").read_text(), find_run(f"model:{name}").read_json("summary.json")
    assert f"| {summary['timesteps']} | {summary['accuracy']:.4f} |" in card
    assert f"{summary['teacher_accuracy']:.4f}" in card


def test_the_commands_take_it(lasnn):
    name = next(iter(MODELS))
    listed = lasnn.json("list", "models")["models"]
    assert listed.keys() == MODELS.keys()
    assert all(found["accuracy"] > 0.8 and found["bytes"] > 1000 for found in listed.values())
    found = lasnn.json("evaluate", f"model:{name}", "--timesteps", "1")
    assert (found["run"], found["images"], found["data"]) == (f"model:{name}", 2000, "fashion-mnist-mini")
    # Of these images, as the accuracy beside it.
    assert 2000 * found["teacher_accuracy"] == pytest.approx(round(2000 * found["teacher_accuracy"]), abs=1e-6)
    made = lasnn.json("export", f"model:{name}", "--format", "safetensors")
    assert made["file"].startswith(f"{name}-student-t")
    assert (lasnn.folder / made["file"]).is_file()
    assert json.loads(json.dumps(made))["verified"]
    line = lasnn("evaluate", f"model:{name}", "--data", "nowhere", code=2).stderr
    assert line == "lasnn: --data: no folder nowhere; name the one of the run's images\n"
    assert f"unknown model '{name}x'; did you mean '{name}'?" in lasnn("evaluate", f"model:{name}x", code=2).stderr


def test_an_exported_one_is_of_the_whole_data_set(tmp_path):
    """And not of the part that ships: its file knows the images that it was trained on."""
    name = next(iter(MODELS))
    file = export(f"model:{name}", "safetensors", out=tmp_path / "student.safetensors")["file"]
    loaded = load_run(file)
    assert loaded.recipe.data.name == loaded.description.name == "fashion-mnist"
    assert loaded.description.train_size == 60_000


def test_a_folder_without_the_images_is_an_error(tmp_path):
    """Not measured on images that lie elsewhere."""
    loaded = load_run(f"model:{next(iter(MODELS))}", data_root=tmp_path)
    with pytest.raises(UserError, match="Fashion-MNIST is in none of"):
        _ = loaded.images.test


def test_it_loads_without_data():
    import torch

    name = next(iter(MODELS))
    run = load_run(f"model:{name}")
    image = (run.description.channels, run.description.height, run.description.width)
    assert run.student(torch.rand(2, *image)).shape == (2, len(run.description.classes))
    assert run.teacher is not None
