"""Where a student's weights start: [start], student.init, and the balance of a converted start."""

import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from test_distillation import Notes, StopAt, digest, without_times
from test_plan import plan, problems
from torch import nn

from lasnn import Recipe, distill, load_run
from lasnn.architecture import resnet
from lasnn.data import Images
from lasnn.errors import UserError
from lasnn.evaluation.balance import Response, best_scales, measure_statistics, staircase, staircase_of
from lasnn.network.scales import NORMS, Scales, fold
from lasnn.network.staged import build
from lasnn.network.student import Student
from lasnn.network.units import NormActivate, NormSpike, ann_units, snn_units
from lasnn.neuron import LIF
from lasnn.registry import encoders
from lasnn.run import status
from lasnn.training.build import build as build_parts
from lasnn.training.stop import Stopped
from lasnn.weights import load_state, load_weights


@pytest.fixture
def tiny(tiny):
    """The tests' recipe, which names no start."""
    tiny.write_text(tiny.read_text().replace('init = "random"\n', ""))
    return tiny


# A network that takes no image alone, which is how a conversion follows it.
BATCHES = """
from lasnn import architectures
from lasnn.architecture.vgg import vgg5

@architectures.register("batches")
def batches(act, *, in_channels, num_classes, width=64):
    network = vgg5(act, in_channels=in_channels, num_classes=num_classes, width=width)
    network.stage1.register_forward_pre_hook(check)
    return network

def check(module, inputs):
    if len(inputs[0]) == 1:
        raise ValueError("no batch")
"""
# A teacher of another family than the student, and the student's twin.
TWIN = ["teacher.architecture=vgg9", "teacher.epochs=1", "start.architecture=vgg5", "start.width=4", "start.epochs=2"]
SHORT = [*TWIN, "distill.epochs=1"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["student.init=techer"], "student.init: unknown start 'techer'; did you mean 'teacher'?"),
        (["student.init=''"], "student.init: is empty; it takes auto, random, teacher, copied, converted, or a path"),
        (["student.init=teacher", *TWIN], 'start: has no effect with student.init = "teacher"'),
        (["student.init=./a.pth", *TWIN], 'start: has no effect with student.init = "./a.pth"'),
        (["student.init=copied", "teacher="], "student.init: there is no [start] and no [teacher] to start from"),
        (["student.init=teacher", "teacher=", *TWIN[2:]], "student.init: there is no [teacher] to start from"),
        (["student.init=random", "student.calibration=none"], "student.calibration: has no effect with student.init"),
        ([*TWIN, "start.architecture=torchvision"], "start.architecture: unknown architecture 'torchvision'"),
        ([*TWIN, "start.checkpoint=x"], "start.epochs: has no effect with start.checkpoint"),
        ([*TWIN, "start.levels=8"], 'start.levels: has no effect with activation = "relu"'),
        ([*TWIN, "start.warmup_epochs=3"], "start.warmup_epochs: 3 is longer than the 2 epochs"),
        ([*TWIN, "start.widht=3"], "start.widht: unknown key 'widht' in [start] (vgg5); did you mean 'width'?"),
        (["student.init=./none.pth"], "student.init: no file none.pth; give a file of torch.save or safetensors"),
        ([*TWIN, "start.checkpoint=none.pth", "start.epochs="], "start.checkpoint: no file none.pth"),
        (
            [*TWIN, "start.width=8"],
            "start: the weights of [start] do not fit the student: start.width = 8, student.width = 4",
        ),
        ([*TWIN, "start.stages={stage1='a'}"], "start: stages: 'vgg5' has stages of its own; leave start.stages out"),
    ],
)
def test_a_start_that_cannot_be_is_named(tiny, settings, said):
    assert any(said in line for line in problems(tiny, *settings)), problems(tiny, *settings)


@pytest.mark.parametrize("init", ["auto", "random", "teacher", "copied", "converted"])
def test_a_network_that_cannot_run_is_said_whatever_its_start(tiny, init):
    data = tiny.parent / "tiny_clothes.py"
    data.write_text(data.read_text().replace("1, 28, 28", "1, 2, 2"))
    lines = problems(tiny, f"student.init={init}")
    assert lines
    assert all("cannot run on 2 x 2 images" in line for line in lines), lines


