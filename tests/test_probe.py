"""Mistakes in a user's own code, found before the first batch: a line names part, stage, what was found and the fix."""

import random
import re
import time
import warnings
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lasnn import Staged, architectures, augmentations, datasets, encoders, losses, neurons, teachers
from lasnn.data import Dataset, Images
from lasnn.encoder import Encoder
from lasnn.errors import UserError
from lasnn.factory import load_data
from lasnn.kernels import lif
from lasnn.network.staged import StagedView
from lasnn.plan import make_plan
from lasnn.recipe.schema import Recipe

STUDENT = {"architecture": "vgg5", "width": 2, "timesteps": 2}


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x):
        return self.function(x, *self.parts)


def plan(**tables):
    """The plan of a student alone, or with the tables that are given."""
    tables = {"data": {"batch_size": 40}, "student": STUDENT, "distill": {"epochs": 1}} | tables
    return make_plan(Recipe.from_tables(tables))


def refused(**tables):
    with pytest.raises(UserError) as caught:
        plan(**tables)
    [line] = caught.value.problems
    assert "\n" not in line
    return line


def conv(channels, width):
    return nn.Conv2d(channels, width, 3, padding=1, bias=False)


def head(width, classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def student(stage2=None, top=None, stage1=None):
    """A plan's student of two stages of 4 channels, with one of its parts made by a function of `act`."""

    @architectures.register("mine")
    def mine(act, *, in_channels: int, num_classes: int) -> Staged:
        """Two stages."""
        first = stage1(act, in_channels) if stage1 else nn.Sequential(conv(in_channels, 4), act(4))
        second = stage2(act) if stage2 else nn.Sequential(nn.AvgPool2d(2), conv(4, 4), act(4))
        return Staged({"stage1": first, "stage2": second}, top(num_classes) if top else head(4, num_classes))

    return {"architecture": "mine", "timesteps": 2}


def teacher(stage, top=None, freeze=False):
    """A plan's teacher of one stage of 8 channels, that is given a convolution's map of 8 channels."""

    @teachers.register("elsewhere")
    def elsewhere(*, in_channels: int, num_classes: int) -> StagedView:
        """One stage."""
        network = nn.Module()
        network.stem, network.stage, network.head = conv(in_channels, 8), stage(), (top or default)(num_classes)
        network.requires_grad_(not freeze)
        return StagedView(network, {"stage1": network.stage}, network.head, network.stem)

    def default(classes):
        def run(x, top):
            x = x["out"] if isinstance(x, dict) else x[0] if isinstance(x, tuple) else x
            return top(x.flatten(1)[:, :8])

        return Do(run, nn.Linear(8, classes))

    return {"teacher": {"architecture": "elsewhere", "epochs": 1}, "distill": {"epochs": 1, "pairs": ["stage1"]}}


# Stages


MAPS = {
    "tokens": (lambda x: x.flatten(2).transpose(1, 2), r"tokens \[N, 784, 8\].*return x.transpose\(1, 2\)"),
    "tuple": (lambda x: (x, x), "a tuple of 2.*return its map alone"),
    "dict": (lambda x: {"out": x}, "a dict of 'out'.*return its map alone"),
    "flat": (lambda x: x.flatten(1), r"\[N, 6272\].*return what comes before it is flattened"),
    "channels last": (
        lambda x: x.permute(0, 2, 3, 1),
        r"a map with its channels last, \[N, 28, 28, 8\].*return x.permute\(0, 3, 1, 2\)",
    ),
}


@pytest.mark.parametrize("kind", MAPS)
def test_a_paired_stage_gives_a_map(kind):
    function, said = MAPS[kind]
    tables = teacher(lambda: Do(function))
    line = refused(**tables)
    assert line.startswith("recipe: distill.pairs: teacher 'elsewhere' (")
    assert "stage1 returns" in line
    assert "a paired stage returns a map [N, C, H, W]" in line
    assert "leave it out of distill.pairs" in line
    assert re.search(said, line)
    # Who compares no stages may have any.
    tables["distill"]["pairs"] = []
    assert plan(**tables).pairs == ()


def test_channels_last_is_found_where_all_sides_are_equal():
    def last(x, layer):
        return layer(x).permute(0, 2, 3, 1)

    def make(order):
        tables = teacher(lambda: Do(order, nn.Conv2d(8, 28, 1)), lambda classes: Do(mean, nn.Linear(28, classes)))
        return tables

    def mean(x, top):
        return top(x.flatten(2)[:, :, :28].mean(1))

    assert "channels last" in refused(**make(last))
    teachers.unregister("elsewhere")
    assert plan(**make(lambda x, layer: layer(x))).pairs[0].teacher_shape == (28, 28, 28)


def test_a_map_of_other_sides_is_no_channels_last():
    """Pooled along one side only, with as many channels as rows."""
    top = lambda classes: Do(lambda x, top: top(x.mean((2, 3))), nn.Linear(28, classes))  # noqa: E731
    tables = teacher(lambda: nn.Sequential(nn.Conv2d(8, 28, 1), nn.AvgPool2d((1, 4))), top)
    assert plan(**tables).pairs[0].teacher_shape == (28, 28, 7)


NETWORKS = {
    "head of another width": ({"top": lambda classes: head(4, 7)}, r"head returns \[N, 7\]; .* logits \[N, 10\]"),
    "head without Flatten": (
        {"top": lambda classes: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Linear(4, classes))},
        r"\(head: .*; head is given \[N, 4, 14, 14\]: is an nn.Flatten\(\) missing",
    ),
    "a linear layer on a map": (
        {"top": lambda classes: nn.Linear(14, classes)},
        r"head returns \[N, 4, 14, 10\]; .*end it with nn.Flatten\(\)",
    ),
    "logits in a dict": (
        {"top": lambda classes: Do(lambda x, top: {"logits": top(x)}, head(4, classes))},
        "head returns a dict of 'logits'; .*return that tensor alone",
    ),
    "no return": ({"stage2": lambda act: Do(lambda x, unit: None, act(4))}, "stage2 returns nothing; .* return"),
    "argmax": ({"top": lambda classes: Do(lambda x, t: t(x).long(), head(4, classes))}, "of int64; .*argmax"),
    "images mixed up": ({"stage2": lambda act: Do(lambda x, a: a(x).flatten(), act(4))}, "stage2 returns .* must stay"),
    "raises": ({"stage2": lambda act: Do(lambda x, a: {"x": a(x)}["map"], act(4))}, r"\(stage2: .*test_probe.py:\d+\)"),
    "an attribute that is not there": (
        {"stage2": lambda act: Do(lambda x, a: a(x).map, act(4))},
        r"\(stage2: AttributeError: .* \(.*test_probe.py:\d+\)",
    ),
    "no unit": (
        {"stage1": lambda act, c: nn.Sequential(conv(c, 4), nn.ReLU()), "stage2": lambda act: nn.ReLU()},
        r"there is no spiking unit in it: put act\(channels\) where stage1.1 \(ReLU\) stands",
    ),
    "a unit called twice": (
        {"stage2": lambda act: Do(lambda x, a: a(a(x)), act(4))},
        r"its spiking unit stage2.parts.0 is called 2 times .* call act\(\) once for each place",
    ),
    "cut": (
        {"stage2": lambda act: Do(lambda x, c, a: a(c(x.detach())), conv(4, 4), act(4))},
        r"no gradient reaches stage1, which has parameters to train: detach\(\)",
    ),
    "no gradient": (
        {"top": lambda classes: Do(lambda x, top: top(x).detach(), head(4, classes))},
        r"what head returns has no gradient: detach\(\)",
    ),
    "state": (
        {"stage2": lambda act: Do(Counter(), act(4))},
        "stage2 gives two answers to one question, for it keeps its state from call to call",
    ),
    "dropout": (
        {"stage2": lambda act: Do(lambda x, a: F.dropout(a(x), 0.5), act(4))},
        "stage2 gives two answers to one question, for it draws random numbers in evaluation",
    ),
    "in place": (
        {"stage2": lambda act: Do(lambda x, a: a(F.relu_(x)), act(4))},
        "stage2 changes in place what stage1 returned, which a loss would then be given: set inplace to False in what",
    ),
    "reads values": (
        {"stage2": lambda act: Do(lambda x, a: a(x) if x.sum().item() > 0 else x, act(4))},
        r"\(stage2: .*; make tensors on the input's device",
    ),
}


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, x, unit):
        self.calls += 1
        return unit(x) + self.calls


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_students_own_network(kind):
    parts, said = NETWORKS[kind]
    with pytest.raises(UserError, match=r"recipe: student: architecture 'mine' \(.*test_probe.py:\d+\): .*" + said):
        plan(student=student(**parts))


