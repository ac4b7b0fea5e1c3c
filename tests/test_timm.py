"""timm's networks as teachers: a CNN, a transformer and a hybrid, on weights that the test makes."""

import copy

import pytest
import torch
from torch import nn

from lasnn import distill, load_run, teachers
from lasnn.errors import UserError
from lasnn.network.teacher import Teacher
from lasnn.plan import make_plan
from lasnn.probe import probe
from lasnn.recipe.schema import Recipe
from lasnn.report import report

library = pytest.importorskip("timm")
ResNet, BasicBlock = (getattr(library.models.resnet, name) for name in ("ResNet", "BasicBlock"))

# Model, size of the images in it, paths and shapes of its stages.
MODELS = {
    "resnet10t": (64, {"layer1": (64, 16, 16), "layer2": (128, 8, 8), "layer3": (256, 4, 4), "layer4": (512, 2, 2)}),
    "vit_tiny_patch16_224": (32, {f"blocks.{number}": (192, 2, 2) for number in (2, 5, 8, 11)}),
    "mobilevit_xxs": (
        64,
        {"stages.1": (24, 16, 16), "stages.2": (48, 8, 8), "stages.3": (64, 4, 4), "final_conv": (320, 2, 2)},
    ),
    "levit_128s": (64, {"stages.0": (128, 4, 4), "stages.1": (256, 2, 2), "stages.2": (384, 1, 1)}),
}


# Where timm looks for what belongs to the models of this file.
default_cfgs = library.models.generate_default_cfgs(
    {name: {"input_size": (3, 32, 32), "num_classes": 10} for name in ("no_intermediates", "ten_classes")}
)
# What the networks of ten classes were built with.
fetched = []


@library.models.register_model
def no_intermediates(pretrained=False, **options):
    return nn.Linear(3, 3)


@library.models.register_model
def ten_classes(pretrained=False, *, num_classes, in_chans, **options):
    """A network whose weights are here."""
    fetched.append(pretrained)
    network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes, in_chans=in_chans)
    if pretrained:
        nn.init.constant_(network.fc.weight, 0.25)
    return network


def make(model, in_channels=3, num_classes=10, **options):
    torch.manual_seed(0)
    return teachers.build("timm", in_channels=in_channels, num_classes=num_classes, model=model, **options)


def theirs(model, size):
    torch.manual_seed(0)
    fixed = library.get_pretrained_cfg(model).fixed_input_size
    return library.create_model(model, num_classes=10, **({"img_size": (size, size)} if fixed else {})).eval()


@pytest.mark.parametrize("model", MODELS)
def test_logits_stages_and_keys_are_those_of_timm(model):
    size, stages = MODELS[model]
    network, ours = theirs(model, size), make(model, resize=size).eval()
    assert list(ours.state_dict()) == list(network.state_dict())
    images = torch.rand(2, 3, size, size)
    ours.load_state_dict(network.state_dict())
    with torch.no_grad():
        logits, features = ours(images[None], taps=ours.stage_names)
        torch.testing.assert_close(logits[0], network(images), rtol=1e-4, atol=1e-5)
    assert list(ours.paths.values()) == list(stages)
    assert {ours.paths[name]: tuple(feature.shape[2:]) for name, feature in features.items()} == stages
    if model == "resnet10t":
        seen = {}
        network.layer3.register_forward_hook(lambda _, __, output: seen.update(output=output))
        network(images)
        torch.testing.assert_close(features["stage3"][0], seen["output"])
    with torch.device("meta"):
        assert list(probe(make(model, resize=size), (3, 28, 28), classes=10).shapes.values()) == list(stages.values())


def test_tokens_lie_where_their_patches_are():
    """The class token is left out, and a map's pixel is the patch in its place."""
    network = make("vit_tiny_patch16_224", resize=64).eval()
    _, features = network(torch.rand(1, 1, 3, 64, 64), taps=["stage1"])
    seen = {}
    network.network.blocks[2].register_forward_hook(lambda _, __, tokens: seen.update(tokens=tokens))
    torch.manual_seed(1)
    images = torch.rand(1, 1, 3, 64, 64)
    _, features = network(images, taps=["stage1"])
    patches = seen["tokens"][0, 1:]
    torch.testing.assert_close(features["stage1"][0, 0].flatten(1).T, patches)