@pytest.mark.parametrize("init", ["auto", "converted"])
def test_a_network_of_the_users_own_that_a_conversion_cannot_follow(tiny, init):
    """It is one line, or where nothing is asked for copied weights, and no traceback."""
    (tiny.parent / "batches.py").write_text(BATCHES)
    own = ["teacher.architecture=batches", "student.architecture=batches", f"student.init={init}"]
    own.append('plugins=["tiny_clothes.py", "batches.py"]')
    if init == "auto":
        said = plan(tiny, *own).summary()["init"]
        assert said.startswith("the weights of the teacher, copied: they cannot be converted (architecture 'batches'")
    else:
        [said] = problems(tiny, *own)
        assert 'it can be "copied"' in said
    assert "failed: ValueError: no batch" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["teacher="], "random weights: there is no [start] and no [teacher]"),
        (["student.width=8"], "random weights: the teacher is another network"),
        (["student.init=random"], "random weights"),
        (["student.init=teacher"], "the weights of the teacher, copied"),
        (["student.init=converted"], "the weights of the teacher, converted: thresholds for T = 2"),
        (
            ["student.init=teacher", "student.pool=max"],
            'the weights of the teacher, copied; learnt with pool = "avg", the student\'s "max"',
        ),
        (["student.init=converted", *TWIN], "the weights of [start], converted: thresholds for T = 2"),
        (["student.init=copied", *TWIN], "the weights of [start], copied"),
        (["student.init=copied", *TWIN[2:], "teacher="], "the weights of [start], copied"),
    ],
)
def test_the_plan_says_where_the_student_starts(tiny, settings, said):
    assert plan(tiny, *settings).summary()["init"].startswith(said)


def test_what_has_no_scale_is_copied_and_the_plan_says_why(tiny):
    other = ["teacher.architecture=spikformer", "student.architecture=spikformer", "teacher.width=", "student.width="]
    said = plan(tiny, *other).summary()["init"]
    assert said.startswith("the weights of the teacher, copied: they cannot be converted (stage2.")
    assert "(Product) has no one scale: bmm does not pass it on" in said
    lines = problems(tiny, *other, "student.init=converted")
    assert all('it can be "copied"' in line for line in lines)


def test_a_twin_is_trained_kept_and_cached_as_a_teacher_is(tiny):
    notes = Notes()
    run = distill(tiny, "run", overrides=[*SHORT, "student.init=copied"], progress=notes)
    assert [(line["phase"], line["epoch"]) for line in run.metrics()] == [
        ("teacher", 1),
        ("start", 1),
        ("start", 2),
        ("student", 1),
    ]
    accuracy = run.read_json("start.json")["accuracy"]
    assert f"start: test accuracy {accuracy:.4f}" in notes.lines
    # Its cache is that of a teacher of the same table, with the same weights; and the epochs go with it.
    second = distill(
        tiny,
        "second",
        overrides=["teacher.epochs=2", *SHORT[2:], "student.init=copied"],
        progress=(notes := Notes()),
    )
    for name in ("teacher", "start"):
        assert any(line.startswith(f"{name}: vgg5 from the cache (runs/teachers/vgg5-") for line in notes.lines)
        assert digest(second / f"{name}.safetensors") == digest(run / "start.safetensors")
    assert [line["phase"] for line in second.metrics()] == ["teacher"] * 2 + ["start"] * 2 + ["student"]
    assert load_run("run").teacher is not None
    assert status(run.path)["state"] == "finished"


def test_a_student_starts_from_the_weights_that_the_recipe_names(tiny):
    run = distill(tiny, "run", overrides=[*SHORT, "student.init=copied"])

    def start(*settings):
        return build_parts(tiny, overrides=[*TWIN[:2], *settings], train_teacher=True).student.network.state_dict()

    twin, _ = load_weights(run / "start.safetensors")
    student, _ = load_weights(run / "student.safetensors")
    torch.save({"model": twin}, "twin.pth")
    for settings, expected in (
        ([*TWIN, "student.init=copied"], twin),
        (["student.init=./twin.pth"], twin),
        (["student.init=run/start.safetensors"], twin),
        (["student.init=./run"], student),
    ):
        found = start(*settings)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), settings
    # What parametric neurons learn is not in the file, and stays.
    found = start("student.init=./run", "student.neuron.name=plif")
    assert len(found) == len(student) + 4