def test_what_is_right_is_left_alone():
    assert plan(student=student()).notes == ()
    # As torch does it: dropout in training, a buffer, a residual, an own head.
    stage2 = lambda act: Do(lambda x, c, d, a: d(a(c(x), x)), conv(4, 4), nn.Dropout(0.5), act(4))  # noqa: E731
    architectures.unregister("mine")
    assert plan(student=student(stage2=stage2)).notes == ()


class Rounded(torch.autograd.Function):
    """A surrogate of a user's own."""

    @staticmethod
    def forward(ctx, x):
        return (x > 0.5).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize(
    "function",
    [
        lambda x, c, a: a(c(x)) + torch.zeros(1, 4, 1, 1),
        lambda x, c, a: a(c(x)) * torch.arange(4.0).view(4, 1, 1),
        lambda x, c, a: Rounded.apply(a(c(x))),
        lambda x, c, a: a(torch.utils.checkpoint.checkpoint(c, x, use_reentrant=False)),
        lambda x, c, a: a(c(x.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, x.shape[2:]))),
    ],
)
def test_what_networks_do_besides(function):
    plan(student=student(stage2=lambda act: Do(function, conv(4, 4), act(4))))


@pytest.mark.parametrize("chance", [lambda: random.random(), lambda: torch.rand(1)])
def test_a_stage_that_is_left_out_by_chance_is_no_mistake(chance):
    """Stochastic depth; the same is said each time, whatever the state of the generators."""

    def skipping(share):
        return lambda x, c, a: x if a.training and chance() < share else a(c(x))

    for seed in range(3):
        torch.manual_seed(seed)
        random.seed(seed)
        for share in (0.5, 1.0):
            plan(student=student(stage2=lambda act, share=share: Do(skipping(share), conv(4, 4), act(4))))
    cut = refused(student=student(stage2=lambda act: Do(lambda x, c, a: x + a(c(x)).detach(), conv(4, 4), act(4))))
    assert "no gradient reaches stage2" in cut


