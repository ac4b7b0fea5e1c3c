"""Every command and every snippet of the README is run."""

import re
import shlex
import subprocess
import sys

import pytest

from common import ROOT
from lasnn.data.fashion_mnist import FashionMnistMini
from lasnn.data.idx import write_idx

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
SHORT = ["--set", "teacher.epochs=1", "--set", "distill.epochs=1"]
# What shortens a command.
SHORTER = {"distill": [*SHORT, "--set", 'plugins=["few"]'], "report": ["--converted", "none"]}
TRAIN, TEST = 500, 200
# Lets a process find fewer images in the place of those that ship.
FEW = """
from pathlib import Path
from lasnn.data import fashion_mnist

fashion_mnist.MINI = Path({folder!r})
fashion_mnist.FashionMnistMini.train_size, fashion_mnist.FashionMnistMini.test_size = {train}, {test}
"""


def code(language):
    return [text for name, text in BLOCKS if name == language]


def commands():
    """The lines of the shell blocks without their comments, as argument lists."""
    return [words for text in code("sh") for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The code of `FEW`, with a folder of such images."""
    folder = tmp_path_factory.mktemp("few")
    for split, images, count in zip(("train", "t10k"), FashionMnistMini().load(), (TRAIN, TEST), strict=True):
        every = len(images) // count
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images.pixels[::every, 0].numpy())
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", images.labels[::every].byte().numpy())
    return FEW.format(folder=str(folder), train=TRAIN, test=TEST)


def test_commands(lasnn, few):
    """In their order, in one folder, with one epoch in place of several, and fewer images."""
    (lasnn.folder / "few.py").write_text(few)
    run = 0
    for words in commands():
        if words[0] == "make":
            continue
        assert words[0] == "lasnn"
        out = lasnn(*words[1:], *SHORTER.get(words[1], [])).stdout
        assert out.strip(), words
        run += 1
    assert run >= 6


def test_make_targets_exist():
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert targets == ["quickstart", "test"]
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.full
def test_make_quickstart(tmp_path):
    command = ["make", "quickstart", f"OUT={tmp_path / 'run'}", f"ARGS={' '.join(SHORT)}"]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "student: test accuracy" in result.stdout
    assert f"{tmp_path / 'run'}: 2,000 test images" in result.stdout


def test_the_recipe_is_one(tmp_path, lasnn):
    [text] = code("toml")
    (tmp_path / "readme.toml").write_text(text)
    assert "teacher  vgg5" in lasnn("distill", "readme.toml", "--dry-run").stdout


@pytest.mark.parametrize("text", [text for text in code("python") if "@architectures" not in text])
def test_snippets(text, few, tmp_path):
    subprocess.run([sys.executable, "-c", few + text], cwd=tmp_path, check=True, capture_output=True)


def test_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))):
        folder = (ROOT / name).parent
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            if "://" not in link:
                assert (folder / link).exists(), f"{name} links to {link}"


def test_no_placeholder_is_left():
    assert "QUICK" not in README
