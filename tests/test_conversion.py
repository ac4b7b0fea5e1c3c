"""Conversion: exact where arithmetic is exact, converging to the ANN elsewhere, and clear about what it cannot take."""

import math
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_network import MOST, make
from torch import nn

from common import TINY
from lasnn import Staged
from lasnn.activation import QCFS
from lasnn.data import Batches, Images
from lasnn.errors import MachineError, UserError
from lasnn.evaluation import conversion
from lasnn.evaluation.conversion import BalancedIF, Converted, Distribution, check, convert, measured_thresholds
from lasnn.evaluation.evaluate import conversions, evaluate, first_reaching, load_run
from lasnn.evaluation.few_steps import (
    balanced_thresholds,
    iterated_thresholds,
    nearest_thresholds,
    normal_currents,
)
from lasnn.evaluation.iso_accuracy import convert_until, furthest, match, sentence
from lasnn.evaluation.measure import measure
from lasnn.evaluation.operations import OperationCounter
from lasnn.factory import make_teacher
from lasnn.network.staged import build
from lasnn.network.teacher import Teacher, without_activations
from lasnn.network.units import Add, NormSpike, ann_units, snn_units
from lasnn.plan import make_plan
from lasnn.recipe.schema import Recipe
from lasnn.registry import teachers
from lasnn.training.teacher import teacher_key


def images(count=12, channels=3, size=32):
    torch.manual_seed(1)
    pixels = torch.randint(256, (count, channels, size, size), dtype=torch.uint8)
    return Images(pixels, torch.randint(7, (count,)))


def teacher_of(network, channels=3):
    return Teacher(network, (0.5,) * channels, (0.25,) * channels).eval()


def trained(name, activation="relu", **options):
    """A small ANN with statistics that are not those of a fresh batch norm."""
    network = make(name, ann_units(activation, **options))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = None
    network.train()
    with torch.no_grad():
        network((images().pixels.float()[None] / 255 - 0.5) / 0.25)
    return teacher_of(network)


def one_layer(activation="relu", **options):
    """A unit without weights: its input is the image, its output the logits."""
    stages = {"stage1": nn.Sequential(ann_units(activation, **options)())}
    return Teacher(Staged(stages, nn.Flatten()), (0.0,), (1.0,)).eval()


# Dyadic inputs, below 0, on and between the levels, and beyond the threshold.
CURRENT = torch.arange(-16, 49).float().view(1, 1, 1, -1) / 32


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_the_rate_of_a_constant_input_is_the_clipped_relu_in_steps(start, threshold):
    neuron = BalancedIF(threshold, start)
    for timesteps in (1, 3, 8, 32):
        emitted, _ = neuron(CURRENT, timesteps=timesteps)
        count = torch.floor((timesteps * CURRENT[0] + start * threshold) / threshold).clamp(0, timesteps)
        assert torch.equal(emitted.sum(0), threshold * count)
    # At the last T every level is reached: without a start it is the clipped ReLU itself.
    if start == 0:
        assert torch.equal(emitted.mean(0), CURRENT[0].clamp(0, threshold))