def test_a_network_that_raises_in_training_only():
    def run(x, unit):
        if unit.training:
            raise KeyError("later")
        return unit(x)

    line = refused(student=student(stage2=lambda act: Do(run, act(4))))
    assert re.search(r"student: architecture 'mine' \(.*\) failed: KeyError: 'later' \(.*test_probe.py:\d+\)", line)


def test_a_network_that_fails_on_values_only():
    """On the meta device it has none."""

    def run(x, unit):
        if not x.is_meta and x.max() > 0:
            raise IndexError("9")
        return unit(x)

    assert "failed: IndexError: 9 (" in refused(student=student(stage2=lambda act: Do(run, act(4))))


def test_what_is_left_of_real_values_is_said():
    [note] = plan(student=student(stage2=lambda act: nn.Sequential(conv(4, 4), nn.ReLU()))).notes
    assert note.startswith("real     stage2.1 (ReLU): no spikes but real values go on from there")
    architectures.unregister("mine")
    [note] = plan(student=student(stage2=lambda act: Do(lambda x, c: F.relu(c(x)), conv(4, 4)))).notes
    assert "stage2 (no spiking unit)" in note


def test_a_spiking_unit_under_two_names():
    def twice(act, channels):
        unit = act(4)
        part = nn.Sequential(conv(channels, 4), unit)
        part.last = nn.Sequential(conv(4, 4), unit)
        return part

    assert "one spiking unit stands at stage1.1 and at stage1.last.1" in refused(student=student(stage1=twice))


def test_a_frozen_student_is_refused_and_a_part_of_it_is_not():
    def frozen(act, channels):
        return nn.Sequential(conv(channels, 4), act(4)).requires_grad_(False)

    plan(student=student(stage1=frozen))
    line = refused(
        student=student_frozen(),
    )
    assert "there is nothing to learn in it: all its 8 parameters are frozen" in line


