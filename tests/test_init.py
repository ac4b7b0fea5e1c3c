"""lasnn init: a first recipe for a folder of pictures, asked for on a terminal and taken from options elsewhere."""

import os
import pty
import select
import subprocess
import sys
import time
import tomllib
from dataclasses import replace

import pytest
from easy_pictures import write
from PIL import Image

from lasnn import starter
from lasnn.errors import UserError
from lasnn.recipe.schema import Recipe


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    return write(tmp_path_factory.mktemp("init") / 'my pictures, "1"', "discs", 80)


def test_without_a_terminal_the_defaults_are_taken_and_said(discs, lasnn):
    out = lasnn("init", discs).stdout
    assert "10 classes, " in out
    assert "coloured, 32 pixels a side in the median" in out
    assert "no terminal to ask on; taken: --size 32 --architecture vgg5 --timesteps 4 --epochs 60" in out
    assert "next: lasnn distill discs.toml" in out
    plan = lasnn.json("distill", "discs.toml", "--dry-run")
    assert plan["data"] == "image-folder"
    assert plan["timesteps"] == 4
    text = (lasnn.folder / "discs.toml").read_text()
    assert text.startswith("#:schema /")
    assert os.path.isfile(text.partition("\n")[0].removeprefix("#:schema "))
    jsonschema = pytest.importorskip("jsonschema")
    from lasnn.recipe.json_schema import json_schema

    jsonschema.Draft7Validator(json_schema()).validate(tomllib.loads(text))


def test_options_are_what_is_written(discs, lasnn):
    options = ["--size", 24, "--architecture", "resnet20", "--timesteps", 2, "--epochs", 3, "--out", "mine.toml"]
    assert "no terminal" not in lasnn("init", discs, *options).stdout
    recipe = Recipe.load(lasnn.folder / "mine.toml")
    assert recipe.data.options["size"] == 24
    assert recipe.data.root == str(discs)
    assert recipe.teacher.architecture == recipe.student.architecture == "resnet20"
    assert recipe.student.timesteps == 2
    assert recipe.teacher.epochs == recipe.distill.epochs == 3
    assert "no terminal" not in lasnn("init", discs, "--yes", "--out", "other.toml").stdout


def test_what_was_not_given_is_asked(discs):
    asked = []

    def answer(question, proposal):
        asked.append((question, proposal))
        return 3 if isinstance(proposal, int) else proposal

    given = starter.Choices(architecture="vgg9")
    proposed = starter.propose(starter.look(discs), given)
    assert starter.ask(proposed, given, answer) == starter.Choices(3, "vgg9", 3, 3)
    assert [proposal for _, proposal in asked] == [32, 4, 60]
    assert [question for question, _ in asked] == [starter.QUESTIONS[key] for key in ("size", "timesteps", "epochs")]


@pytest.mark.full
def test_a_recipe_of_it_learns(discs, lasnn):
    lasnn("init", discs, "--yes", "--epochs", 2, "--size", 16)
    short = ["--set", "teacher.width=4", "--set", "student.width=4", "--set", "teacher.warmup_epochs=0"]
    done = lasnn.json("distill", "discs.toml", *short)
    assert 0 <= done["accuracy"] <= 1
    assert done["timesteps"] == 4


@pytest.mark.full
def test_on_a_terminal_four_questions_are_asked(discs, tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lasnn", "init", str(discs), "--timesteps", "2"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, close_fds=True)
    os.close(theirs)
    seen, answers = (
        "",
        {"pixels a side?": "20\n", "Which network": "\n", "How many epochs": "none\n", "valid integer": "7\n"},
    )
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                seen += os.read(ours, 10000).decode()
            except OSError:
                break
        for question in [one for one in answers if one in seen]:
            os.write(ours, answers.pop(question).encode())
    assert process.wait(10) == 0, seen
    # What was given is not asked.
    assert "How many time steps" not in seen
    assert not answers
    recipe = Recipe.load(tmp_path / "discs.toml")
    assert (recipe.data.options["size"], recipe.student.architecture, recipe.student.timesteps) == (20, "vgg5", 2)
    assert recipe.distill.epochs == 7


def mistaken(lasnn, *arguments) -> str:
    before = sorted(os.listdir(lasnn.folder))
    said = lasnn("init", *arguments, code=2).stderr
    assert sorted(os.listdir(lasnn.folder)) == before
    return said


def test_folders_that_cannot_work(discs, lasnn):
    assert "is not there; give the folder of the pictures" in mistaken(lasnn, "nowhere")
    (lasnn.folder / "file").write_text("x")
    assert "is a file, not a folder" in mistaken(lasnn, "file")
    (lasnn.folder / "empty").mkdir()
    assert "no folders of classes in it" in mistaken(lasnn, "empty")
    loose = lasnn.folder / "loose"
    loose.mkdir()
    Image.new("RGB", (8, 8)).save(loose / "a.png")
    assert "a folder a class is needed" in mistaken(lasnn, "loose")
    one = lasnn.folder / "one" / "cats"
    one.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(one / "a.png")
    Image.new("RGB", (8, 8), (9, 9, 9)).save(one / "b.png")
    assert "one class, and at least 2 are needed" in mistaken(lasnn, "one")


def test_choices_that_cannot_work(discs, lasnn):
    assert "unknown architecture 'vgg55'; did you mean 'vgg5'?" in mistaken(lasnn, discs, "--architecture", "vgg55")
    assert "data.size" in mistaken(lasnn, discs, "--size", -3)
    assert "student.timesteps" in mistaken(lasnn, discs, "--timesteps", 0)
    assert "cannot run on 2 x 2 images" in mistaken(lasnn, discs, "--size", 2)
    (lasnn.folder / "discs.toml").write_text("mine")
    assert "is there already; choose another name with --out" in mistaken(lasnn, discs)
    assert "there is no folder" in mistaken(lasnn, discs, "--out", "no/where.toml")
    assert (lasnn.folder / "discs.toml").read_text() == "mine"


def test_grey_pictures_are_found_out(tmp_path):
    for label in ("a", "b"):
        for number in range(3):
            (tmp_path / label).mkdir(exist_ok=True)
            Image.new("L", (30, 50), 40 * number + ord(label)).save(tmp_path / label / f"{number}.png")
    pictures = starter.look(tmp_path)
    assert (pictures.grey, pictures.side, pictures.classes) == (True, 30, ("a", "b"))
    assert starter.propose(pictures).size == 28
    Image.new("RGB", (30, 50), (200, 0, 0)).save(tmp_path / "a" / "red.png")
    assert not starter.look(tmp_path).grey


def test_what_is_proposed_by_size_and_number(discs):
    small = starter.look(discs)
    large = replace(small, side=500, train=50_000)
    assert starter.batch_size(small) == 16
    assert starter.batch_size(large) == 128
    assert starter.propose(large) == starter.Choices(64, "vgg9", 4, 10)
    assert starter.propose(replace(large, train=900)).architecture == "vgg5"
    assert starter.propose(replace(small, side=5)).size == 16
    given = starter.Choices(48, "vgg11", 1, 2)
    assert starter.propose(small, given) == given
    with pytest.raises(UserError, match="is a folder; name a file"):
        starter.write(small, given, discs)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_folder_whose_name_is_no_text_is_refused(tmp_path):
    folder = tmp_path / os.fsdecode(b"pictures-\xff")
    write(folder, "discs", 20)
    with pytest.raises(UserError, match="the name is no UTF-8"):
        starter.look(folder)
