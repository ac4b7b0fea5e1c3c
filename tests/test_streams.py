"""Consoles as they are found: results are printed, with replacements where an encoding has no better."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from common import Command

CLASSES = ("猫", "Käfer", "µ-Welle")
RECIPE = """
[data]
name = "image-folder"
root = "pictures"
size = 8
batch_size = 8
[student]
architecture = "vgg5"
width = 2
timesteps = 1
[[losses]]
name = "cross-entropy"
[distill]
epochs = 1
"""
# What an environment says, and what the classes look like there; Python chooses UTF-8 for C.
ENCODINGS = {
    "ascii": ({"PYTHONIOENCODING": "ascii"}, ("\\u732b", "K\\xe4fer", "u-Welle", "uJ")),
    "gbk": ({"PYTHONIOENCODING": "gbk"}, ("猫", "K\\xe4fer", "u-Welle", "uJ")),
    "cp1252": ({"PYTHONIOENCODING": "cp1252"}, ("\\u732b", "Käfer", "µ-Welle", "µJ")),
    "C": ({"LC_ALL": "C"}, ("猫", "Käfer", "µ-Welle", "µJ")),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run whose classes have names beyond ASCII."""
    folder = tmp_path_factory.mktemp("streams")
    for shade, name in enumerate(CLASSES):
        for number in range(12):
            path = folder / "pictures" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 80 * shade, 99)).save(path)
    (folder / "own.toml").write_text(RECIPE)
    lasnn = Command(folder)
    lasnn("distill", "own.toml", "--out", "run")
    return lasnn


def run(lasnn, *arguments, environment=(), **options):
    """A process of its own, as bytes."""
    command = [sys.executable, "-m", "lasnn", *arguments]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**lasnn.environment, **dict(environment)}
    return subprocess.run(command, cwd=lasnn.folder, env=environment, check=False, **{**piped, **options})


FEW = [pytest.param(name, marks=[] if name == "ascii" else pytest.mark.full) for name in ENCODINGS]


@pytest.mark.parametrize("name", FEW)
def test_every_console_shows_the_results(name, trained):
    environment, words = ENCODINGS[name]
    done = run(trained, "evaluate", "run", environment=environment)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(environment.get("PYTHONIOENCODING", "utf-8"))
    assert all(word in text for word in words), text
    assert not done.stderr


def test_standard_output_may_be_closed(trained):
    """No file of the run gets its descriptor."""
    done = run(trained, "distill", "own.toml", "--dry-run", preexec_fn=lambda: os.close(1), stdout=None)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_an_output_that_is_full_is_a_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lasnn", "list", "losses"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr.decode() == "lasnn: cannot read or write: No space left on device\n"


def test_a_reader_that_leaves_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m lasnn list | head -n 1", shell=True, capture_output=True, text=True, check=False
    )
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


@pytest.mark.parametrize("columns", ["0", "20"])
def test_narrow_consoles_lose_no_number(columns, trained, monkeypatch):
    """0 is what some shells without a terminal say."""
    accuracy = json.loads((trained.folder / "run/summary.json").read_text())["accuracy"]
    monkeypatch.setitem(trained.environment, "COLUMNS", columns)
    out = trained("evaluate", "run").stdout
    assert f" {accuracy:.4f} " in out
    assert "…" not in out


def test_file_names_that_are_no_utf8(trained):
    """Named in messages, and used as they are."""
    (trained.folder / os.fsdecode(b"k\xe4fer.toml")).write_text(RECIPE.replace("vgg5", "vgg6"))
    done = run(trained, "distill", b"k\xe4fer.toml", "--dry-run")
    assert done.returncode == 2
    assert b"lasnn: k\\udce4fer.toml: student.architecture" in done.stderr
    assert len(done.stderr.splitlines()) == 1