def student_frozen():
    @architectures.register("frozen")
    def frozen(act, *, in_channels: int, num_classes: int) -> Staged:
        """Two stages."""
        stages = {"stage1": nn.Sequential(conv(in_channels, 4), act(4)), "stage2": nn.Sequential(conv(4, 4), act(4))}
        return Staged(stages, head(4, num_classes)).requires_grad_(False)

    return {"architecture": "frozen", "timesteps": 2}


def test_a_frozen_stage_that_a_loss_compares():
    def frozen(act, channels):
        return nn.Sequential(conv(channels, 8), act(8)).requires_grad_(False)

    tables = teacher(lambda: conv(8, 8))
    mine = student(stage1=frozen, stage2=lambda act: nn.Sequential(conv(8, 4), act(4)))
    compares = [{"name": "cross-entropy"}, {"name": "attention"}]
    line = refused(**tables, student=mine, losses=compares)
    assert "what stage1 returns has no gradient" in line
    assert "where stage1 is frozen on purpose, leave it out of distill.pairs" in line
    plan(**tables, student=mine)


# Teachers


def test_a_frozen_teacher_is_not_trained():
    found = plan(**teacher(lambda: conv(8, 8), freeze=True))
    assert found.anns["teacher"].frozen
    assert found.summary()["teacher_steps"] == 0
    teachers.unregister("elsewhere")
    assert not plan(**teacher(lambda: conv(8, 8))).anns["teacher"].frozen


@pytest.mark.skipif(not find_spec("timm"), reason="timm is not installed")
def test_a_plugin_s_teacher_that_is_called_as_a_whole_is_planned_to_be_trained():
    from lasnn.architecture.timm import timm

    @teachers.register("mine-of-timm")
    def mine_of_timm(*, in_channels: int, num_classes: int):
        """One of timm's, and no weights."""
        return timm(in_channels=in_channels, num_classes=num_classes, model="test_resnet", resize=32)

    table = {"architecture": "mine-of-timm", "epochs": 1}
    assert not plan(teacher=table, distill={"epochs": 1, "pairs": []}).anns["teacher"].frozen


def test_a_teacher_without_a_gradient_is_not_trained_in_vain():
    line = refused(**teacher(lambda: conv(8, 8), lambda classes: Do(lambda x, top: top(x).detach(), head(8, classes))))
    assert "recipe: teacher: teacher 'elsewhere' (" in line
    assert "what head returns has no gradient" in line


@pytest.mark.parametrize("assign", [False, True])
def test_a_plugin_that_loads_its_weights_is_planned_without_a_warning(assign):
    weights = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8)).state_dict()

    def pretrained():
        stage = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))
        stage.load_state_dict(weights, assign=assign)
        return stage.requires_grad_(False)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not plan(**teacher(pretrained)).anns["teacher"].frozen


# Neurons and encoders


def spikes(current, v0, timesteps):
    current = current.expand(timesteps or len(current), *current.shape[1:])
    return lif(current.contiguous(), v0)


class Kept(nn.Module):
    """Keeps its voltage, as those of other libraries do until they are reset."""

    voltage = None

    def forward(self, current, v0=None, timesteps=None):
        found, self.voltage = spikes(current, self.voltage, timesteps)
        return found, self.voltage


def neuron(function):
    class Own(nn.Module):
        """A neuron."""

        def forward(self, current, v0=None, timesteps=None):
            return function(current, v0, timesteps)

    return Own


class Alone(nn.Module):
    def forward(self, current):
        return current


