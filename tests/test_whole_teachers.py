"""Teachers that are called as a whole: a plugin's own network, whose modules are named in the recipe."""

import copy
import tomllib

import pytest
import torch
import torchvision
from torch import nn

from lasnn import distill, load_run, teachers
from lasnn.errors import UserError
from lasnn.network import HookedView
from lasnn.network.teacher import Teacher
from lasnn.plan import make_plan
from lasnn.probe import probe
from lasnn.recipe.schema import Recipe
from lasnn.report import report

NET = """
import torch
from torch import nn

from lasnn import teachers


class Net(nn.Module):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("unsaved", torch.zeros(1), persistent=False)
        self.early = nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])
        self.drop = nn.Dropout(0.5)
        self.shared = nn.ReLU()
        self.inplace = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(4, 6, 3, padding=1)
        self.top = nn.Linear(6, num_classes)

    def forward(self, x):
        x = self.early(self.scale * x)
        for block in self.blocks:
            x = self.shared(block(x))
        x = self.inplace(self.last(self.drop(x)))
        return self.top(x.mean((2, 3)))


@teachers.register("whole")
def whole(*, in_channels: int, num_classes: int):
    'A network that knows nothing of stages.'
    torch.manual_seed(3)
    return Net(in_channels, num_classes)
"""


def net():
    names = {}
    exec(NET, names)
    teachers.unregister("whole")
    return names["Net"](1, 10)


@pytest.fixture
def recipe(tiny):
    """The tiny recipe with the plugin's network as its teacher."""
    (tiny.parent / "whole.py").write_text(NET)
    text = tiny.read_text().replace('"tiny_clothes.py"', '"tiny_clothes.py", "whole.py"')
    stages = 'stages = { stage1 = "early", stage2 = "blocks.1", stage3 = "inplace" }'
    tiny.write_text(
        text.replace('architecture = "vgg5"\nwidth = 4\nepochs = 2', f'architecture = "whole"\n{stages}', 1)
    )
    return tiny


def checked(recipe, *overrides):
    with pytest.raises(UserError) as caught:
        make_plan(Recipe.load(recipe, overrides))
    return caught.value.problems


def test_it_is_not_trained_and_takes_no_settings_of_a_training(recipe):
    found = "\n".join(checked(recipe, "teacher.epochs=3", "teacher.lr=0.5"))
    for key in ("epochs", "lr"):
        assert (
            f"teacher.{key}: has no effect with teacher.stages: lasnn does not train such a network; load its" in found
        )
    text = Recipe.load(recipe).to_toml()
    teacher = text.partition("[teacher]")[2].partition("\n[")[0]
    assert "epochs" not in teacher