@pytest.mark.parametrize("levels", [1, 4, 8])
@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_qcfs_is_the_converted_layer_at_t_equal_to_its_levels(levels, threshold):
    teacher = one_layer("qcfs", levels=levels, threshold=threshold)
    wanted = teacher.network(CURRENT[None])[0][0]
    steps = torch.floor(CURRENT * levels / threshold + 0.5) / levels
    assert torch.equal(wanted, threshold * steps.clamp(0, 1).flatten(1))
    pixels = Images(torch.zeros(1, 1, 1, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
    converted = convert(teacher, "qcfs", pixels)
    logits, _ = converted.network(CURRENT[None], levels)
    assert torch.equal(logits.mean(0), wanted)


def test_the_gradients_of_qcfs():
    unit = QCFS(levels=4, threshold=2.0)
    x = torch.tensor([-0.5, 0.3, 1.1, 2.5], requires_grad=True)
    y = unit(x)
    assert y.tolist() == [0.0, 0.5, 1.0, 2.0]
    y.backward(torch.ones(4))
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    # Within the clip the output's share less the input's, beyond it the whole.
    torch.testing.assert_close(unit.threshold.grad, torch.tensor((0.5 - 0.3) / 2 + (1.0 - 1.1) / 2 + 1.0))
    assert unit(x.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [one for one in MOST if one.values != ("spikformer",)])
@pytest.mark.parametrize("method", ["maxnorm", "percentile", "qcfs"])
def test_every_architecture_converts(name, method):
    teacher = trained(name, *(["qcfs"] if method == "qcfs" else []))
    converted = convert(teacher, method, images(), timesteps=3)
    batch = images().pixels[:2].float() / 255
    logits, features = converted.steps(batch, ["stage1"])
    assert logits.shape == (3, 2, 7)
    assert logits.isfinite().all()
    assert features["stage1"].shape[:2] == (3, 2)
    if "-" not in name:
        *_, last = (unit for unit in converted.network.stage1.modules() if isinstance(unit, NormSpike))
        assert set(features["stage1"].unique().tolist()) <= {0.0, last.neuron.amplitude}
    assert set(converted.state_dict()) == {f"network.{key}" for key in without_activations(teacher.network)}
    assert not any(parameter.requires_grad for parameter in converted.parameters())
    torch.testing.assert_close(converted(batch), logits.mean(0))


@pytest.mark.parametrize("name", ["vgg5", "resnet20", "resnet20-sew", "resnet20-membrane"])
def test_the_converted_network_comes_to_the_ann(name):
    """With the largest activations of these very images nothing is clipped: the error falls as 1/T."""
    teacher, data = trained(name), images(6)
    converted = convert(teacher, "maxnorm", data, timesteps=1024)
    batch = data.pixels.float() / 255
    with torch.no_grad():
        wanted = teacher(batch)
    after = converted.steps(batch)[0].cumsum(0)
    errors = {t: float((after[t - 1] / t - wanted).abs().mean() / wanted.std()) for t in (16, 64, 256, 1024)}
    assert errors[1024] < 0.06, errors
    assert errors[1024] < errors[256] < errors[64] < errors[16]
    assert torch.equal((after[-1]).argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("name", ["vgg5", "resnet19", "resnet20-sew"])
def test_a_run_in_pieces_is_the_run_spike_for_spike(name, monkeypatch):
    converted = convert(trained(name), "percentile", images(), timesteps=13)
    batch = images().pixels[:3].float() / 255
    taps, found = ["stage1", "stage3"], []
    for chunk in (1, 4, 13, 100):
        monkeypatch.setattr("lasnn.network.student.TIME_CHUNK", chunk)
        with OperationCounter(converted, 13) as counter:
            _, features = converted.steps(batch, taps)
        found.append((features, counter.images, counter.after(13), counter.after(5)))
        # Nothing is left of one run in the next.
        whole, _ = converted.network(converted.encoder(batch, 1), 13)
        assert whole.shape[0] == 13
    for features, *counts in found[1:]:
        assert all(torch.equal(features[tap], found[0][0][tap]) for tap in taps)
        assert counts[0] == 3
        for ours, first in zip(counts[1:], found[0][2:], strict=True):
            assert ours["firing_rate_by_layer"] == pytest.approx(first["firing_rate_by_layer"])
            assert ours["operations"] == pytest.approx(first["operations"])
    assert float(features["stage3"].count_nonzero()) > 0


def test_spikes_count_as_one_whatever_they_carry():
    torch.manual_seed(0)
    act = ann_units()
    stages = {"stage1": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), act(4)), "stage2": nn.Sequential(nn.AvgPool2d(2))}
    stages["stage3"] = nn.Sequential(nn.Conv2d(4, 2, 3, padding=1), act(2))
    network = Staged(stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)))
    converted = convert(teacher_of(network), "maxnorm", images(size=8), timesteps=20)
    with OperationCounter(converted, 20) as counter:
        _, features = converted.steps(images(size=8).pixels.float() / 255, ["stage1", "stage2", "stage3"])
    first, third = (features[name].ne(0).float() for name in ("stage1", "stage3"))
    result = counter.after(20)
    rates = {"stage1.1": float(first.mean()), "stage3.1": float(third.mean())}
    assert result["firing_rate_by_layer"] == pytest.approx(rates)
    pooled = F.avg_pool2d(first.flatten(0, 1), 2) * 4
    additions = F.conv2d(pooled, torch.ones(2, 4, 3, 3), padding=1).sum() + third.sum() * 3
    assert result["operations"]["additions"] * 12 == pytest.approx(float(additions), rel=1e-5)
    assert result["operations"]["multiply_additions"] == 8 * 8 * 4 * 27


class Summed(nn.Module):
    """Two units on one current, whose spikes are added."""

    def __init__(self, act, channels):
        super().__init__()
        self.first, self.second, self.add = act(channels), act(channels), Add()

    def forward(self, x):
        return self.add(self.first(x), self.second(x))