NEURONS = {
    "state": (Kept, "gives two answers to one question, for it keeps its state from call to call"),
    "drawn": (neuron(lambda x, v, t: spikes(x + torch.rand(()), v, t)), "it draws random numbers in evaluation"),
    "spikes alone": (neuron(lambda x, v, t: spikes(x, v, t)[0]), r"returns a tensor \[4, .*; return two: spikes"),
    "nothing": (neuron(lambda x, v, t: None), "returns nothing; return two"),
    "constant": (neuron(lambda x, v, t: lif(x, v)), r"returns spikes \[1, 2, .*; wanted are \[4, .*constant"),
    "no surrogate": (neuron(lambda x, v, t: spikes(x.detach(), v, t)), "lets no gradient through: .* surrogate"),
    "v0 unread": (neuron(lambda x, v, t: spikes(x, None, t)), "does not go on from v0 .* leave v0 out"),
    "no voltage": (neuron(lambda x, v, t: (spikes(x, v, t)[0], None)), "takes v0 and returns nothing as the voltage"),
    "one argument": (Alone, r"takes no timesteps; its forward\(\) is forward\(current, v0=None, timesteps=None\)"),
    "no module": (lambda: print, r"is no nn.Module with one"),
    "raises": (neuron(lambda x, v, t: x[9]), r"failed: IndexError: .* \(.*test_probe.py:\d+\)"),
    "right": (neuron(spikes), None),
}


@pytest.mark.parametrize("kind", NEURONS)
def test_own_neurons(kind):
    make, said = NEURONS[kind]
    neurons.register("mine")(make)
    tables = {"student": {**STUDENT, "neuron": {"name": "mine"}}}
    if said is None:
        plan(**tables)
        return
    with pytest.raises(UserError, match=r"recipe: student.neuron: neuron 'mine' \(.*\) .*" + said):
        plan(**tables)


def encoder(function):
    class Own(Encoder):
        """An encoder."""

        def encode(self, images, timesteps, generator):
            return function(images, timesteps, generator)

    return Own


ENCODERS = {
    "no steps": (lambda x, t, g: x, r"returns \[2, 1, 28, 28\] of torch.float32; wanted are \[2, 2, 1, 28, 28\]"),
    "nothing": (lambda x, t, g: None, "returns nothing; wanted are"),
    "bools": (lambda x, t, g: x.expand(t, *x.shape) > 0.5, "of torch.bool; wanted"),
    "drawn": (lambda x, t, g: torch.rand(t, *x.shape), "gives two answers to one question: draw from the generator"),
    "raises": (lambda x, t, g: x[7], r"failed: IndexError.*test_probe.py:\d+\)"),
    "right": (lambda x, t, g: x.expand(t, *x.shape).contiguous(), None),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_own_encoders(kind):
    function, said = ENCODERS[kind]
    encoders.register("mine")(encoder(function))
    tables = {"student": {**STUDENT, "encoder": "mine"}}
    if said is None:
        plan(**tables)
        return
    with pytest.raises(UserError, match=r"recipe: student.encoder: encoder 'mine' \(.*\) .*" + said):
        plan(**tables)


# Losses and augmentations


def only_small(logits):
    if logits.shape[1] > 2:
        raise IndexError("only two images")
    return logits.mean()


LOSSES = {
    "nothing": (lambda x: None, "must return one number, a tensor []; it returned nothing"),
    "a float": (lambda x: float(x.mean()), "it returned a float"),
    "a vector": (lambda x: x.mean((0, 2)), "it returned [2]"),
    "detached": (lambda x: x.detach().mean(), "has no gradient, so that nothing learns from it"),
    "argmax": (lambda x: x.argmax(2).float().mean(), "has no gradient"),
    "no number": (lambda x: (x - x).log().sum() * 0, "is nan on 2 random images"),
    "a batch": (only_small, "failed: IndexError: only two images"),
    "right": (lambda x: x.square().mean(), None),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_own_losses(kind):
    function, said = LOSSES[kind]

    @losses.register("mine")
    def mine(logits):
        """A loss."""
        return function(logits)

    tables = {"losses": [{"name": "cross-entropy"}, {"name": "mine"}]}
    if said is None:
        plan(**tables)
        return
    line = refused(**tables)
    assert line.startswith("recipe: losses.1: loss 'mine' (")
    assert said in line


@pytest.mark.parametrize(
    ("function", "finite"),
    [
        (lambda s, t: s.sqrt().mean() + t.mean(), False),
        (lambda s, t: s.pow(0.3).mean() + t.mean(), False),
        (lambda s, t: (s + 1e-8).sqrt().mean() + t.mean(), True),
    ],
)
def test_an_own_loss_is_tried_on_spikes_of_which_many_are_0(function, finite):
    """There a root has no gradient, as it would not have in the first step."""

    @losses.register("mine")
    def mine(student_features, teacher_features):
        """A loss."""
        return function(student_features[0], teacher_features[0])

    tables = {
        "losses": [{"name": "cross-entropy"}, {"name": "mine"}],
        "teacher": {"architecture": "vgg5", "width": 4, "epochs": 1},
    }
    if finite:
        plan(**tables)
        return
    assert "is not finite on spikes and features that are often 0: a root there has none" in refused(**tables)


def test_a_measure_of_weight_0_needs_no_gradient():
    @losses.register("mine")
    def mine(logits):
        """A share."""
        return logits.argmax(2).float().mean()

    plan(losses=[{"name": "cross-entropy"}, {"name": "mine", "weight": 0.0}])


def test_an_augmentation_is_tried_on_a_whole_batch():
    @augmentations.register("mine")
    def mine(images):
        """Right for two images."""
        return images if len(images) == 2 else images[:, :, :5]

    found = "its images are torch.float32 [40, 1, 5, 28]; they must be torch.float32 [40, 1, 28, 28]"
    assert found in refused(data={"batch_size": 40, "augment": ["mine"]})


# Data sets


class Own(Dataset):
    """A data set."""

    channels, height, width = 1, 28, 28
    classes, mean, std = ("a", "b"), (0.5,), (0.5,)
    train_size = test_size = 2

    def __init__(self, root):
        pass

    def load(self):
        return None


SPLIT = torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.arange(2)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda: None, "load() returned nothing; it returns two lasnn.data.Images"),
        (lambda: Images(*SPLIT), "load() returned a Images; it returns two"),
        (lambda: SPLIT, "load() returned a tuple; it returns two"),
        (lambda: (Images(SPLIT[0].numpy(), SPLIT[1]),) * 2, "pixels must be a tensor, not ndarray"),
        (lambda: {}["column"], "failed: KeyError: 'column'"),
    ],
)
def test_what_an_own_data_set_loads(what, said):
    @datasets.register("own")
    class Loads(Own):
        """A data set."""

        def load(self):
            return what()

    found = plan(data={"name": "own", "batch_size": 2})
    with pytest.raises(UserError) as caught:
        load_data(found.recipe, found.data, torch.device("cpu"))
    assert "data set 'own' (" in str(caught.value)
    assert said in str(caught.value)