def test_a_file_of_another_network_is_refused_as_a_teachers_is(tiny):
    distill(tiny, "run", overrides=["teacher.epochs=1", "distill.epochs=1"])
    [line] = problems(tiny, "student.init=./run", "student.width=8")
    assert "run/student.safetensors was trained with width = 4; the recipe has 8: set student.width = 4" in line
    [line] = problems(tiny, *TWIN, "start.checkpoint=run", "start.epochs=", "start.width=8", "student.width=8")
    assert "run/teacher.safetensors was trained with width = 4; the recipe has 8: set start.width = 4" in line


@pytest.mark.parametrize("phase", ["start", pytest.param("student", marks=pytest.mark.full)])
def test_a_stopped_run_resumes_to_the_same_weights(tiny, phase):
    settings = [*TWIN, "distill.epochs=2", "student.init=converted"]
    whole = distill(tiny, "whole", overrides=settings)
    shutil.rmtree("runs")
    with pytest.raises(Stopped):
        distill(tiny, "stopped", overrides=settings, progress=StopAt(phase, 1, signal.SIGTERM))
    assert load_state(tiny.parent / "stopped" / "last.pt")["phase"] == phase
    run = distill(tiny, "stopped", overrides=settings, resume=True)
    assert digest(run / "student.safetensors") == digest(whole / "student.safetensors")
    assert digest(run / "start.safetensors") == digest(whole / "start.safetensors")
    assert without_times(run.metrics()) == without_times(whole.metrics())
    with pytest.raises(UserError, match=r"start.epochs: was 2, now 3"):
        distill(tiny, "stopped", overrides=[*settings, "start.epochs=3"], resume=True)


def test_a_run_is_not_resumed_from_another_file(tiny):
    first = distill(tiny, "first", overrides=["teacher.epochs=1", "distill.epochs=1"])
    shutil.copy(first / "student.safetensors", "given.safetensors")
    settings = ["teacher.epochs=1", "student.init=./given.safetensors"]
    with pytest.raises(Stopped):
        distill(tiny, "run", overrides=settings, progress=StopAt("student", 1, signal.SIGTERM))
    shutil.copy(first / "teacher.safetensors", "given.safetensors")
    with pytest.raises(UserError, match="the weights that the student started from are not those that the run began"):
        distill(tiny, "run", overrides=settings, resume=True)


def test_the_recipe_of_a_student_that_travels_names_its_start_by_the_file_alone(tiny):
    first = distill(tiny, "first", overrides=["teacher.epochs=1", "distill.epochs=1"])
    settings = ["teacher.epochs=1", "distill.epochs=1", f"student.init={first.path.absolute()}"]
    second = distill(tiny, "second", overrides=settings)
    text = load_weights(second / "student.safetensors")[1]["recipe"]
    assert 'init = "./first"' in text
    assert str(tiny.parent) not in text
    assert load_run(second / "student.safetensors").recipe.student.init == "./first"


STYLES = [("vgg5", {"width": 4}), ("vgg9", {"width": 2, "pool": "max"}), ("resnet19", {"width": 2})] + [
    ("resnet20", {"width": 4, "residual": style}) for style in resnet.BLOCKS
]


def networks(architecture, options, neuron="lif", **neuron_options):
    """An ANN with statistics, scales and shifts of its own, and a student with its weights."""
    torch.manual_seed(0)
    shape = {"in_channels": 2, "num_classes": 3, **options}
    ann = build(architecture, ann_units(), **shape)
    for module in ann.modules():
        if isinstance(module, NORMS):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    network = build(architecture, snn_units(neuron, **neuron_options), **shape)
    network.load_state_dict(ann.state_dict())
    return ann.eval(), network.eval()


class Fires(nn.Module):
    """`amplitude` where the current has reached `theta`."""

    def __init__(self, theta, amplitude):
        super().__init__()
        self.theta, self.amplitude = theta, amplitude

    def forward(self, x):
        return self.amplitude * (x >= self.theta).to(x.dtype)


