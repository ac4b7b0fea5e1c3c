"""Every registered architecture, as teacher and as student; the day one is registered it is tested here."""

from functools import partial
from typing import get_args

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lasnn import Staged, architectures
from lasnn.architecture.resnet import Residual
from lasnn.errors import UserError
from lasnn.kernels import lif
from lasnn.network.staged import build
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.time import TimeContext
from lasnn.network.units import Add, NormActivate, NormSpike, Product, ann_units, snn_units
from lasnn.neuron import LIF
from lasnn.probe import probe
from lasnn.random import generator
from lasnn.registry import encoders

# Learnable parameters for three input channels. ResNet-19: 12.63 M (TET's code); ResNet-18 and 34 with the CIFAR stem
# and ResNet-20 with projection shortcuts: the usual PyTorch counts; VGG-11 to 16: those of the CIFAR form
# (9,231,114; 9,416,010; 14,728,266; 20,040,522 for ten classes) less the biases that batch norm makes superfluous.
# ResNet-32: its 464,154 without projections (He et al.: 0.46 M) and 2,752 for the two; ResNet-50: the usual count.
PARAMETERS = {
    ("resnet18", 10): 11_173_962,
    ("resnet19", 10): 12_630_858,
    ("resnet20", 10): 272_474,
    ("resnet32", 10): 464_154 + 2_752,
    ("resnet50", 10): 23_520_842,
    ("resnet34", 10): 21_282_122,
    ("vgg11", 10): 9_231_114 - 2_752,
    ("vgg13", 10): 9_416_010 - 2_944,
    ("vgg16", 10): 14_728_266 - 4_224,
    ("vgg19", 10): 20_040_522 - 5_504,
    ("resnet18", 100): 11_220_132,
    # Spikformer-4-256: 4.15 M in the paper; here less 9,216 biases before batch norms, and 4 batch norms (2,048) more.
    ("spikformer", 10): 4_148_010,
}
# The stem of a transformer has an eighth of its width.
NARROW = {name: {"width": 8 if "heads" in architectures[name].options else 4} for name in architectures}
# Every architecture in every residual style that it takes, `resnet18-sew`; the default has the bare name.
STYLES = get_args(Residual)
NETWORKS = [
    f"{name}-{style}" if style != STYLES[0] else name
    for name in architectures.names()
    for style in (STYLES if "residual" in architectures[name].options else STYLES[:1])
]
# Deeper ones are built of the same blocks.
DEEPER = ("resnet32", "resnet34", "vgg13", "vgg16", "vgg19")
MOST = [pytest.param(name, marks=pytest.mark.full if name.partition("-")[0] in DEEPER else ()) for name in NETWORKS]
RESNETS = [name for name in architectures.names() if "residual" in architectures[name].options]


def make(name, act, in_channels=3, num_classes=7, **options):
    torch.manual_seed(0)
    name, _, style = name.partition("-")
    options = NARROW.get(name, {}) | ({"residual": style} if style else {}) | options
    return build(name, act, in_channels=in_channels, num_classes=num_classes, **options)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("name", "classes"), PARAMETERS)
def test_parameter_counts(name, classes):
    """Whatever the residual style."""
    with torch.device("meta"):
        for style in STYLES if name in RESNETS else (None,):
            for act in (ann_units(), snn_units()):
                options = {"residual": style} if style else {}
                network = build(name, act, in_channels=3, num_classes=classes, **options)
                assert count(network) == PARAMETERS[name, classes]


def test_resnet19_with_elkd_stem():
    with torch.device("meta"):
        network = build("resnet19", ann_units(), in_channels=3, num_classes=10, stem_width=128)
    assert round(count(network) / 1e6, 2) == 12.70


