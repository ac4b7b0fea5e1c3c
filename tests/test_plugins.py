"""A cell run twice, an edited plugin, two versions of one in a process: the newer counts, and a run keeps its own."""

import importlib
import logging

import pytest
import torch

from lasnn import architectures, build, distill, load_run, losses
from lasnn.errors import UserError
from lasnn.plan import make_plan
from lasnn.recipe.schema import Recipe
from lasnn.registry import Registry

NET = '''
from torch import nn
from lasnn import Staged, architectures, losses


@architectures.register("mine")
def mine(act, *, in_channels: int, num_classes: int, width: int = 4) -> Staged:
    """One stage."""
    stage = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), act(width))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
    return Staged({"stage1": stage}, head)


@losses.register("my-loss")
def my_loss(logits, targets):
    """A loss."""
    return 4 * logits.square().mean()
'''


@pytest.fixture
def own(tiny):
    """The tiny recipe with an architecture and a loss of its own, of one epoch and without a teacher."""
    (tiny.parent / "nets.py").write_text(NET)
    text = tiny.read_text().replace('"tiny_clothes.py"', '"tiny_clothes.py", "nets.py"')
    before, _, after = text.partition("[teacher]")
    text = before + "[student]" + after.partition("[student]")[2]
    text = text.replace('"vgg5"\nwidth = 4', '"mine"').replace("epochs = 2", "epochs = 1")
    tiny.write_text(text + '[[losses]]\nname = "cross-entropy"\n[[losses]]\nname = "my-loss"\n')
    return tiny


def edit(path, text=NET):
    path.write_text(text.replace("int = 4", "int = 6").replace("4 * logits", "6 * logits"))


def width(student):
    return student.network.stage1[0].out_channels


def test_a_newer_definition_of_the_same_name_replaces_the_older_with_a_line(caplog):
    registry = Registry("thing", "lasnn.errors")
    for number in (1, 2):
        space = {"__name__": "__main__", "registry": registry}
        exec(f"@registry.register('a')\ndef a():\n    return {number}\n", space)
    assert registry.build("a") == 2
    [line] = caplog.messages
    assert line.startswith("thing 'a': the newer definition (")
    with pytest.raises(ValueError, match=r"thing 'a' is already registered \(.*\); choose another name"):
        exec("@registry.register('a')\ndef b():\n    return 3\n", space)
    assert registry.build("a") == 2


def test_an_edited_plugin_counts(own, caplog):
    with caplog.at_level(logging.WARNING, "lasnn"):
        assert width(build(own).student) == 4
        edit(own.parent / "nets.py")
        assert width(build(own).student) == 6
    assert [line.partition(" (")[0] for line in caplog.messages] == [
        "architecture 'mine': the newer definition",
        "loss 'my-loss': the newer definition",
    ]
    # And back again, which is a version that was loaded already.
    (own.parent / "nets.py").write_text(NET)
    assert width(build(own).student) == 4


def test_two_versions_in_one_process(own):
    images, targets = torch.rand(2, 1, 28, 28), torch.arange(2)
    older = build(own)
    edit(own.parent / "nets.py")
    newer = build(own)
    for built, size in ((older, 4), (newer, 6), (older, 4)):
        terms = built.objective(images, targets)
        logits, _ = built.student.steps(images)
        assert terms["my-loss"].item() == pytest.approx(size * logits.square().mean().item(), rel=1e-5)


def test_a_run_uses_the_version_in_its_folder(own):
    distill(own, "a")
    edit(own.parent / "nets.py")
    distill(own, "b")
    a, b = load_run("a"), load_run("b")
    assert [width(run.student) for run in (a, b)] == [4, 6]
    assert width(load_run("a").student) == 4
    # What is built later is of its version as well.
    from lasnn.factory import make_student

    assert [width(make_student(run.recipe, run.data)) for run in (b, a, b)] == [6, 4, 6]