@pytest.mark.parametrize(("architecture", "options"), STYLES)
@pytest.mark.parametrize("threshold", [1.0, 0.75])
def test_folded_scales_are_those_of_thresholds_and_amplitudes(architecture, options, threshold):
    """A student with other scales is the ANN whose units emit one value from one current on: residuals included."""
    ann, network = networks(architecture, options, threshold=threshold)
    scales = Scales(ann, (2, 8, 8))
    groups = sorted({group for pair in scales.units.values() for group in pair} - scales.fixed)
    draws = torch.Generator().manual_seed(1)
    chosen = {group: 0.3 + float(torch.rand((), generator=draws)) for group in groups}
    fold(network.double(), scales, chosen)
    ann = ann.double()
    for name, (before, after) in scales.units.items():
        ann.get_submodule(name).activation = Fires(chosen[before] * threshold, chosen[after])
    x = torch.randn(1, 3, 2, 8, 8, dtype=torch.double, generator=draws)
    with torch.no_grad():
        found, expected = network(x)[0], ann(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("style", ["activate-after-add", "sew", "membrane"])
def test_what_a_shortcut_joins_has_one_scale(style):
    ann, _ = networks("resnet20", {"width": 4, "residual": style})
    units = Scales(ann, (2, 8, 8)).units
    first, second = "stage1.0", "stage1.1"
    if style == "activate-after-add":
        assert units[f"{first}.act2"][1] == units[f"{second}.act2"][0]
    elif style == "sew":
        assert units[f"{first}.act2"][1] == units[f"{second}.act2"][1]
    else:
        assert units[f"{first}.act1"][0] == units[f"{second}.act1"][0]
    inner = units[f"{first}.act1" if style != "membrane" else f"{first}.act2"]
    assert sum(inner[1] in pair for pair in units.values()) == 1


def test_the_best_scales_are_those_of_the_best_staircase():
    """Currents uniform on [0, 1], one step: the best threshold is 1/3, the best spike 2/3 (each the middle of what it
    stands for), for a neuron of any threshold; the mean square is then 1/27, of 1/3.
    """
    current = (torch.arange(3000) + 0.5) / 3000
    for threshold in (1.0, 0.5):
        response = Response(current, current, *staircase(LIF(threshold=threshold), 1))

        scales = best_scales(SimpleNamespace(units={"unit": (1, 2)}, fixed={0, 3}), {"unit": response})
        assert scales[1] * threshold == pytest.approx(1 / 3, abs=0.01)
        assert scales[2] == pytest.approx(2 / 3, abs=0.02)
        assert response.error(scales[1], scales[2]) == pytest.approx(1 / 9, abs=1e-3)


def test_a_leaky_neurons_staircase_is_its_own():
    """tau = 2, hard reset, from rest, T = 4: one spike each step from the threshold on; from 2/3 of it each second
    (1 + 1/2 steps' worth); from 8/15 on the fourth alone; below none.
    """
    table, threshold = staircase(LIF(tau=2.0, threshold=0.5), 4)
    fires = {round(current, 3): float(table[int(current / threshold * 256)]) for current in (0.26, 0.28, 0.34, 0.51)}
    assert threshold == 0.5
    assert fires == {0.26: 0.0, 0.28: 0.25, 0.34: 0.5, 0.51: 1.0}


@pytest.mark.parametrize("calibration", ["images", "none"])
def test_a_converted_start_is_nearer_to_its_ann_than_a_copied_one(tiny, calibration):
    overrides = ["teacher.epochs=2", "student.timesteps=4", "student.width=8", "teacher.width=8"]

    def agreement(*settings):
        parts = build_parts(tiny, overrides=[*overrides, *settings], train_teacher=True)
        images = parts.test.pixels.float() / 255
        with torch.no_grad():
            return float((parts.student.eval()(images).argmax(1) == parts.teacher(images).argmax(1)).float().mean())

    converted = agreement("student.init=converted", f"student.calibration={calibration}")
    assert converted > agreement("student.init=copied") + 0.1


def test_scales_refuse_what_has_none():
    class Shifted(nn.Module):
        def forward(self, x):
            return torch.sigmoid(x)

    ann, _ = networks("vgg5", {"width": 4})
    ann.set_submodule("stage2.0", Shifted())
    with pytest.raises(UserError, match=r"stage2.0 \(Shifted\) has no one scale: sigmoid does not pass it on"):
        Scales(ann, (2, 8, 8))
    ann, _ = networks("vgg5", {"width": 4})
    again = next(module for module in ann.modules() if isinstance(module, NormActivate))
    ann.set_submodule("stage2.0", again.activation)
    with pytest.raises(UserError, match="runs twice"):
        Scales(ann, (2, 8, 8))


@pytest.mark.parametrize("product", [lambda x, gain: x * gain, lambda x, gain: gain * x, lambda x, gain: x / gain])
def test_a_learnt_gain_keeps_the_scale_whichever_comes_first(product):
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.full((4, 1, 1), 0.5))

        def forward(self, x):
            return product(x, self.gain)

    ann, _ = networks("vgg5", {"width": 4})
    ann.stage1.append(Gain())
    assert Scales(ann, (2, 8, 8)).layers