def test_a_sum_of_spikes_counts_each_as_one_whatever_it_carries():
    torch.manual_seed(0)
    act = ann_units()
    summed = Summed(act, 4)
    nn.init.constant_(summed.second.norm.weight, 0.5)
    stages = {"stage1": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), summed), "stage2": nn.AvgPool2d(2)}
    stages["stage3"] = nn.Sequential(nn.Conv2d(4, 2, 3, padding=1), act(2))
    network = Staged(stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)))
    converted = convert(teacher_of(network), "maxnorm", images(size=8), timesteps=20)
    spikes = []
    for unit in (converted.network.stage1[1].first, converted.network.stage1[1].second):
        unit.register_forward_hook(lambda _, __, output: spikes.append(output.ne(0).float()))
    with OperationCounter(converted, 20) as counter:
        _, features = converted.steps(images(size=8).pixels.float() / 255, ["stage3"])
    assert len(features["stage3"]) == 20
    # A run of several time chunks calls each of the two once in each.
    one, two = (torch.cat(spikes[number::2]) for number in (0, 1))
    additions = F.conv2d(F.avg_pool2d(one + two, 2) * 4, torch.ones(2, 4, 3, 3), padding=1).sum()
    additions += features["stage3"].ne(0).sum() * 3
    assert counter.after(20)["operations"]["additions"] * 12 == pytest.approx(float(additions), rel=1e-5)


def test_thresholds_are_the_largest_activation_and_the_percentile():
    teacher = one_layer()
    pixels = torch.zeros(4, 1, 50, 100, dtype=torch.uint8)
    pixels[1] = torch.arange(5000).view(50, 100) % 200
    pixels[3, 0, 0, 0] = 255
    data = Images(pixels, torch.zeros(4, dtype=torch.long))
    positive = (pixels[pixels > 0].float() / 255).sort().values
    for batch_size in (1, 3, 4):
        assert measured_thresholds(teacher, data, 100, batch_size=batch_size) == {"stage1.0": 1.0}
        [found] = measured_thresholds(teacher, data, 90.0, batch_size=batch_size).values()
        wanted = float(positive[math.ceil(0.9 * len(positive)) - 1])
        assert wanted < found <= wanted + 2**-13
    described = convert(teacher, "percentile", data, percentile=90.0).description
    assert described == {
        "method": "percentile",
        "membrane_start": 0.0,
        "percentile": 90.0,
        "calibration_images": 4,
        "thresholds": {"stage1.0": found},
    }


def test_a_distribution_does_not_depend_on_the_order():
    torch.manual_seed(0)
    parts = [torch.randn(5000) * 10**power for power in (-2, 1, 0, 2, -1)]
    seen = []
    for order in (parts, parts[::-1]):
        distribution = Distribution(2**14)
        for part in order:
            distribution.add(part)
        seen.append([distribution.percentile(percent) for percent in (10, 50, 99, 99.9, 100)])
    values = torch.cat(parts)
    positive = values[values > 0].sort().values
    for percent, found in zip((10, 50, 99, 99.9, 100), seen[1], strict=True):
        true = float(positive[math.ceil(percent / 100 * len(positive)) - 1])
        assert 0 <= found - true <= 2**-13 * float(values.max())
    assert seen[0] == seen[1]
    assert seen[0][-1] == float(values.max())


def test_a_value_that_is_no_number_is_not_forgotten():
    for bins in (1, 2**14):
        distribution = Distribution(bins)
        for value in (1.0, math.nan, 2.0):
            distribution.add(torch.tensor([value]))
        assert math.isnan(distribution.largest)


def test_silent_and_broken_layers():
    data = images(2, 1, 4)
    for method in ("maxnorm", "percentile"):
        dark = Images(torch.zeros_like(data.pixels), data.labels)
        assert convert(one_layer(), method, dark).description["thresholds"] == {"stage1.0": 1.0}
        broken = one_layer()
        broken.mean.fill_(math.nan)
        with pytest.raises(MachineError, match="activations in stage1.0 are not finite"):
            convert(broken, method, data)
    with pytest.raises(MachineError, match=r"stage1.0 has learnt the threshold -0\.5"):
        convert(one_layer("qcfs", threshold=-0.5), "qcfs", data)


class Sneaky(nn.Module):
    def forward(self, x):
        return F.max_pool2d(torch.tanh(x), 2)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.gate * 2 + x * x


