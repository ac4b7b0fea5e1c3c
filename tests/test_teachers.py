"""Teachers that come from elsewhere: torchvision's networks, whose files load as they are."""

import copy

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from common import TINY
from lasnn import load_run, teachers
from lasnn.errors import UserError
from lasnn.network.staged import StagedView
from lasnn.network.teacher import Teacher
from lasnn.plan import make_plan
from lasnn.probe import probe
from lasnn.recipe.schema import Recipe

MODELS = teachers["torchvision"].options["model"].annotation.__args__


def make(model, in_channels=3, num_classes=10, **options):
    torch.manual_seed(0)
    return teachers.build("torchvision", in_channels=in_channels, num_classes=num_classes, model=model, **options)


@pytest.mark.parametrize("model", MODELS)
def test_keys_and_shapes_are_those_of_torchvision(model):
    with torch.device("meta"):
        ours, theirs = make(model, num_classes=1000), torchvision.models.get_model(model, weights=None)
    found, wanted = ({name: value.shape for name, value in net.state_dict().items()} for net in (ours, theirs))
    assert found == wanted
    assert list(found) == list(wanted)
    with torch.device("meta"):
        shapes = probe(make(model), (3, 64, 64)).shapes
    assert list(shapes) == [f"stage{number}" for number in range(1, len(shapes) + 1)]
    assert len(shapes) == (5 if model.startswith("vgg") else 4)


@pytest.mark.parametrize("model", ["resnet18", "resnet50", "vgg11", "vgg11_bn"])
def test_logits_and_taps_are_those_of_torchvision(model):
    torch.manual_seed(1)
    theirs = torchvision.models.get_model(model, weights=None, num_classes=10).eval()
    ours = make(model).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 64, 64)
    logits, features = ours(images[None], taps=ours.stage_names)
    torch.testing.assert_close(logits[0], theirs(images))
    if model.startswith("resnet"):
        seen = {}
        theirs.layer3.register_forward_hook(lambda _, __, output: seen.update(output=output))
        theirs(images)
        torch.testing.assert_close(features["stage3"][0], seen["output"])
    else:
        pools = [index for index, layer in enumerate(theirs.features) if isinstance(layer, torch.nn.MaxPool2d)]
        torch.testing.assert_close(features["stage3"][0], theirs.features[: pools[2]](images))


def test_moves_copies_and_learns_as_one_network():
    teacher = Teacher(make("resnet18"), (0.5,) * 3, (0.2,) * 3).double()
    twin = copy.deepcopy(teacher)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    teacher.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in teacher.parameters())
    assert teacher.network.bn1.num_batches_tracked == 1
    assert twin.network.bn1.num_batches_tracked == 0, "the copy's stages are its own"
    with torch.no_grad():
        twin.network.fc.weight.zero_()
        twin.network.fc.bias.fill_(3)
    assert (twin.eval()(images) == 3).all()


def test_small_stem_grey_images_and_size():
    with torch.device("meta"):
        assert probe(make("resnet18", stem="small"), (3, 32, 32)).shapes["stage1"] == (64, 32, 32)
        assert probe(make("resnet18"), (3, 32, 32)).shapes["stage1"] == (64, 8, 8)
        assert probe(make("resnet18", resize=224), (3, 32, 32)).shapes["stage1"] == (64, 56, 56)
        assert make("resnet18", in_channels=1).conv1.in_channels == 3
        assert make("resnet18", in_channels=1, repeat_grey=False).conv1.in_channels == 1
        assert make("vgg11", in_channels=2).features[0].in_channels == 2
    grey = torch.rand(2, 1, 32, 32)
    network = make("resnet18", in_channels=1).eval()
    repeated, _ = make("resnet18").eval()(grey.expand(-1, 3, -1, -1)[None])
    torch.testing.assert_close(network(grey[None])[0], repeated)
    # Three means for one channel: each copy of the channel gets its own.
    assert Teacher(network, (0.4, 0.5, 0.6), (0.2,) * 3)(grey).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vgg11", "stem": "small"}, "stem = \"small\" is a ResNet's; 'vgg11' has none"),
        ({"model": "resnet18", "mean": [0.5] * 3}, "mean and std go together"),
        ({"model": "resnet18", "mean": [0.5] * 2, "std": [0.5] * 3}, "mean has 2 values; the images have 3 channels"),
    ],
)
def test_options_that_do_not_suit(options, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        make(**options)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "plain.toml"
    teacher = 'architecture = "torchvision"\nmodel = "resnet18"\nstem = "small"'
    text = TINY.replace("tiny-clothes", "fashion-mnist-mini")
    path.write_text(text.replace('architecture = "vgg5"\nwidth = 4\nepochs = 2', teacher, 1))
    return path


@pytest.mark.parametrize("form", ["safetensors", "pth", "old", "training", "parallel"])
def test_a_users_file_loads_in_its_usual_forms(recipe, tmp_path, form):
    state = torchvision.models.resnet18(num_classes=10).state_dict()
    state["conv1.weight"] = torch.randn(64, 3, 3, 3)
    path = tmp_path / ("t.safetensors" if form == "safetensors" else "t.pth")
    if form == "safetensors":
        save_file(state, path)
    elif form == "old":
        # As PyTorch wrote them before 0.4.1 and 1.6: without the counters, not a zip file.
        kept = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        torch.save(kept, path, _use_new_zipfile_serialization=False)
    elif form == "training":
        torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, path)
    else:
        torch.save({f"module.{name}" if form == "parallel" else name: value for name, value in state.items()}, path)
    plan = make_plan(Recipe.load(recipe, [f"teacher.checkpoint={path}"]))
    assert plan.anns["teacher"].checkpoint == path
    assert [pair.teacher for pair in plan.pairs] == ["stage1", "stage2", "stage3"]
    from lasnn.run import load_into

    network = make("resnet18", in_channels=1, stem="small")
    load_into(network, path, {})
    torch.testing.assert_close(network.conv1.weight.detach(), state["conv1.weight"])