@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19"])
def test_vgg_has_the_convolutions_of_torchvision(name):
    with torch.device("meta"):
        ours = build(name, ann_units(), in_channels=3, num_classes=10)
        theirs = getattr(torchvision.models, f"{name}_bn")()
    convolutions = [[m.weight.shape for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (ours, theirs)]
    assert convolutions[0] == convolutions[1]


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("style", STYLES)
def test_resnet_stages_are_those_of_torchvision(name, style):
    with torch.device("meta"):
        ours = build(name, ann_units(), in_channels=3, num_classes=10, residual=style)
        theirs = getattr(torchvision.models, name)()
    for number in range(1, 5):
        assert count(getattr(ours, f"stage{number}")) == count(getattr(theirs, f"layer{number}"))


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize(
    ("channels", "size"),
    [(1, 28), (3, 33), *(pytest.param(*more, marks=pytest.mark.full) for more in ((3, 32), (2, 64)))],
)
def test_any_size_from_28_up(name, channels, size):
    with torch.device("meta"):
        for act in (ann_units(), snn_units()):
            network = make(name, act, in_channels=channels)
            shapes = probe(network, (channels, size, size), timesteps=3).shapes
            logits, _ = network(torch.empty(1, 2, channels, size, size), timesteps=3)
            assert logits.shape[1:] == (2, 7)
            assert list(shapes) == [f"stage{number}" for number in range(1, len(shapes) + 1)]


@pytest.mark.parametrize("name", MOST)
def test_teacher_and_student_share_their_keys(name):
    teacher, student = make(name, ann_units()), make(name, snn_units())
    assert teacher.state_dict().keys() == student.state_dict().keys()
    student.load_state_dict(teacher.state_dict())
    learnt = make(name, snn_units("plif"))
    extra = learnt.state_dict().keys() - teacher.state_dict().keys()
    units = [module for module in learnt.modules() if isinstance(module, NormSpike)]
    assert len(extra) == len(units)
    assert all(key.endswith(".neuron.w") for key in extra)


@pytest.mark.parametrize("name", MOST)
def test_width_scales_every_stage(name):
    with torch.device("meta"):
        shapes = [probe(make(name, ann_units(), width=width), (3, 32, 32)).shapes for width in (8, 16)]
    for stage in shapes[0]:
        assert shapes[1][stage][0] == 2 * shapes[0][stage][0]
        assert shapes[1][stage][1:] == shapes[0][stage][1:]


@pytest.mark.parametrize("name", MOST)
def test_forward_and_backward_reach_every_parameter(name):
    student = make(name, snn_units(alpha=1.0))
    # Currents high enough that every layer spikes, so that no gradient is zero for want of activity.
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.5)
    logits, features = student(torch.randn(1, 4, 3, 32, 32), timesteps=2, taps=["stage2"])
    assert logits.shape == (2, 4, 7)
    assert features.keys() == {"stage2"}
    assert features["stage2"].shape[:2] == (2, 4)
    values = set(features["stage2"].unique().tolist())
    if name.endswith("-membrane"):
        assert any(value != round(value) for value in values), "a tap is a current"
    elif name.endswith("-sew") or name == "spikformer":
        assert values <= set(range(20)), "a tap is a number of spikes"
        assert max(values) > 1
    else:
        assert values <= {0.0, 1.0}, "a tap of a student is spikes"
    logits.square().sum().backward()
    silent = [key for key, parameter in student.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert not silent


@pytest.mark.parametrize("name", ["vgg5", "resnet19", "resnet20-sew", "resnet20-membrane"])
@pytest.mark.parametrize("training", [False, True])
def test_constant_input_equals_the_repeated_one(name, training):
    """The stem runs once under direct encoding; the batch statistics are those of the unrepeated tensor."""
    images = torch.randn(1, 4, 3, 28, 28)
    student = make(name, snn_units()).train(training)
    once, _ = student(images, timesteps=3)
    statistics = {key: value.clone() for key, value in student.state_dict().items() if "running" in key}
    student = make(name, snn_units()).train(training)
    repeated, _ = student(images.expand(3, -1, -1, -1, -1), timesteps=3)
    # Statistics over a repeated tensor are summed in another order: a rounding difference can flip a spike.
    assert (once - repeated).abs().mean() < 0.02
    for key, value in student.state_dict().items():
        if key in statistics and "stem" in key and "running_mean" in key:
            torch.testing.assert_close(value, statistics[key])
    if training:
        norm = next(module for module in student.modules() if isinstance(module, nn.BatchNorm2d))
        alone = nn.BatchNorm2d(norm.num_features)
        convolution = next(module for module in student.modules() if isinstance(module, nn.Conv2d))
        alone(convolution(images[0]))
        first = next(value for key, value in statistics.items() if "running_var" in key)
        torch.testing.assert_close(first, alone.running_var)


def test_a_run_of_t_steps_holds_every_shorter_one():
    student = make("vgg5", snn_units()).eval()
    images = torch.randn(1, 4, 3, 28, 28)
    long, _ = student(images, timesteps=5)
    for steps in range(1, 5):
        short, _ = student(images, timesteps=steps)
        torch.testing.assert_close(short, long[:steps])


def test_there_is_nothing_to_reset():
    student = make("vgg5", snn_units()).eval()
    images = torch.randn(3, 2, 3, 28, 28)
    first, _ = student(images, timesteps=3)
    student(torch.randn(3, 5, 3, 28, 28), timesteps=3)
    again, _ = student(images, timesteps=3)
    assert torch.equal(first, again)


def test_wrong_number_of_steps():
    student = make("vgg5", snn_units())
    with pytest.raises(ValueError, match="has 2 time steps; expected 3, or 1"):
        student(torch.randn(2, 1, 3, 28, 28), timesteps=3)


@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19"])
def test_an_image_that_is_too_small_names_the_stage(name):
    with torch.device("meta"), pytest.raises(UserError, match=r"cannot run on 8 x 8 images \(stage5: "):
        probe(make(name, ann_units()), (3, 8, 8))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", ["x", "residual"])
def test_a_residual_of_another_precision_is_added_as_anywhere(precision, half):
    """As autocast leaves the product with a parameter in single precision: both are widened."""
    torch.manual_seed(0)
    unit = snn_units()(4)
    unit.time.steps, unit.time.batch = 2, 3
    x, residual = (torch.rand(6, 4, 5, 5).to(precision).float().requires_grad_() for _ in range(2))
    wanted = unit(x, residual)
    given = {"x": x, "residual": residual}
    given[half] = given[half].to(precision)
    found = unit(*given.values())
    assert torch.equal(found, wanted)
    ups = torch.rand_like(wanted)
    for one, other in zip(
        *(torch.autograd.grad(output, (x, residual), ups) for output in (wanted, found)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_residual_of_a_constant_and_a_spiking_tensor():
    act = snn_units()

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.unit = act(4)
            self.second = nn.Conv2d(4, 4, 1)
            self.join = act(4)

        def forward(self, x):
            y = self.first(x)
            return self.join(self.second(self.unit(y)), residual=y)

    network = Staged({"stage1": Skip()}, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    logits, features = network(torch.randn(1, 2, 3, 5, 5), timesteps=3, taps=["stage1"])
    assert logits.shape == (3, 2, 2)
    assert features["stage1"].shape == (3, 2, 4, 5, 5)


def test_the_sum_of_a_constant_and_a_changing_tensor():
    changing, constant = torch.randn(6, 3, 2, 2), torch.randn(2, 3, 2, 2)
    wanted = changing + constant.repeat(3, 1, 1, 1)
    assert torch.equal(Add()(changing, constant), wanted)
    assert torch.equal(Add()(constant, changing), wanted)
    assert torch.equal(Add()(constant, constant), 2 * constant)


def block_by_hand(x, block, style):
    """A basic block of an ANN in evaluation, layer by layer, as its paper draws it."""
    relu = torch.relu

    def shortcut(end):
        return x if isinstance(block.shortcut, nn.Identity) else end(block.shortcut[1], block.shortcut[0](x))

    if style == "sew":
        y = relu(block.act1.norm(block.conv1(x)))
        return relu(block.act2.norm(block.conv2(y))) + shortcut(lambda unit, y: relu(unit.norm(y)))
    y = block.conv1(relu(x))
    return block.norm(block.conv2(relu(block.act2.norm(y)))) + shortcut(lambda norm, y: norm(y))


@pytest.mark.parametrize("style", ["sew", "membrane"])
def test_the_blocks_are_those_of_the_papers(style):
    network = make(f"resnet18-{style}", ann_units()).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.bias)
    x = torch.randn(2, 3, 16, 16)
    logits, features = network(x[None], taps=network.stage_names)
    convolution, end = network.stem
    x = torch.relu(end.norm(convolution(x))) if style == "sew" else end(convolution(x))
    for name in network.stage_names:
        for block in getattr(network, name):
            x = block_by_hand(x, block, style)
        torch.testing.assert_close(features[name][0], x)
    pooled = (x if style == "sew" else torch.relu(x)).mean((2, 3))
    torch.testing.assert_close(logits[0], network.head[-1](pooled))


def test_attention_is_the_product_in_any_order():
    """Of each head by itself, Q K^T V as the paper writes it; with spikes to the bit."""
    heads, (queries, keys, values) = 2, ((torch.rand(3, 6, 4, 5) < 0.4).float() for _ in range(3))
    wanted = torch.zeros_like(values)
    for head in (slice(0, 3), slice(3, 6)):
        q, k, v = (x[:, head].flatten(2).transpose(1, 2) for x in (queries, keys, values))
        wanted[:, head] = (q @ k.transpose(1, 2) @ v).transpose(1, 2).unflatten(2, (4, 5))
    assert torch.equal(Product(heads)(queries, keys, values), wanted)


@pytest.mark.parametrize(("width", "heads", "millions"), [(128, 8, 1.04), (256, 8, 4.15), (384, 12, 9.31)])
def test_the_transformers_sizes(width, heads, millions):
    with torch.device("meta"):
        network = build("spikformer", ann_units(), in_channels=3, num_classes=10, width=width, heads=heads)
    assert round(count(network) / 1e6, 2) == millions


@pytest.mark.parametrize("options", [{"width": 20}, {"width": 64, "heads": 5}])
def test_a_width_that_cannot_be_shared_out(options):
    with torch.device("meta"), pytest.raises(UserError, match="must be a multiple of 8, for the stem, and of heads = "):
        build("spikformer", ann_units(), in_channels=3, num_classes=10, **options)


class Recorder(TorchDispatchMode):
    """Every op that reaches the dispatcher, with the shapes and types of its tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls.append((str(op), [(a.shape, a.dtype) for a in args if isinstance(a, torch.Tensor)]))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_kernels_run_in_half_precision(name, dtype):
    """One norm_lif for each unit with a norm, in the type that the convolution hands over, and nothing cast between."""
    student, timesteps, batch = make(name, snn_units()), 3, 2
    images = torch.rand(1, batch, 3, 32, 32)
    with Recorder() as seen, torch.autocast("cpu", dtype=dtype):
        logits, _ = student(images, timesteps)
        (logits.float() ** 2).mean().backward()
    units = [module for module in student.modules() if isinstance(module, NormSpike)]
    fused = [unit for unit in units if unit.fused]
    assert fused
    assert all(unit.fused == isinstance(unit.norm, nn.BatchNorm2d) for unit in units)
    inputs = [tensors[0][1] for op, tensors in seen.calls if op == "lasnn.norm_lif.default"]
    assert inputs == [dtype] * len(fused)
    alone = [tensors[0][1] for op, tensors in seen.calls if op == "lasnn.lif.default"]
    assert alone == [dtype] * (len(units) - len(fused))
    assert sum(op == "lasnn.norm_lif_sums.default" for op, _ in seen.calls) == len(fused)

    cast = [tensors[0][0] for op, tensors in seen.calls if op == "aten._to_copy.default"]
    parameters = {parameter.shape for parameter in student.parameters()}
    features = [tuple(shape) for shape in cast if shape not in parameters]
    assert set(features) == {(batch, 3, 32, 32), (timesteps, batch, 7)}, "only the images and the logits are cast"


def test_a_neuron_with_a_forward_of_its_own_is_not_fused():
    """It would be ignored otherwise; its unit is batch norm, then that neuron."""

    class Doubled(LIF):
        def forward(self, current, v0=None, timesteps=None):
            return super().forward(2 * current, v0, timesteps)

    torch.manual_seed(0)
    time = TimeContext(3, 2)
    units = [NormSpike(4, neuron, time) for neuron in (LIF(), Doubled(), LIF(threshold=0.5))]
    assert [unit.fused for unit in units] == [True, False, True]
    y = torch.randn(6, 4, 5, 5)
    plain, doubled, half = (unit(y) for unit in units)
    assert not torch.equal(plain, doubled)
    assert torch.equal(doubled, half)


def test_the_fused_unit_is_batch_norm_then_neuron():
    torch.manual_seed(0)
    unit = NormSpike(4, LIF(tau=3.0, v_reset=-0.25), TimeContext(3, 2))
    norm = nn.BatchNorm2d(4)
    for training in (True, True, False):
        y = torch.randn(6, 4, 5, 5) + 1
        unit.train(training)
        norm.train(training)
        spikes, _ = lif(norm(y).unflatten(0, (3, 2)), tau=3.0, v_reset=-0.25)
        assert torch.equal(unit(y), spikes.flatten(0, 1))
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(unit.norm.state_dict()[key], value)


COMPILED_IN_FULL = [
    pytest.param(name, marks=pytest.mark.full) for name in ("vgg5", "resnet20-sew", "resnet20-membrane", "spikformer")
]


@pytest.mark.parametrize("name", ["resnet20", *COMPILED_IN_FULL])
def test_a_student_compiles_without_a_graph_break(name):
    student = make(name, snn_units("plif"))
    images = torch.rand(1, 2, 3, 32, 32)
    logits, _ = student(images, 3)
    wanted = torch.autograd.grad(logits.square().sum(), list(student.parameters()))
    student = make(name, snn_units("plif"))
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    logits, _ = compiled(images, 3)
    got = torch.autograd.grad(logits.square().sum(), list(student.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert {value.item() for key, value in student.state_dict().items() if key.endswith("tracked")} == {1}


def test_units_of_two_factories_are_refused():
    stages = {"stage1": snn_units()(3), "stage2": snn_units()(3)}
    with pytest.raises(ValueError, match="one `act` factory"):
        Staged(stages, nn.Identity())


def test_an_ann_has_one_step():
    teacher = make("vgg5", ann_units())
    assert any(isinstance(module, NormActivate) for module in teacher.modules())
    module = Teacher(teacher, (0.5,) * 3, (0.2,) * 3)
    logits, features = module.taps(torch.rand(2, 3, 28, 28), ["stage3"])
    assert logits.shape == (2, 7)
    assert features["stage3"].shape[0] == 2
    assert not any("mean" in key for key in module.state_dict() if "running" not in key)


def test_student_module():
    encoder = encoders.build("direct", (0.5,) * 3, (0.2,) * 3)
    student = Student(make("vgg5", snn_units()), encoder, 4).eval()
    images = torch.rand(2, 3, 28, 28)
    logits = student(images)
    assert logits.shape == (2, 7)
    torch.testing.assert_close(logits, student.steps(images)[0].mean(0))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        student(images * 255)


@pytest.mark.parametrize("act", [ann_units, snn_units])
def test_what_is_given_wrongly_is_said_with_what_to_give(act):
    network = make("vgg5", act())
    with pytest.raises(
        ValueError, match=r"the input is \[2, 3, 28, 28\]; it must be \[T, B, C, H, W\].*images\[None\]"
    ):
        network(torch.rand(2, 3, 28, 28))
    for tap in ("stage22", "stage22.current", "head"):
        with pytest.raises(UserError, match="unknown stage '.*known: stage1, stage2, stage3"):
            network(torch.rand(1, 2, 3, 28, 28), taps=[tap])
    # What can be read once is enough.
    assert list(network(torch.rand(1, 2, 3, 28, 28), taps=(name for name in ["stage2"]))[1]) == ["stage2"]


def test_what_is_not_staged_is_refused():
    architectures.register("plain")(lambda act, *, in_channels, num_classes: nn.Flatten())
    with pytest.raises(
        UserError, match=r"'plain' \(.*test_network.py:\d+\) returned Flatten, not lasnn.Staged; return Staged"
    ):
        build("plain", ann_units(), in_channels=1, num_classes=2)


@pytest.mark.parametrize("encoder", ["direct", "poisson", "rate"])
@pytest.mark.parametrize("architecture", ["vgg5", "resnet20", "resnet20-sew", "resnet20-membrane"])
def test_a_long_evaluation_in_pieces_has_the_spikes_of_the_whole(architecture, encoder, monkeypatch):
    network = make(architecture, snn_units("lif"), in_channels=1, width=16 if architecture == "resnet20" else 8)
    student = Student(network, encoders.build(encoder, (0.3,), (0.3,)), 19)
    images = torch.rand(2, 1, 8, 8)
    student.train().steps(images, generator=generator(0))
    student.eval()
    lengths = []
    network.register_forward_hook(lambda *_: lengths.append(network.time.steps))
    found = []
    for piece in (8, 19):
        monkeypatch.setattr("lasnn.network.student.TIME_CHUNK", piece)
        with torch.no_grad():
            found.append(student.steps(images, ["stage1"], generator(1)))
    assert lengths == [8, 8, 3, 19]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    compare = (
        torch.testing.assert_close
        if architecture.endswith("membrane")
        else partial(torch.testing.assert_close, rtol=0, atol=0)
    )
    compare(found[0][1]["stage1"], found[1][1]["stage1"])
    # With gradients, all at once.
    student.steps(images, generator=generator(1))
    assert lengths[-1] == 19