def test_what_an_own_data_set_says_of_itself():
    @datasets.register("silent")
    class Silent(Own):
        """It does not say its mean."""

        mean = None

    @datasets.register("colours")
    class Colours(Own):
        """Of three channels."""

        channels = 3

    assert "does not say its mean; it must say channels, height" in refused(data={"name": "silent", "batch_size": 2})
    assert "its mean has 1 values; it has 3 channels" in refused(data={"name": "colours", "batch_size": 2})


# Weights under two names


def test_aliased_layers_are_planned():
    """The convolution and the head stand under two names each, as in `self.classifier = self.fc`."""

    @architectures.register("aliased")
    def aliased(act, *, in_channels: int, num_classes: int) -> Staged:
        """One convolution in two stages."""
        shared, top = conv(4, 4), head(4, num_classes)
        top.classifier = nn.Identity()
        alias = Do(lambda x, one: one(x), top)
        alias.fc = top[2]
        stages = {"stage1": nn.Sequential(conv(in_channels, 4), act(4)), "stage2": nn.Sequential(shared, act(4))}
        return Staged({**stages, "stage3": nn.Sequential(shared, act(4))}, alias)

    both = {"architecture": "aliased"}
    found = plan(teacher={**both, "epochs": 1}, student={**both, "timesteps": 2, "init": "teacher"})
    assert found.student_parameters == found.anns["teacher"].parameters == 36 + 144 + 3 * 8 + 50


def test_a_plan_of_shipped_parts_costs_no_probe():
    plan()
    begun = time.perf_counter()
    plan(teacher={"architecture": "vgg9", "epochs": 1}, student={"architecture": "vgg9", "timesteps": 4})
    assert time.perf_counter() - begun < 5