def checked(recipe, *overrides):
    with pytest.raises(UserError) as caught:
        make_plan(Recipe.load(recipe, overrides))
    return caught.value.problems


def test_files_that_cannot_teach(recipe, tmp_path):
    path = tmp_path / "t.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    [line] = checked(recipe, f"teacher.checkpoint={path}", "teacher.stem=imagenet")
    assert f"{path} was trained for 1000 classes; the data set has 10: train its last layer (fc) anew with 10" in line
    torch.save(torchvision.models.resnet34(num_classes=10).state_dict(), path)
    [line] = checked(recipe, f"teacher.checkpoint={path}", "teacher.stem=imagenet")
    assert "unexpected keys: 'layer1.2.conv1.weight', " in line
    torch.save(torchvision.models.resnet18(num_classes=10), path)
    [line] = checked(recipe, f"teacher.checkpoint={path}")
    assert "holds more than weights (torchvision.models.resnet.ResNet), or is damaged; save the weights alone" in line
    torch.save({"epoch": 1, "lr": 0.1}, path)
    [line] = checked(recipe, f"teacher.checkpoint={path}")
    assert "holds no state_dict (its keys: epoch, lr)" in line
    path.write_bytes(path.read_bytes()[:200])
    [line] = checked(recipe, f"teacher.checkpoint={path}")
    assert f"teacher.checkpoint: {path} " in line


def test_recipes_that_cannot_work(recipe):
    [line] = checked(recipe, "teacher.model=resnet19")
    assert "teacher.model: 'resnet19' is not valid; it takes one of \"resnet18\"" in line
    [line] = checked(recipe, "teacher.activation=qcfs")
    assert "teacher.activation: 'torchvision' brings activations of its own" in line
    [line] = checked(recipe, "student.architecture=torchvision")
    assert "unknown architecture 'torchvision'" in line
    # Five max-pools leave nothing of 28 pixels.
    [line] = checked(recipe, "teacher.model=vgg11", "teacher.stem=imagenet")
    assert "cannot run on 28 x 28 images (head: " in line
    make_plan(Recipe.load(recipe, ["teacher.model=vgg11", "teacher.stem=imagenet", "teacher.resize=64"]))


def test_a_plugins_own_network_teaches():
    @teachers.register("mine")
    def mine(*, in_channels: int, num_classes: int):
        """Two layers of one's own."""
        network = torch.nn.Sequential()
        network.body = torch.nn.Conv2d(in_channels, 4, 3)
        network.top = torch.nn.Linear(4, num_classes)
        head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), network.top)
        return StagedView(network, {"stage1": network.body}, head, mean=[0.1], std=[0.5])

    with torch.device("meta"):
        network = teachers.build("mine", in_channels=1, num_classes=3)
    assert set(network.state_dict()) == {"body.weight", "body.bias", "top.weight", "top.bias"}
    assert network.normalisation == ((0.1,), (0.5,))
    assert probe(network, (1, 8, 8)).shapes == {"stage1": (4, 6, 6)}


def test_distils_from_a_users_torchvision_file(tiny, tmp_path, lasnn):
    network = torchvision.models.resnet18(num_classes=10)
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    teacher = 'architecture = "torchvision"\nmodel = "resnet18"\ncheckpoint = "mine.pth"\nmean = [0.3]\nstd = [0.3]'
    tiny.write_text(tiny.read_text().replace('architecture = "vgg5"\nwidth = 4\nepochs = 2', teacher, 1))
    objective = (
        'losses=[{name="cross-entropy",readout="step"},{name="attention"},{name="ensemble-kd"},{name="entropy"}]'
    )
    augment = 'data.augment=["flip", {name="cutout", size=8}, "trivialaugment", "random-erasing", "mixup", "cutmix"]'
    lasnn("distill", tiny, "--set", "distill.epochs=1", "--set", objective, "--set", augment, "--out", "run")
    run = load_run(tmp_path / "run")
    assert 0 <= run.summary["teacher_accuracy"] <= 1
    torch.testing.assert_close(run.teacher.network.fc.weight, network.fc.weight)
    assert run.teacher.mean.item() == pytest.approx(0.3)
    assert lasnn.json("evaluate", "run")["teacher_energy_uj"] > 0