@pytest.mark.parametrize(
    ("layer", "messages"),
    [
        (nn.MaxPool2d(2), ["stage1.2 (MaxPool2d) cannot be converted: max_pool2d_with_indices is not linear"]),
        (nn.Sigmoid(), ["stage1.2 (Sigmoid) cannot be converted: sigmoid"]),
        (nn.ReLU(inplace=True), ["stage1.2 (ReLU) cannot be converted: relu"]),
        (Sneaky(), ["stage1.2 (Sneaky) cannot be converted: tanh", "stage1.2 (Sneaky) cannot be converted: max_pool"]),
        (Gated(), ["stage1.2 (Gated) cannot be converted: mul is not linear"]),
    ],
)
def test_what_cannot_be_converted_is_named(layer, messages):
    act = ann_units()
    stages = {"stage1": nn.Sequential(nn.Conv2d(3, 4, 1), act(4), layer, nn.Conv2d(4, 4, 1), nn.Dropout(), act(4))}
    teacher = teacher_of(Staged(stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))))
    with pytest.raises(UserError) as caught:
        convert(teacher, "maxnorm", images())
    assert len(caught.value.problems) == len(messages)
    for problem, message in zip(caught.value.problems, messages, strict=True):
        assert problem.startswith(message)
        assert ("average pools (teacher.pool" in problem) == ("pool" in message)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


class Scaled(nn.Module):
    """By channel, in a way that is given."""

    def __init__(self, scaled):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(4))
        self.register_buffer("constant", torch.rand(4, 1, 1))
        self.scaled = scaled

    def forward(self, x):
        return self.scaled(self, x)


@pytest.mark.parametrize(
    "scaled",
    [
        lambda self, x: x * self.gamma.view(1, -1, 1, 1),
        lambda self, x: self.gamma[:, None, None].abs() * x,
        lambda self, x: x * self.constant / self.constant.sum(),
    ],
)
def test_a_product_with_what_no_image_changes_is_linear(scaled):
    """Layer scale, as it is usually written, and a buffer."""
    stages = {"stage1": nn.Sequential(nn.Conv2d(3, 4, 1), ann_units()(4), Scaled(scaled), nn.Conv2d(4, 4, 1))}
    teacher = teacher_of(Staged(stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))))
    convert(teacher, "maxnorm", images())


class Again(nn.Module):
    """One unit at two places."""

    def __init__(self, unit, layer):
        super().__init__()
        self.unit, self.layer = unit, layer

    def forward(self, x):
        return self.unit(self.layer(self.unit(x)))


@pytest.mark.parametrize(
    ("make_stage", "said"),
    [
        (
            lambda unit, layer: Again(unit, layer),
            "stage1.1.unit cannot be converted: it runs 2 times in a pass; a",
        ),
        (
            lambda unit, layer: nn.Sequential(unit, layer, unit),
            "it is the same unit as stage1.1.0; a spiking",
        ),
    ],
    ids=["called twice", "under two names"],
)
def test_a_unit_at_two_places_cannot_be_converted(make_stage, said):
    stage = make_stage(ann_units()(), nn.Conv2d(4, 4, 1))
    stages = {"stage1": nn.Sequential(nn.Conv2d(3, 4, 1), stage)}
    teacher = teacher_of(Staged(stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))))
    with pytest.raises(UserError, match=said) as caught:
        convert(teacher, "maxnorm", images())
    assert all(problem.endswith("call act() once for each place") for problem in caught.value.problems)


def test_attention_cannot_be_converted():
    with pytest.raises(UserError) as caught:
        convert(trained("spikformer"), "maxnorm", images())
    first, *_ = caught.value.problems
    assert len(caught.value.problems) == 4
    assert first.startswith("stage2.3.0.inner.product (Product) cannot be converted: bmm is not linear; between the")


def test_other_networks_activations_and_options_are_refused():
    with pytest.raises(UserError, match=r"cannot be converted: it is not made of the units .* \(Linear\)"):
        check(teacher_of(nn.Linear(3, 2)), "maxnorm", (3, 8, 8))
    borrowed = teachers.build("torchvision", in_channels=3, num_classes=7, model="resnet18")
    with pytest.raises(UserError, match=r"\(relu \(ReLU\), maxpool \(MaxPool2d\)"):
        check(teacher_of(borrowed), "maxnorm", (3, 32, 32))
    network = trained("vgg5").network
    network.stage1[1].activation = nn.GELU()
    with pytest.raises(UserError, match="stage1.1 cannot be converted: it ends in GELU"):
        check(teacher_of(network), "maxnorm", (3, 32, 32))
    for options, message in (
        ({"method": "maxnrm"}, "did you mean 'maxnorm'"),
        ({"method": "percentile", "percentile": 0.0}, "percentile must be above 0 and at most 100"),
        ({"method": "qcfs"}, "teacher.activation=qcfs"),
        ({"method": "maxnorm", "membrane_start": 1.0}, "at least 0 and below 1"),
    ):
        with pytest.raises(UserError, match=message):
            check(trained("vgg5"), image=(3, 32, 32), **options)