def test_a_recipe_whose_plugin_was_edited_since_is_refused(own):
    recipe = Recipe.load(own)
    make_plan(recipe)
    edit(own.parent / "nets.py")
    with pytest.raises(UserError, match=r"plugins: .*nets.py was edited .*; read the recipe again"):
        make_plan(recipe)
    make_plan(Recipe.load(own))


def test_an_edited_module_is_read_again(own, monkeypatch):
    monkeypatch.syspath_prepend(str(own.parent))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    module = own.parent / "my_module.py"
    (own.parent / "nets.py").rename(module)
    own.write_text(own.read_text().replace("nets.py", "my_module"))
    assert width(build(own).student) == 4
    edit(module)
    importlib.invalidate_caches()
    assert width(build(own).student) == 6


def test_an_edit_anywhere_in_a_package_counts(own, monkeypatch):
    """Of the plugin that is the package, and of one that is a module in it; for a cached teacher too."""
    monkeypatch.syspath_prepend(str(own.parent))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    text = own.read_text()
    for package, plugin in (("whole_package", "whole_package"), ("in_package", "in_package.inner.own")):
        folder = own.parent / package
        (folder / "inner").mkdir(parents=True)
        (folder / "__init__.py").write_text("from .inner import own\n")
        (folder / "inner" / "__init__.py").touch()
        (folder / "inner" / "own.py").write_text("from .. import parts\n")
        code = NET.replace("mine", package).replace("my-loss", f"loss-{package}")
        (folder / "parts.py").write_text(code)
        recipe_text = text.replace("nets.py", plugin).replace("mine", package).replace("my-loss", f"loss-{package}")
        own.write_text(recipe_text)
        recipe = Recipe.load(own)
        before = recipe.plugin_versions()
        assert width(build(own).student) == 4
        edit(folder / "parts.py", code)
        importlib.invalidate_caches()
        with pytest.raises(UserError, match=r"was edited .*; read the recipe again"):
            make_plan(recipe)
        assert width(build(own).student) == 6
        assert Recipe.load(own).plugin_versions() != before


def test_two_modules_of_a_package_are_two_plugins(own, monkeypatch):
    """Before and after an edit of either."""
    monkeypatch.syspath_prepend(str(own.parent))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    folder = own.parent / "package_of_two"
    folder.mkdir()
    (folder / "__init__.py").touch()
    head, loss = NET.replace("mine", "net-of-two").replace("def net-of-two", "def net").split("@losses")
    loss = "from lasnn import losses\n\n\n@losses" + loss.replace("my-loss", "loss-of-two")
    (folder / "nets.py").write_text(head)
    (folder / "terms.py").write_text(loss)
    text = own.read_text().replace('"nets.py"', '"package_of_two.nets", "package_of_two.terms"')
    own.write_text(text.replace("mine", "net-of-two").replace("my-loss", "loss-of-two"))
    images, targets = torch.rand(2, 1, 28, 28), torch.arange(2)
    for wide, strong in ((4, 4), (6, 4), (6, 6)):
        if wide == 6:
            edit(folder / "nets.py", head)
        if strong == 6:
            edit(folder / "terms.py", loss)
        importlib.invalidate_caches()
        built = build(own)
        logits, _ = built.student.steps(images)
        assert width(built.student) == wide
        terms = built.objective(images, targets)
        assert terms["loss-of-two"].item() == pytest.approx(strong * logits.square().mean().item(), rel=1e-5)


def test_packages_whose_first_files_are_equal_are_two(own, monkeypatch):
    monkeypatch.syspath_prepend(str(own.parent))
    for name in ("one", "two"):
        (own.parent / f"package_{name}").mkdir()
        (own.parent / f"package_{name}" / "__init__.py").write_text("from . import parts\n")
        (own.parent / f"package_{name}" / "parts.py").write_text(NET.replace("mine", name).replace("my-", f"{name}-"))
    text = own.read_text().replace('"nets.py"', '"package_one", "package_two"')
    own.write_text(text.replace("mine", "two").replace("my-loss", "one-loss"))
    assert width(build(own).student) == 4