def test_nothing_is_divided_by_a_signal():
    class Inverse(nn.Module):
        def forward(self, x):
            return 1 / x

    ann, _ = networks("vgg5", {"width": 4})
    ann.stage1.append(Inverse())
    with pytest.raises(UserError, match="has no one scale"):
        Scales(ann, (2, 8, 8))


def test_a_recipe_with_a_start_is_written_and_read_again(tiny):
    recipe = Recipe.load(tiny, [*TWIN, "start.activation=qcfs", "student.init=converted"])
    text = recipe.to_toml()
    assert "levels = 4" in text
    tiny.with_name("again.toml").write_text(text)
    assert Recipe.load(tiny.with_name("again.toml")).model_dump() == recipe.model_dump()
    assert isinstance(build_parts(recipe, train_teacher=True).student, Student)


@pytest.mark.parametrize("encoder", ["direct", "poisson"])
def test_the_statistics_of_a_converted_start_take_no_more_steps_at_once_than_the_training(encoder):
    """They are the same, but for the statistics of each chunk that its own images are normalised with."""
    _, network = networks("vgg5", {"width": 2})
    student = Student(network, encoders.build(encoder, (0.5, 0.5), (0.5, 0.5)), 40)
    images = Images(torch.randint(0, 256, (60, 2, 16, 16), dtype=torch.uint8), torch.zeros(60, dtype=torch.long))
    begin = {name: value.clone() for name, value in student.state_dict().items()}
    found, most = [], []
    for chunk in (0, 8):
        student.load_state_dict(begin)
        seen = []
        unit = student.network.stage1[1]
        with unit.register_forward_hook(lambda *given, seen=seen: seen.append(len(given[2]))):
            measure_statistics(student, images, 0, chunk)
        most.append(max(seen))
        found.append(
            {name: norm.running_var.clone() for name, norm in student.named_modules() if isinstance(norm, NORMS)}
        )
    assert most == [40 * 60, 8 * 60]
    torch.testing.assert_close(*found, rtol=0.3, atol=0.02)


OWN_NEURONS = """
import torch

from lasnn import neurons
from lasnn.kernels import lif
from lasnn.neuron import LIF


@neurons.register("by-channel")
class ByChannel(LIF):
    '''Its threshold is higher in every second channel.'''

    def forward(self, current, v0=None, timesteps=None):
        scale = torch.ones(current.shape[2], 1, 1)
        scale[1::2] = 0.5
        return lif(current * scale, v0, tau=self.time_constant, timesteps=timesteps, **self.options)


@neurons.register("breaks")
class Breaks(LIF):
    '''It takes what a network gives it, and nothing else.'''

    def forward(self, current, v0=None, timesteps=None):
        if current.shape[3] > 1000:
            raise RuntimeError("too tall")
        return super().forward(current, v0, timesteps)
"""


def test_a_neuron_of_ones_own_is_converted_channel_by_channel(tiny):
    (tiny.parent / "own.py").write_text(OWN_NEURONS)
    tiny.write_text(tiny.read_text().replace('plugins = ["', 'plugins = ["own.py", "'))
    found = build_parts(tiny, overrides=["student.neuron.name=by-channel"], train_teacher=True)
    assert found.plan.start.converted
    unit = next(module for module in found.student.modules() if isinstance(module, NormSpike))
    table, _ = staircase_of(unit, 2)
    plain, _ = staircase(LIF(), 2)
    # In every second channel a current counts half.
    assert torch.equal(table[::2], (plain[::2] + plain[: len(plain) // 2]) / 2)
    with pytest.raises(UserError, match=r"the converted start: RuntimeError: too tall.*own\.py:\d+"):
        build_parts(tiny, overrides=["student.neuron.name=breaks"])