def test_one_run_gives_every_t():
    converted, data = convert(trained("vgg5"), "maxnorm", images()), images()
    together = measure(converted, data, range(1, 21), batch_size=5, seed=0)
    for t in (1, 9, 20):
        [alone] = measure(converted, data, [t], batch_size=5, seed=0)
        for key in ("timesteps", "accuracy", "firing_rate", "energy_uj"):
            assert alone[key] == pytest.approx(together[t - 1][key])
    curve = [{"timesteps": t, "accuracy": accuracy} for t, accuracy in ((8, 0.7), (2, 0.5), (4, 0.6), (16, 0.55))]
    assert first_reaching(curve, 0.6)["timesteps"] == 4
    assert first_reaching(curve, 0.55)["timesteps"] == 4
    assert first_reaching(curve, 0.71) is None


def recipe(**teacher):
    tables = {
        "teacher": {"architecture": "vgg5", "width": 4, "epochs": 1, **teacher},
        "student": {"architecture": "vgg5", "width": 4, "init": "teacher"},
    }
    return Recipe.from_tables(tables)


def test_the_recipe_names_the_activation():
    quantised = recipe(activation="qcfs", levels=8)
    data = make_plan(quantised).data
    teacher = make_teacher(quantised, data).network
    assert {unit.activation.levels for unit in conversion.units(teacher).values()} == {8}
    student = build("vgg5", snn_units(), in_channels=1, num_classes=10, width=4)
    student.load_state_dict(without_activations(teacher))
    for given in (quantised, recipe(activation="qcfs"), recipe()):
        assert Recipe.from_tables(tomllib.loads(given.to_toml())) == given
    keys = {
        teacher_key(given, torch.device("cpu"), images(2))
        for given in (quantised, recipe(activation="qcfs"), recipe(), recipe(activation="relu"))
    }
    assert len(keys) == 3
    with pytest.raises(UserError, match=r"teacher.levels: has no effect with activation = \"relu\""):
        recipe(levels=4)
    with pytest.raises(UserError, match='takes one of "relu", "qcfs"'):
        recipe(activation="gelu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of a ReLU teacher, one of a QCFS teacher, one of a max-pooling teacher and one of none."""
    from common import TINY_DATA, Command

    folder = tmp_path_factory.mktemp("conversion")
    (folder / "tiny_clothes.py").write_text(TINY_DATA)
    (folder / "tiny.toml").write_text('plugins = ["tiny_clothes.py"]\n' + TINY)
    command = Command(folder)
    command("distill", "tiny.toml", "--out", "relu", "--set", "distill.epochs=1")
    settings = ["teacher.activation=qcfs", "student.init=teacher", "distill.epochs=1"]
    command("distill", "tiny.toml", "--out", "qcfs", *(item for text in settings for item in ("--set", text)))
    command("distill", "tiny.toml", "--out", "pool", "--set", "teacher.pool=max", "--set", "distill.epochs=1")
    command("distill", "tiny.toml", "--out", "alone", "--set", "teacher=", "--set", "distill.epochs=1")
    return command


@pytest.mark.parametrize(
    ("run", "method", "images", "start"),
    [
        ("relu", "maxnorm", 400, 0.0),
        ("relu", "percentile", 400, 0.0),
        ("qcfs", "qcfs", 0, 0.5),
        pytest.param("qcfs", "maxnorm", 400, 0.0, marks=pytest.mark.full),
    ],
)
def test_evaluate_converted(runs, run, method, images, start):
    single = runs.json("evaluate", run, "--converted", method, "--timesteps", "32")
    for key in ("accuracy", "timesteps", "firing_rate", "energy_uj", "images", "teacher_accuracy", "teacher_energy_uj"):
        assert key in single
    assert single["images"] == 120
    about = single["converted"]
    assert (about["method"], about["calibration_images"], about["membrane_start"]) == (method, images, start)
    assert list(about["thresholds"]) == list(single["firing_rate_by_layer"])
    several = runs.json("evaluate", run, "--converted", method, "--timesteps", "1,32")
    assert [result["timesteps"] for result in several["results"]] == [1, 32]
    assert several["converted"] == about
    assert several["results"][1]["accuracy"] == single["accuracy"]
    assert abs(single["accuracy"] - single["teacher_accuracy"]) < 0.15


def test_a_conversion_is_shown_with_its_thresholds(runs):
    said = runs("evaluate", "relu", "--converted", "percentile", "--timesteps", "1,2")
    shown = said.stdout
    # Before what takes time, and how it takes less.
    assert said.stderr == "teacher, converted by percentile: 120 test images, up to T = 2 (--timesteps for less)\n"
    assert "the teacher, converted by percentile" in shown
    assert "threshold" in shown
    assert "images/s" in shown


def test_thresholds_of_one_t_are_shown_with_that_t(runs):
    """Of a method that makes another conversion for each T."""
    method = "threshold-iteration"
    alone = {
        steps: runs.json("evaluate", "relu", "--converted", method, "--timesteps", steps)["converted"]
        for steps in ("1", "4")
    }
    assert alone["1"]["thresholds"] != alone["4"]["thresholds"]
    both = runs.json("evaluate", "relu", "--converted", method, "--timesteps", "1,4")
    assert [result["converted"] for result in both["results"]] == [alone["1"], alone["4"]]
    shown = runs("evaluate", "relu", "--converted", method, "--timesteps", "1,4").stdout
    for name, threshold in alone["4"]["thresholds"].items():
        [line] = [line for line in shown.splitlines() if line.startswith(f"{name} ")]
        assert line.split()[-1] == f"{threshold:.4g}"


@pytest.mark.full
def test_evaluate_converted_over_many_steps(runs):
    results = runs.json("evaluate", "relu", "--converted", "maxnorm")["results"]
    assert [result["timesteps"] for result in results] == [2**power for power in range(9)]
    fewer = runs.json("evaluate", "relu", "--converted", "maxnorm", "--timesteps", "1,64")["results"]
    assert [result["accuracy"] for result in fewer] == [results[0]["accuracy"], results[6]["accuracy"]]
    assert abs(results[-1]["accuracy"] - results[-1]["teacher_accuracy"]) < 0.03


def test_evaluate_in_python(runs, monkeypatch):
    monkeypatch.chdir(runs.folder)
    run = load_run("relu")
    results = evaluate(run, range(1, 9), converted="percentile", percentile=99.0, membrane_start=0.5)
    assert [result["timesteps"] for result in results] == list(range(1, 9))
    assert results[0]["converted"]["percentile"] == 99.0
    assert evaluate(run, 2)[0]["timesteps"] == run.student.timesteps == 2
    assert isinstance(convert(run.teacher, "maxnorm", run.data.load()[0]), Converted)


def test_a_conversion_is_followed_to_the_end_in_a_few_runs(runs, tmp_path, monkeypatch):
    """Of 40 steps: one run of 16 and one of 40, nothing measured at each T beside them, and none the second time."""
    monkeypatch.chdir(runs.folder)
    [whole] = evaluate("relu", 40, converted="maxnorm")
    ran = []
    monkeypatch.setattr("lasnn.evaluation.evaluate.speed", lambda *_, **__: pytest.fail("speed is measured"))
    monkeypatch.setattr(
        "lasnn.evaluation.evaluate.dense_operations", lambda *_, **__: pytest.fail("counted for each T")
    )
    monkeypatch.setattr("lasnn.evaluation.evaluate.measure", lambda *a, **k: ran.append(len(a[2])) or measure(*a, **k))
    for _ in range(2):
        found = convert_until(Path("relu"), "maxnorm", 1.01, 40, tmp_path / "kept.json")
        assert [result["timesteps"] for result in found["results"]] == list(range(1, 41))
        for key in ("accuracy", "firing_rate", "energy_uj"):
            assert found["results"][-1][key] == pytest.approx(whole[key])
    assert ran == [16, 40]
    matched = match("maxnorm", 2, {0: 1.01}, {0: found}, 40) | {"teacher": "the student's teacher"}
    assert "does not reach the distilled student's 1.0100 of T = 2 by T = 40: ratio > 20" in sentence(matched)
    # Another teacher in the same place is measured anew.
    found = convert_until(Path("qcfs"), "maxnorm", 0.0, 40, tmp_path / "kept.json")
    assert len(found["results"]) == ran[-1] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pool", "--converted", "maxnorm"], "stage2.0 (MaxPool2d) cannot be converted"),
        (["alone", "--converted", "maxnorm"], "alone has no teacher to convert"),
        (["relu", "--converted", "qcfs"], "teacher.activation=qcfs"),
        (["relu", "--converted", "max"], "known: light-calibration, local-balancing, maxnorm, percentile, qcfs"),
        (["relu", "--converted", "maxnorm", "--percentile", "99"], "goes with --converted percentile"),
        (["relu", "--converted", "percentile", "--percentile", "101"], "at most 100"),
        (["relu", "--membrane-start", "0.5"], "goes with --converted"),
    ],
)
def test_mistakes(runs, arguments, message):
    result = runs("evaluate", *arguments, code=2)
    assert message in result.stderr
    # That a plugin is loaded is said, whatever follows.
    assert not [line for line in result.stdout.splitlines() if not line.startswith("plugin: ")]