def test_which_intermediates_are_stages():
    with torch.device("meta"):
        assert list(make("resnet10t", indices=[0, 3]).paths.values()) == ["act1", "layer3"]
        assert list(make("vit_tiny_patch16_224", indices=[11, 0]).paths.values()) == ["blocks.11", "blocks.0"]
        shapes = probe(make("resnet10t", indices=[3, 0], resize=32), (3, 32, 32)).shapes
    assert shapes == {"stage1": (256, 2, 2), "stage2": (64, 16, 16)}


def test_images_are_resized_and_normalised_as_timm_does():
    network = make("resnet10t").eval()
    config = library.data.resolve_model_data_config(network.network)
    assert network.normalisation == (config["mean"], config["std"])
    assert (
        (network.fit.size, network.fit.mode)
        == (config["input_size"][1:], config["interpolation"])
        == ((176, 176), "bicubic")
    )
    teacher, images = Teacher(network, *network.normalisation).eval(), torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    larger = nn.functional.interpolate(images, (176, 176), mode="bicubic", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), network.network((larger - mean) / std), rtol=1e-3, atol=1e-4)
        # One channel is repeated, and each copy has a mean of its own.
        grey = make("resnet10t", in_channels=1).eval()
        grey.load_state_dict(network.state_dict())
        one = images[:, :1]
        repeated = Teacher(grey, *grey.normalisation)(one)
        torch.testing.assert_close(repeated, teacher(one.expand(-1, 3, -1, -1)))
    with torch.device("meta"):
        assert make("resnet10t", mean=[0.1] * 3, std=[0.2] * 3).normalisation == ((0.1,) * 3, (0.2,) * 3)
        single = make("resnet10t", in_channels=1, repeat_grey=False)
        assert single.network.conv1[0].in_channels == 1
        # timm's are of three channels: the data set's own take their place.
        assert single.normalisation is None


def test_it_moves_copies_and_learns_as_one_network():
    teacher = Teacher(make("vit_tiny_patch16_224", resize=32), (0.5,) * 3, (0.2,) * 3)
    twin = copy.deepcopy(teacher).double()
    teacher.train()(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in twin.parameters())
    assert twin(torch.rand(2, 3, 32, 32).double()).dtype == torch.float64
    assert teacher.network.network.training
    assert not teacher.eval().network.network.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet18x"}, "unknown model 'resnet18x' of timm .*; did you mean 'resnet18', .*has all [0-9,]+$"),
        ({"model": "resnet18.a9_in1k"}, "unknown model 'resnet18.a9_in1k' .*did you mean 'resnet18.a3_in1k', "),
        ({"model": "hf-hub:timm/resnet18"}, "unknown model 'hf-hub:timm/resnet18'"),
        (
            {"model": "resnet10t", "indices": [5]},
            r"indices = \[5\]: give numbers of .*: 0 act1, 1 layer1, .* 4 layer4$",
        ),
        ({"model": "resnet10t", "indices": [1, 1]}, "each once"),
        ({"model": "resnet10t", "indices": []}, "give numbers"),
        ({"model": "resnet10t", "mean": [0.5] * 3}, "mean and std go together"),
        ({"model": "resnet10t", "mean": [0.5] * 2, "std": [0.5] * 2}, "mean has 2 values; the images have 3 channels"),
        (
            {"model": "resnet10t.c3_in1k", "pretrained": True},
            "its weights were trained for 1000 classes; the data set has 10: train its last layer anew with 10 outputs",
        ),
    ],
)
def test_options_that_do_not_suit(options, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        make(**options)


def test_a_size_that_a_network_cannot_take_is_said():
    with torch.device("meta"):
        with pytest.raises(UserError, match=r"cannot run on 28 x 28 images \(AssertionError\)$"):
            probe(make("halonet26t", resize=100), (3, 28, 28))
        with pytest.raises(UserError, match=r"'twins_svt_small' cannot be built with .*img_size = \(40, 40\): Assert"):
            make("twins_svt_small", resize=40)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with torch.device("meta"), pytest.raises(UserError) as caught:
        make("resnet10t.c3_in1k", num_classes=1000, pretrained=True)
    [line] = caught.value.problems
    assert line.startswith("pretrained = true: the weights of 'resnet10t.c3_in1k' cannot be had here (")
    assert line.endswith("fetch them where there is a network, and give their file as checkpoint")
    assert "\n" not in line


def test_weights_that_timm_fetches_are_frozen_and_a_run_is_read_without_them(tiny, tmp_path):
    teacher = 'architecture = "timm"\nmodel = "ten_classes"\npretrained = true'
    tiny.write_text(tiny.read_text().replace('architecture = "vgg5"\nwidth = 4\nepochs = 2', teacher, 1))
    plan = make_plan(Recipe.load(tiny))
    assert plan.anns["teacher"].frozen
    assert plan.summary()["teacher_steps"] == 0
    path = distill(tiny, "run", overrides=["distill.epochs=1", "distill.pairs=[]", "data.batch_size=200"])
    assert True in fetched
    fetched.clear()
    network = load_run(path.path).teacher.network.network
    assert fetched == [False]
    assert (network.fc.weight == 0.25).all()
    with torch.device("meta"):
        assert make("ten_classes", pretrained=True).network.fc.weight.is_meta


def test_a_family_without_intermediates_is_refused():
    with pytest.raises(UserError, match="Linear has no forward_intermediates in timm"):
        make("no_intermediates")


def test_without_timm_the_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match=r"'timm' is not installed here .*: pip install 'lasnn\[timm\]'"):
        make("resnet10t")