def test_outputs_are_the_modules_own_and_hooks_leave_no_trace():
    network = torchvision.models.resnet18(num_classes=10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    view = HookedView(network, {"stage1": "layer1", "late": "layer4.1"})
    images = torch.rand(2, 3, 32, 32)
    logits, features = view(images[None], taps=["late", "stage1"])
    assert torch.equal(logits[0], network(images))
    early = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    assert torch.equal(features["stage1"][0], network.layer1(early))
    assert features.keys() == {"stage1", "late"}
    assert list(view.state_dict()) == list(network.state_dict())
    assert not any(module._forward_hooks for module in network.modules())
    assert view(images[None])[1] == {}
    network.fc = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        view(images[None], taps=["stage1"])
    assert not any(module._forward_hooks for module in network.modules()), "nor after a pass that fails"


def test_it_is_frozen_and_stays_in_evaluation_mode():
    network = net()
    view = HookedView(network, {"stage1": "early"})
    images = torch.rand(1, 4, 1, 8, 8)
    wanted = view(images)[0]
    before = copy.deepcopy(network.state_dict())
    view.train()
    assert torch.equal(view(images)[0], wanted)
    assert not any(parameter.requires_grad for parameter in view.parameters())
    assert not any(module.training for module in [view, *network.modules()])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_it_moves_copies_and_loads_as_one_network():
    view = HookedView(net(), {"stage1": "early"})
    assert "unsaved" not in view.state_dict()
    twin = copy.deepcopy(view).double()
    images = torch.rand(2, 1, 8, 8)
    assert Teacher(twin, (0.5,), (0.5,)).double()(images.double()).dtype == torch.float64
    assert view(images[None])[0].dtype == torch.float32
    twin.load_state_dict({name: torch.zeros_like(value) for name, value in view.state_dict().items()})
    assert twin.network.scale.item() == 0
    assert (twin(images[None].double())[0] == 0).all()
    assert view.network.scale.item() == 1
    assert twin.to("meta").network.scale.is_meta


def test_the_modules_by_part_are_all_of_the_network():
    view = HookedView(net(), {"stage1": "early", "stage2": "blocks.1", "stage3": "last"})
    parts = view.modules_by_part()
    assert list(parts) == ["stem", "stage1", "stage2", "stage3", "head"]
    assert list(parts["stage1"]) == ["stage1.early", "stage1.early.0", "stage1.early.1", "stage1.early.2"]
    assert list(parts["stage2"]) == ["stage2.blocks", "stage2.blocks.0", "stage2.blocks.1"]
    assert next(iter(parts["stage3"])) == "stage3.blocks.2"
    assert list(parts["head"]) == ["head.top"]
    found = [module for modules in parts.values() for module in modules.values()]
    assert found == list(view.network.modules())[1:]


def test_a_recipe_names_the_modules(recipe, lasnn):
    plan = make_plan(Recipe.load(recipe))
    assert [(pair.student, pair.teacher_shape) for pair in plan.pairs] == [
        ("stage1", (4, 28, 28)),
        ("stage2", (4, 28, 28)),
        ("stage3", (6, 28, 28)),
    ]
    assert plan.anns["teacher"].frozen
    said = lasnn("distill", recipe, "--dry-run").stdout
    assert "stages   stage1 = early, stage2 = blocks.1, stage3 = inplace" in said
    again = tomllib.loads(Recipe.load(recipe).to_toml())
    assert Recipe.from_tables(again, str(recipe)) == Recipe.load(recipe)
    # As a table of its own, and from the command line.
    other = Recipe.load(recipe, ['teacher.stages={stage1="last"}'])
    assert other.teacher.stages == {"stage1": "last"}
    assert Recipe.load(recipe, ["teacher.stages.stage2=blocks.2"]).teacher.stages["stage2"] == "blocks.2"


def test_it_teaches_as_its_plugin_makes_it_and_is_read_again(recipe):
    objective = 'losses=[{name="cross-entropy"},{name="attention"}]'
    path = distill(recipe, "run", overrides=["distill.epochs=1", objective])
    run = load_run(path.path)
    assert run.teacher.network.stage_names == ("stage1", "stage2", "stage3")
    assert 0 <= run.summary["teacher_accuracy"] <= 1
    page = report(run, timesteps=[1], converted=None)
    assert page["attention_distance"].keys() == {"stage1", "stage2", "stage3"}
    assert "cannot be converted" in page["converted"]["reason"]
    # Its weights, from a file.
    weights = f"teacher.checkpoint={path / 'teacher.safetensors'}"
    assert make_plan(Recipe.load(recipe, [weights])).anns["teacher"].checkpoint


@pytest.mark.parametrize(
    ("stages", "lines"),
    [
        (
            'stage1="erly", stage2="blocks.9"',
            [
                "stages.stage1: Net has no module 'erly'; did you mean 'early'? Net has 'early', 'blocks', 'drop', ",
                "stages.stage2: Net has no module 'blocks.9'; did you mean 'blocks.2'? 'blocks' has 'blocks.0', ",
            ],
        ),
        ('stage1=""', ["stages.stage1: Net has no module ''; Net has 'early'"]),
        ('head="early"', ["stages: 'head' cannot be a stage's name; name the stages stage1, stage2, ..."]),
        ('"a:b"="early"', ["stages: 'a:b' cannot be a stage's name"]),
        ("", ["stages names no module; Net has 'early', 'blocks'"]),
        (
            'stage1="shared"',
            ["stages.stage1: 'shared' (ReLU) runs 3 times in a pass; a stage is a module that runs once"],
        ),
        (
            'stage1="blocks"',
            [
                "stages.stage1: 'blocks' (ModuleList) is not called in a pass, so that it has no output; name a module "
                "that is; 'blocks' has 'blocks.0', 'blocks.1', 'blocks.2'"
            ],
        ),
        (
            'stage1="top"',
            ["stages.stage1: 'top' (Linear) returns [2, 10] for 2 images; a stage returns a map [B, C, H, W]"],
        ),
        ('stage1="last"', ["stages.stage1: 'last' (Conv2d) has its output changed in place by what follows"]),
    ],
)
def test_modules_that_are_no_stages_are_named_before_training(recipe, stages, lines):
    problems = checked(recipe, f"teacher.stages={{{stages}}}", "distill.pairs=[]")
    assert len(problems) == len(lines)
    for problem, line in zip(problems, lines, strict=True):
        assert line in problem


def test_stages_where_they_have_no_place_and_where_they_are_missing(recipe):
    [line] = checked(recipe, "teacher.stages=")
    assert "teacher: stages: teacher 'whole' (" in line
    assert "returns a Net, whose stages are not known: name its modules, as stages" in line
    assert "Net has 'early', 'blocks'" in line
    for other in (["teacher.architecture=vgg5"], ["teacher.architecture=torchvision", "teacher.model=resnet18"]):
        [line] = checked(recipe, *other)
        assert "has stages of its own; leave teacher.stages out" in line
    with pytest.raises(UserError, match=r"teacher.stages.stage1: 5 is not valid: .*string"):
        Recipe.load(recipe, ["teacher.stages.stage1=5"])
    with pytest.raises(UserError, match=r"teacher.stages: 'early' is not valid; it takes a table \(text each\)"):
        Recipe.load(recipe, ["teacher.stages=early"])
    [line] = checked(recipe, 'teacher.stages={stage1="early"}', 'distill.pairs=["stage1:stage2"]')
    assert "unknown stage of the teacher 'stage2'" in line


def test_what_is_no_module_is_refused(recipe):
    text = (recipe.parent / "whole.py").read_text()
    (recipe.parent / "whole.py").write_text(text.replace("return Net(in_channels, num_classes)", "return 5"))
    [line] = checked(recipe)
    assert "returned a int; it returns an nn.Module or a StagedView" in line


def test_an_image_that_is_too_small_is_said():
    network = torchvision.models.vgg11(num_classes=10)
    with torch.device("meta"), pytest.raises(UserError, match=r"cannot run on 8 x 8 images \(.*size is too small"):
        probe(HookedView(network.to("meta"), {"stage1": "features.3"}), (3, 8, 8))


def test_its_stages_have_no_currents(recipe):
    """Said before anything is trained."""
    terms = 'losses=[{name="cross-entropy"},{name="attention",tap="current"}]'
    with pytest.raises(UserError, match=r"the teacher.s stage1 is of a network that act\(\) did not build"):
        make_plan(Recipe.load(recipe, [terms]))