def test_a_teacher_of_the_other_activation_is_not_taken(runs):
    given = ["--set", "teacher.checkpoint=relu", "--set", "teacher.activation=qcfs"]
    [line] = runs("distill", "tiny.toml", "--dry-run", *given, code=2).stderr.splitlines()
    assert 'was trained with activation = "relu"' in line
    [line] = runs("distill", "tiny.toml", "--dry-run", "--set", "teacher.checkpoint=qcfs", code=2).stderr.splitlines()
    assert 'was trained with activation = "qcfs"' in line
    runs("distill", "tiny.toml", "--dry-run", "--set", "teacher.checkpoint=qcfs", *given[2:])


def normed(channels=2):
    """A unit behind a batch norm that changes nothing: its current is the image, its output the logits."""
    network = Staged({"stage1": nn.Sequential(ann_units()(channels))}, nn.Flatten())
    network.stage1[0].norm.eps = 0.0
    return Teacher(network, (0.0,) * channels, (1.0,) * channels).eval()


def test_the_threshold_iteration_comes_to_the_best_quantiser_of_a_normal_current():
    """Max (IRE Transactions on Information Theory 1960) has the quantisers of N(0, 1); for its positive half with equal
    steps from half a step on the best threshold is 1.22, 1.7, 2.15 and 2.55 at T = 1, 2, 4, 8, and goes with gamma.
    """
    found = {}
    for timesteps in (1, 2, 4, 8):
        teacher = normed()
        teacher.network.stage1[0].norm.weight.data = torch.tensor([1.0, 0.5])
        [thresholds] = iterated_thresholds(teacher, (2, 4, 4), timesteps).values()
        found[timesteps] = float(thresholds[0])
        assert float(thresholds[1]) == pytest.approx(found[timesteps] / 2, rel=1e-4)
    assert found == pytest.approx({1: 1.224, 2: 1.7, 4: 2.15, 8: 2.55}, abs=0.05)
    # At T = 1 a spike stands for the mean of what is above half of it: phi(c)/Q(c) = 2 c.
    half = torch.tensor(found[1] / 2, dtype=torch.float64)
    density = (-half.square() / 2).exp() / math.sqrt(2 * math.pi)
    assert float(density / (0.5 * torch.erfc(half / math.sqrt(2)))) == pytest.approx(found[1], rel=1e-4)