@pytest.fixture
def recipe(tiny):
    teacher = 'architecture = "timm"\nmodel = "vit_tiny_patch16_224"\nresize = 32\ncheckpoint = "mine.pth"'
    tiny.write_text(tiny.read_text().replace('architecture = "vgg5"\nwidth = 4\nepochs = 2', teacher, 1))
    return tiny


def checked(recipe, *overrides):
    with pytest.raises(UserError) as caught:
        make_plan(Recipe.load(recipe, overrides))
    return caught.value.problems


def test_a_transformer_from_a_file_teaches(recipe, tmp_path, lasnn):
    network = theirs("vit_tiny_patch16_224", 32)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "mine.pth")
    said = lasnn("distill", recipe, "--dry-run").stdout
    assert "stages   stage1 = blocks.2, stage2 = blocks.5, stage3 = blocks.8, stage4 = blocks.11" in said
    objective = 'losses=[{name="cross-entropy"},{name="attention"}]'
    path = distill(recipe, "run", overrides=["distill.epochs=1", objective, "data.batch_size=200"])
    run = load_run(path.path)
    torch.testing.assert_close(run.teacher.network.network.head.weight, network.head.weight)
    assert run.teacher.mean.flatten().tolist() == pytest.approx(list(run.teacher.network.normalisation[0]))
    page = report(run, timesteps=[1])
    assert page["attention_distance"].keys() == {"stage1", "stage2", "stage3"}
    assert "cannot be converted" in page["converted"]["reason"]
    assert "vit_tiny_patch16_224" in (path / "report.html").read_text()


def test_files_and_keys_that_do_not_fit(recipe, tmp_path):
    torch.save(library.create_model("vit_tiny_patch16_224", img_size=32).state_dict(), tmp_path / "mine.pth")
    [line] = checked(recipe)
    assert "was trained for 1000 classes; the data set has 10: train its last layer (head) anew with 10" in line
    torch.save(theirs("resnet10t", 64).state_dict(), tmp_path / "mine.pth")
    [line] = checked(recipe)
    assert "missing keys: 'cls_token', " in line
    [line] = checked(recipe, "teacher.model=resnet10")
    assert "teacher: unknown model 'resnet10' of timm" in line
    with pytest.raises(UserError, match=r"teacher.pretrained: brings weights of its own, beside teacher.checkpoint"):
        Recipe.load(recipe, ["teacher.pretrained=true"])
    with pytest.raises(UserError, match=r"teacher.model: missing; 'timm' needs it \(text\)"):
        Recipe.load(recipe, ["teacher.model="])
    with pytest.raises(UserError, match=r"student.architecture: unknown architecture 'timm'"):
        Recipe.load(recipe, ["student.architecture=timm"])