def test_a_module_with_the_content_of_a_file_that_is_loaded(own, monkeypatch):
    monkeypatch.syspath_prepend(str(own.parent))
    Recipe.load(own)
    copy = own.parent / "the_same_nets.py"
    copy.write_text(NET)
    own.write_text(own.read_text().replace("nets.py", "the_same_nets"))
    assert Recipe.load(own).plugin_sources()[-1] == copy
    assert width(build(own).student) == 4


def test_a_part_that_no_plugin_registers_says_how_it_is_found(tiny):
    with pytest.raises(
        UserError, match=r"unknown architecture 'qqq'; known: .*; if it is your own, list the file that"
    ):
        Recipe.from_tables({"student": {"architecture": "qqq"}})
    with pytest.raises(UserError, match=r"did you mean 'vgg9'\?.*[0-9]$"):
        Recipe.from_tables({"student": {"architecture": "vgg99"}})


def test_another_part_of_the_same_name_is_refused(own):
    Recipe.load(own)
    other = own.parent / "other.py"
    other.write_text(NET.replace("def mine", "def another"))
    with pytest.raises(UserError, match=r"'mine' is already registered \(.*nets.py:\d+\); choose another name"):
        Recipe.load(own, ['plugins=["tiny_clothes.py","other.py"]'])
    assert "nets.py" in architectures["mine"].where
    assert "my-loss" in losses


LOADED = '''
import torch
from pathlib import Path
from lasnn import teachers
from lasnn.network.staged import StagedView


class Net(nn.Module):
    """Its head stands under two names."""

    def __init__(self, channels, classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(channels, 4, 3, padding=1), nn.Linear(4, classes)
        self.classifier = self.fc


@teachers.register("loaded")
def loaded(*, in_channels: int, num_classes: int) -> StagedView:
    """It loads its own weights, and freezes them."""
    net = Net(in_channels, num_classes)
    net.load_state_dict(torch.load("loaded.pt", weights_only=True))
    net.requires_grad_(False)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.classifier)
    return StagedView(net, {"stage1": net.conv}, head)


@architectures.register("aliased")
def aliased(act, *, in_channels: int, num_classes: int) -> Staged:
    """One convolution in two stages, a head under two names."""
    shared, head = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head.fc = nn.Linear(4, num_classes)
    stem = nn.Sequential(nn.Conv2d(in_channels, 4, 3, 4, bias=False), act(4))
    stem.again = nn.Sequential()
    stem.again.shared = shared
    stages = {"stage1": nn.Sequential(shared, act(4)), "stage2": nn.Sequential(shared, act(4))}
    return Staged(stages, head, stem)
'''


def test_a_teacher_that_loads_itself_and_a_student_of_shared_layers(own, recwarn):
    """The first is used as it is, neither trained nor cached; the second is trained, saved, resumed, loaded."""
    (own.parent / "nets.py").write_text(NET + LOADED)
    weights = {"conv.weight": torch.rand(4, 1, 3, 3), "conv.bias": torch.rand(4)}
    weights |= {
        f"{name}.{kind}": torch.ones(10, 4)[(...,) if kind == "weight" else (..., 0)]
        for name in ("fc", "classifier")
        for kind in ("weight", "bias")
    }
    torch.save(weights, "loaded.pt")
    text = own.read_text().replace('architecture = "mine"', 'architecture = "aliased"')
    own.write_text(text + '[[losses]]\nname = "logit-kd"\n[teacher]\narchitecture = "loaded"\nepochs = 1\n')
    run = distill(own, "a")
    assert not [warning for warning in recwarn if "no-op" in str(warning.message)]
    assert run.read_json("teacher.json")["seconds"] == 0.0
    assert {line["phase"] for line in run.metrics()} == {"student"}
    assert not (own.parent / "runs" / "teachers").exists()
    first = load_run("a")
    assert all(torch.equal(value, weights[name]) for name, value in first.teacher.network.state_dict().items())
    network = first.student.network
    assert network.stage1[0].weight is network.stage2[0].weight
    (run / "summary.json").unlink()
    distill(run / "recipe.toml", "a", resume=True)
    again = load_run("a").student.network.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in network.state_dict().items())