def test_a_residual_counts_in_the_threshold_iteration_without_data():
    teacher = trained("resnet20")
    found = normal_currents(teacher, (3, 32, 32))
    block = teacher.network.stage1[0]
    assert torch.equal(found["stage1.0.act1"][0], block.act1.norm.bias)
    # What the shortcut adds has a mean above 0, and a deviation of its own.
    assert (found["stage1.0.act2"][0] > block.act2.norm.bias).float().mean() > 0.9
    assert (found["stage1.0.act2"][1] > block.act2.norm.weight).float().mean() > 0.9


def test_local_balancing_adds_twice_the_mean_of_what_is_above():
    """Two batches of one image, two channels of two pixels: 0 and 102, 0 and 204; 51 and 255, 0 and 0."""
    pixels = torch.tensor([[[0, 102]], [[0, 204]], [[51, 255]], [[0, 0]]], dtype=torch.uint8).view(2, 2, 1, 2)
    data = Images(pixels, torch.zeros(2, dtype=torch.long))
    first, second = (batch for batch, _ in Batches(data, 1, seed=0, epoch=0))
    [found] = balanced_thresholds(normed(), data, batch_size=1).values()
    wanted = torch.zeros(2)
    for batch in (first, second):
        wanted = wanted + 2 * (batch[0].flatten(1) - wanted[:, None]).clamp(min=0).mean(1)
    torch.testing.assert_close(found, wanted)
    # By hand, where the brighter image comes first: 0.2 + 1.0, then nothing is above it; where second: 0.4, then + 0.6.
    assert float(found[0]) == pytest.approx(1.2 if float(first.max()) == 1.0 else 1.0)
    assert float(found[1]) == pytest.approx(0.8)
    dark = Images(torch.zeros_like(pixels), data.labels)
    assert balanced_thresholds(normed(), dark, batch_size=1)["stage1.0"].tolist() == [1.0, 1.0]


def test_light_calibration_by_hand():
    """Every image is 0.75 in one channel and 0.25 in the other. At T = 2 from rest the nearest threshold is 0.75: two
    spikes are 0.75, and 0.25 gives none. The second channel is then a quarter too low, and its shift is raised by it.
    """
    pixels = torch.empty(4, 2, 2, 2, dtype=torch.uint8)
    pixels[:, 0], pixels[:, 1] = 192, 64
    data = Images(pixels, torch.zeros(4, dtype=torch.long))
    high, low = 192 / 255, 64 / 255
    teacher = normed()
    assert nearest_thresholds(teacher, data, 2, 0.0) == {"stage1.0": pytest.approx(high)}
    converted = convert(teacher, "light-calibration", data, timesteps=2)
    assert converted.network.stage1[0].norm.bias.tolist() == pytest.approx([0.0, low], abs=1e-5)
    assert teacher.network.stage1[0].norm.bias.tolist() == [0.0, 0.0]
    assert converted.description["calibration_images"] == 4


@pytest.mark.parametrize("method", ["threshold-iteration", "local-balancing", "light-calibration"])
@pytest.mark.parametrize("name", ["vgg5", "resnet19", "resnet20-sew", "resnet20-membrane"])
def test_conversions_for_few_steps_convert_each_style(name, method):
    teacher, data = trained(name), images(6)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    converted = convert(teacher, method, data, timesteps=4)
    batch = data.pixels.float() / 255
    with OperationCounter(converted, 4) as counter:
        logits, features = converted.steps(batch, ["stage1"])
    assert logits.isfinite().all()
    assert set(converted.state_dict()) == {f"network.{key}" for key in without_activations(teacher.network)}
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    if name == "vgg5":
        # A spike counts as one, whatever it carries.
        rate = float(features["stage1"].ne(0).float().mean())
        assert counter.after(4)["firing_rate_by_layer"]["stage1.1"] == pytest.approx(rate, rel=1e-5)
    if method in conversion.OF_ONE_T:
        # Made for these steps it is nearer to the ANN than with the largest activations.
        with torch.no_grad():
            wanted = teacher(batch)
            other = convert(teacher, "maxnorm", data, timesteps=4)(batch)
        assert float((logits.mean(0) - wanted).square().mean()) < float((other - wanted).square().mean())


def test_thresholds_by_channel_are_those_of_a_layer_where_they_are_equal():
    torch.manual_seed(0)
    y, residual = torch.randn(3, 4, 5, 5), torch.rand(6, 4, 5, 5)
    norm = nn.BatchNorm2d(4).eval()
    nn.init.uniform_(norm.weight, 0.5, 2)
    one, each = BalancedIF(0.5, 0.5), BalancedIF(torch.full((4,), 0.5), 0.5)
    for run in ({"constant": True}, {"constant": True, "residual": residual}):
        found = [neuron.after_norm(y, norm, timesteps=2, **run)[0] for neuron in (one, each)]
        assert torch.equal(*found)
    current = norm(y).detach()[None]
    assert torch.equal(*(neuron(current, timesteps=2)[0] for neuron in (one, each)))
    apart = BalancedIF(torch.tensor([0.25, 0.5, 1.0, 2.0]), 0.5)
    emitted, _ = apart(current, timesteps=2)
    for channel, threshold in enumerate((0.25, 0.5, 1.0, 2.0)):
        alone, _ = BalancedIF(threshold, 0.5)(current[:, :, channel], timesteps=2)
        assert torch.equal(emitted[:, :, channel], alone)


def test_a_method_for_one_t_converts_for_each():
    data = images(6)
    made = list(conversions(trained("vgg5"), "threshold-iteration", data, [1, 4]))
    assert [(converted.timesteps, steps) for converted, steps in made] == [(1, [1]), (4, [4])]
    lowest, highest = (converted.description["thresholds"]["stage1.1"] for converted, _ in made)
    assert lowest < highest
    [(_, steps)] = conversions(trained("vgg5"), "local-balancing", data, [1, 4])
    assert steps == [1, 4]
    assert [furthest(method, 1024) for method in ("maxnorm", "threshold-iteration")] == [1024, 64]
