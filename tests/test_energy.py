"""Energy with memory accesses: by hand, against SpikingJelly's model, and the firing rate of the break-even."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from test_measure import images, small
from torch import nn

from lasnn import Staged
from lasnn.evaluation.energy import (
    PRECISIONS,
    LayerTraffic,
    access_pj,
    break_even_rate,
    energy_with_memory,
    in_each_precision,
    memory_accesses,
    teacher_layers,
)
from lasnn.evaluation.measure import measure
from lasnn.evaluation.operations import OperationCounter, dense_operations
from lasnn.network.staged import build
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import Add, NormSpike, Product, ann_units, snn_units
from lasnn.registry import encoders

# SpikingJelly's, which takes all operations as those of integers of 32 bits.
INTEGERS = replace(PRECISIONS["fp32"], add=0.1, multiply=3.1, state_add=0.1, state_multiply=3.1)


def test_an_access_costs_by_the_size_of_its_memory():
    assert access_pj(8 * 1024, 4) == 10
    assert access_pj(32 * 1024, 4) == 20
    assert access_pj(2**20, 4) == access_pj(2**24, 4) == 100
    assert access_pj(20 * 1024, 4) == 15
    assert access_pj(4 * 1024, 4) == 5
    assert access_pj(8 * 1024, 1) == 2.5


class Fixed(nn.Module):
    """Spikes the images as they are, which are 0 or 1."""

    spiking, causal, random = True, True, False

    def forward(self, images, timesteps, generator=None):
        return images.expand(timesteps, *images.shape)


def test_a_network_by_hand():
    """Two spikes of four reach three neurons; those with a current of 1 spike at each of the two steps."""
    act = snn_units("lif", threshold=1.0, reset="hard")
    first, head = nn.Conv2d(4, 3, 1, bias=False), nn.Linear(3, 2)
    network = Staged({"stage1": nn.Sequential(first, act())}, nn.Sequential(nn.Flatten(), head))
    with torch.no_grad():
        first.weight.zero_()
        first.weight[0, 0] = first.weight[1, 1] = 1.0
    student = Student(network, Fixed(), 2).eval()
    spikes = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 4, 1, 1)
    with torch.no_grad(), OperationCounter(student, 2) as counter:
        student.steps(spikes)
    result = counter.after(2)
    assert result["firing_rate"] == pytest.approx(2 / 3)
    assert result["memory_accesses"] == {
        # 2 spikes at 2 steps meet 3 weights each, and 3 voltages are read and written for each.
        "stage1.0": {"weight_reads": 12, "potential_reads": 12, "potential_writes": 12, "spike_reads": 4},
        # 3 voltages at 2 steps, 4 spikes.
        "stage1.1": {"potential_reads": 6, "potential_writes": 6, "spike_writes": 4},
        # 4 spikes meet 2 weights each; 2 biases at 2 steps.
        "head.1": {
            "weight_reads": 8,
            "bias_reads": 4,
            "potential_reads": 8,
            "potential_writes": 8,
            "spike_reads": 4,
        },
    }
    # pJ of one access: below 8 KiB in proportion to the bytes, 10 pJ for 4 bytes at 8192.
    of = 10 / 8192
    message = 4000 * of
    by_hand = {
        "stage1.0": 12 * 0.9 + 12 * 0.1 + 4 * 2 * 3.2 + 12 * 48 * of + 24 * 12 * of + 4 * message,
        # The leak multiplies 3 voltages at 2 steps; 4 resets.
        "stage1.1": 6 * 4.6 + 4 * 0.9 + 12 * 12 * of + 4 * message,
        "head.1": (8 + 4) * 0.9 + 8 * 0.1 + (8 + 4) * (6 + 2) * 4 * of + 16 * 8 * of + 4 * message,
    }
    found = result["energy_with_memory"]["fp32"]
    assert {name: 1e6 * value for name, value in found["by_layer"].items()} == pytest.approx(by_hand)
    assert 1e6 * found["energy_uj"] == pytest.approx(sum(by_hand.values()))
    assert sum(found["by_kind"].values()) == pytest.approx(found["energy_uj"])
    # The first layer reads the encoder's spikes, which do not depend on the neurons.
    quiet = by_hand["stage1.0"] + 6 * 4.6 + 12 * 12 * of + 4 * 0.9 + 4 * 8 * 4 * of
    assert 1e6 * found["without_spikes_uj"] == pytest.approx(quiet)


def test_a_current_that_is_constant_is_computed_once_and_read_at_each_step():
    student, data = small("direct"), images()
    one, three = measure(student, data, [1, 3], batch_size=16, seed=3)
    first = student.network.stage1[0]
    outputs, operations = 4 * 12 * 12, 12 * 12 * first.weight.numel()
    assert one["memory_accesses"]["stage1.0"] == {"weight_reads": operations, "value_reads": operations}
    assert three["memory_accesses"]["stage1.0"] == {
        "weight_reads": operations,
        "value_reads": operations,
        "potential_reads": 3 * outputs,
        "potential_writes": outputs,
    }
    # A run of one step reads, writes and adds the same as the first step of a longer one.
    [alone] = measure(student, data, [1], batch_size=16, seed=3)
    assert alone["energy_with_memory"] == one["energy_with_memory"]
    # A spike of the first layer is written once and read once, behind the pool.
    accesses = three["memory_accesses"]
    assert accesses["stage1.1"]["spike_writes"] == accesses["stage2.1"]["spike_reads"] > 0
    assert accesses["stage2.1"]["weight_reads"] == accesses["stage2.1"]["potential_writes"]


@pytest.mark.parametrize("style", ["activate-after-add", "sew", "membrane"])
def test_each_time_step_costs_its_own_in_a_run_of_time_chunks(style):
    """Nine steps are made as eight and one; the last alone does not look like a constant input."""
    torch.manual_seed(0)
    network = build("resnet20", snn_units(threshold=0.3), in_channels=2, num_classes=3, width=4, residual=style)
    student, data = Student(network, encoders.build("direct", (0.5, 0.5), (0.25, 0.25)), 9).eval(), images()
    results = measure(student, data, range(1, 10), batch_size=16, seed=3)
    counts = [result["operations"]["multiply_additions"] for result in results]
    steps = [after - before for before, after in pairwise(counts)]
    assert steps == pytest.approx([steps[0]] * 8)
    assert (steps[0] > 0) == (style == "membrane")
    energies = [result["energy_with_memory"]["int8"]["energy_uj"] for result in results]
    assert energies == sorted(energies)
    # What a shortcut adds: spikes or currents to a voltage, or current to current.
    kinds = set().union(*(part for name, part in results[-1]["memory_accesses"].items() if "act" in name))
    assert {"potential_reads", "potential_writes", "spike_writes"} <= kinds
    assert ("spike_reads" in kinds) == (style == "activate-after-add")


def scale(counter, factor):
    """Scale what neurons cause, and leave what the encoder does."""
    for counts, of_encoder in (
        (counter.spikes, {}),
        (counter.spikes_in, counter.spikes_in_of_encoder),
        (counter.additions, counter.additions_of_encoder),
    ):
        for name, count in counts.items():
            count += (factor - 1) * (count - of_encoder.get(name, 0))


@pytest.mark.parametrize("encoder", ["poisson", "rate"])
def test_what_is_left_without_spikes_is_what_silent_neurons_take(encoder):
    """The encoder's spikes stay: they are of the images."""
    student, data = small(encoder), images(8)
    measured = measure(student, data, [3], batch_size=8, seed=5)[0]
    for unit in student.network.modules():
        if isinstance(unit, NormSpike):
            unit.neuron.options["threshold"] = 1e6
    silent = measure(student, data, [3], batch_size=8, seed=5)[0]
    assert silent["firing_rate"] == 0 < measured["firing_rate"]
    for name, found in measured["energy_with_memory"].items():
        left = silent["energy_with_memory"][name]["energy_uj"]
        assert found["without_spikes_uj"] == pytest.approx(left)
        assert left > silent["energy_with_memory"][name]["by_kind"]["potentials"] > 0


def test_the_break_even_is_where_both_take_the_same():
    """With every neuron's spikes scaled by the same factor the student takes what its teacher takes."""
    student, data = small("poisson"), images(40)
    torch.manual_seed(0)
    act = ann_units()
    stage = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), act(4))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    teacher = in_each_precision(
        teacher_layers(Teacher(Staged({"stage1": stage}, head), (0.5, 0.5), (0.2, 0.2)).eval(), (2, 12, 12))
    )
    with torch.no_grad(), OperationCounter(student, 3) as counter:
        student.steps(data.pixels.float() / 255, generator=torch.Generator().manual_seed(5))
    result = counter.after(3)
    for name, precision in PRECISIONS.items():
        # Above what the student takes without spikes.
        aim = teacher[name]["energy_uj"] + result["energy_with_memory"][name]["without_spikes_uj"]
        rate = break_even_rate(result["firing_rate"], result["energy_with_memory"][name], aim)
        factor = rate / result["firing_rate"]
        scale(counter, factor)
        scaled = counter.after(3)
        assert scaled["firing_rate"] == pytest.approx(rate)
        assert energy_with_memory(counter.layers(3), precision)["energy_uj"] == pytest.approx(aim)
        scale(counter, 1 / factor)
    mine = result["energy_with_memory"]["fp32"]
    assert break_even_rate(0.1, mine, mine["without_spikes_uj"] / 2) == 0
    silent = {"energy_uj": 1.0, "without_spikes_uj": 1.0}
    assert break_even_rate(0.0, silent, 5.0) is None


@pytest.mark.parametrize("architecture", ["vgg5", "resnet20", "spikformer"])
def test_a_teacher_is_counted_whole(architecture):
    """All multiply-additions that PyTorch's own counter finds, each with a weight and a value, or two values, read."""
    torch.manual_seed(0)
    network = build(architecture, ann_units(), in_channels=3, num_classes=5, width=16)
    teacher = Teacher(network, (0.5,) * 3, (0.2,) * 3).eval()
    layers = teacher_layers(teacher, (3, 32, 32))
    counted = sum(layer.always.multiply_additions for layer in layers.values())
    assert counted == dense_operations(teacher, (3, 32, 32), torch.device("cpu"))
    accesses = memory_accesses(layers)
    reads = sum(part.get("weight_reads", 0) for part in accesses.values())
    products = sum(layer.always.multiply_additions for layer in layers.values() if layer.size.kind == "product")
    assert reads == counted - products
    energies = in_each_precision(layers)
    assert energies["int8"]["energy_uj"] < energies["fp32"]["energy_uj"] / 4
    assert energies["fp32"]["without_spikes_uj"] == energies["fp32"]["energy_uj"]


@pytest.mark.full
@pytest.mark.parametrize("neuron", ["if", "lif"])
def test_spiking_networks_take_what_spikingjelly_says(neuron):
    """Its model of the same paper, where a spike meets no padding: 1 x 1 convolutions and linear layers."""
    analytical = pytest.importorskip("spikingjelly.activation_based.op_counter.analytical_energy")
    from spikingjelly.activation_based import functional, layer
    from spikingjelly.activation_based import neuron as theirs

    torch.manual_seed(0)
    options = {"decay_input": True} if neuron == "lif" else {}
    act = snn_units(neuron, threshold=0.3, **options)
    layers = [nn.Conv2d(2, 40, 1), nn.Conv2d(40, 70, 1), nn.Linear(70 * 64, 3)]
    stages = {"stage1": nn.Sequential(layers[0], act()), "stage2": nn.Sequential(layers[1], act())}
    network = Staged(stages, nn.Sequential(nn.Flatten(), layers[2]))
    student = Student(network, encoders.build("poisson", (0.5, 0.5), (0.25, 0.25)), 3).eval()
    batch = images(1, size=8).pixels.float() / 255
    with torch.no_grad(), OperationCounter(student, 3) as counter:
        student.steps(batch, generator=torch.Generator().manual_seed(5))
    spikes = student.encoder(batch, 3, torch.Generator().manual_seed(5))

    node = theirs.IFNode if neuron == "if" else theirs.LIFNode
    first, second, last = layer.Conv2d(2, 40, 1), layer.Conv2d(40, 70, 1), layer.Linear(70 * 64, 3)
    for mine, other in zip(layers, (first, second, last), strict=True):
        other.load_state_dict(mine.state_dict())
    peer = nn.Sequential(first, node(v_threshold=0.3), second, node(v_threshold=0.3), layer.Flatten(), last)
    functional.set_step_mode(peer, "m")
    config = analytical.LemaireEnergyConfig(strict=False)
    with pytest.warns(RuntimeWarning, match="Flatten"):
        report = analytical.estimate_lemaire_energy(peer, spikes, config=config)
    ours = energy_with_memory(counter.layers(3), INTEGERS)
    kinds = {kind: 1e6 * value for kind, value in ours["by_kind"].items()}
    assert kinds.pop("values") == 0
    names = {"ops": "operations", "addressing": "addressing", "params": "weights", "potential": "potentials"}
    expected = {name: report.breakdown_pj[f"{key}_pj"] for key, name in {**names, "inout": "spikes"}.items()}
    assert kinds == pytest.approx(expected)
    assert 1e6 * ours["energy_uj"] == pytest.approx(report.total_pj)
    # Those of the encoder's spikes are among what does not hang on the neurons.
    reads = sum((layer.always + layer.by_spikes).weight_reads for layer in counter.layers(3).values())
    assert report.counts["synop"] == reads > 1000


@pytest.mark.full
def test_networks_of_real_values_take_what_spikingjelly_says():
    analytical = pytest.importorskip("spikingjelly.activation_based.op_counter.analytical_energy")
    torch.manual_seed(0)
    act = ann_units()
    layers = [nn.Conv2d(2, 20, 3, padding=1), act(), nn.Conv2d(20, 30, 3, stride=2, padding=1, groups=2), act()]
    head = nn.Sequential(nn.Flatten(), nn.Linear(30 * 16, 3))
    teacher = Teacher(Staged({"stage1": nn.Sequential(*layers)}, head), (0.0, 0.0), (1.0, 1.0)).eval()
    ours = energy_with_memory(teacher_layers(teacher, (2, 8, 8)), INTEGERS)
    peer = nn.Sequential(layers[0], nn.ReLU(), layers[2], nn.ReLU(), *head)
    config = analytical.LemaireEnergyConfig(strict=False)
    with pytest.warns(RuntimeWarning, match="ReLU"):
        report = analytical.estimate_lemaire_energy(peer, torch.rand(1, 2, 8, 8), config=config)
    kinds = {kind: 1e6 * value for kind, value in ours["by_kind"].items()}
    names = {"ops": "operations", "addressing": "addressing", "params": "weights", "inout": "values"}
    assert {name: kinds[name] for name in names.values()} == pytest.approx(
        {name: report.breakdown_pj[f"{key}_pj"] for key, name in names.items()}
    )
    assert 1e6 * ours["energy_uj"] == pytest.approx(report.total_pj)


@pytest.mark.full
def test_weights_and_voltages_are_read_as_often_as_spikingjelly_says():
    """Its other counter leaves out the padding too, so that any convolution can be compared."""
    counters = pytest.importorskip("spikingjelly.activation_based.op_counter")
    from spikingjelly.activation_based import functional, layer, neuron

    torch.manual_seed(0)
    act = snn_units("if", threshold=0.3)
    convolution = {"kernel_size": 3, "stride": 2, "padding": 1}
    layers = [nn.Conv2d(2, 8, **convolution), nn.Linear(8 * 36, 3)]
    network = Staged({"stage1": nn.Sequential(layers[0], act())}, nn.Sequential(nn.Flatten(), layers[1]))
    student = Student(network, encoders.build("poisson", (0.5, 0.5), (0.25, 0.25)), 3).eval()
    batch = images(2).pixels.float() / 255
    with torch.no_grad(), OperationCounter(student, 3) as counter:
        student.steps(batch, generator=torch.Generator().manual_seed(5))
    peer = nn.Sequential(
        layer.Conv2d(2, 8, **convolution), neuron.IFNode(v_threshold=0.3), layer.Flatten(), layer.Linear(8 * 36, 3)
    )
    for mine, other in zip(layers, (peer[0], peer[3]), strict=True):
        other.load_state_dict(mine.state_dict())
    functional.set_step_mode(peer, "m")
    counted = counters.NeuromorphicMemoryAccessCounter()
    spikes = student.encoder(batch, 3, torch.Generator().manual_seed(5))
    with torch.no_grad(), counters.ModuleCounterMode([counted], model=peer):
        peer(spikes)
    total = {key: value / 4 / 2 for key, value in counted.get_counts()["Global"].items()}
    ours = memory_accesses(counter.layers(3))
    assert total["weight_read_bytes"] == sum(part.get("weight_reads", 0) for part in ours.values()) > 100
    assert total["bias_read_bytes"] == sum(part.get("bias_reads", 0) for part in ours.values())
    # What a neuron reads and writes at each step; each spike's additions are another matter.
    assert total["neuron_state_read_bytes"] == ours["stage1.1"]["potential_reads"]
    assert total["neuron_state_write_bytes"] == ours["stage1.1"]["potential_writes"]


def test_layers_of_a_student_come_in_the_order_of_its_network():
    student, data = small("direct"), images()
    with torch.no_grad(), OperationCounter(student, 3) as counter:
        student.steps(data.pixels.float() / 255)
    layers = counter.layers(3)
    assert list(layers) == ["stage1.0", "stage1.1", "stage2.1", "stage2.2", "stage3.0", "stage3.1", "head.2"]
    assert all(isinstance(layer, LayerTraffic) for layer in layers.values())


class Called(nn.Module):
    """A function as a module, with weights of its own."""

    def __init__(self, function, **weights):
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterDict(weights)

    def forward(self, x):
        return self.function(x, self.tensors) if len(self.tensors) else self.function(x)


def counted_with(stages, head, encoder=None, steps=2, batch=None):
    """The counter after a run on images of zeros and ones, which are spikes unless another encoder is given."""
    student = Student(Staged(stages, head), encoder or Fixed(), steps).eval()
    if batch is None:
        batch = (torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    with torch.no_grad(), OperationCounter(student, steps) as counter:
        student.steps(batch)
    return counter


def test_functions_cost_what_modules_cost():
    """The same network, once of modules and once of functions and operators; spikes and currents are added."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=2)]
    transposed, along = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1), nn.Conv1d(4, 6, 3, padding=1)
    last = nn.Linear(6 * 4, 3)
    found = []
    for functional in (False, True):
        act = snn_units(threshold=0.2)

        class Modules(nn.Module):
            def __init__(self, act=act):
                super().__init__()
                self.layers, self.transposed, self.along = nn.ModuleList(layers), transposed, along
                self.acts = nn.ModuleList(act() for _ in range(4))
                self.first, self.second, self.pool, self.up = Add(), Add(), nn.AvgPool2d(2), nn.Upsample(scale_factor=2)
                self.shuffle, self.flat, self.unflat = nn.ChannelShuffle(2), nn.Flatten(2), nn.Unflatten(2, (7, 7))

            def forward(self, x):
                x = self.acts[0](self.layers[0](x))
                x = self.first(x, self.acts[1](self.layers[0](x[:, :4])))
                x = self.up(self.pool(self.shuffle(x)))
                x = self.acts[2](self.layers[1](x))
                x = self.transposed(x)
                # Currents.
                x = self.acts[3](self.second(x, x))
                return self.unflat(self.along(self.flat(x)))

        class Functions(Modules):
            def forward(self, x):
                one, two = self.layers
                x = self.acts[0](F.conv2d(x, one.weight, one.bias, padding=1))
                y = self.acts[1](F.conv2d(x[:, :4], one.weight, one.bias, padding=1))
                x = x + y
                x = x.unflatten(1, (2, 3)).transpose(1, 2).reshape(x.shape)
                x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)
                x = self.acts[2](F.conv2d(x, two.weight, two.bias, 2, 1, groups=2))
                x = F.conv_transpose2d(x, self.transposed.weight, self.transposed.bias, 2, 1)
                x = self.acts[3](torch.add(x, x))
                return F.conv1d(x.flatten(2), self.along.weight, self.along.bias, padding=1).reshape(-1, 6, 7, 7)

        stages = {"stage1": (Functions if functional else Modules)(), "stage2": act()}
        if functional:
            head = Called(lambda x, w: F.linear(F.adaptive_avg_pool2d(x, 2).flatten(1), w["w"], w["b"]))
            head.tensors.update({"w": last.weight, "b": last.bias})
        else:
            head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), last)
        found.append(counted_with(stages, head))
    modules, functions = (counter.after(2) for counter in found)
    assert not modules["counting_notes"]
    assert not functions["counting_notes"]
    assert modules["operations"]["multiply_additions"] == functions["operations"]["multiply_additions"] == 0
    assert modules["operations"]["additions"] > 1000
    assert functions["operations"] == pytest.approx(modules["operations"])
    assert functions["energy_uj"] == pytest.approx(modules["energy_uj"])
    # The sum of currents is called after where it is, the head after its weight.
    names = {"stage1.second": "stage1.add", "head.2": "head.tensors.w"}
    for precision in PRECISIONS:
        ours, theirs = (found["energy_with_memory"][precision]["by_layer"] for found in (functions, modules))
        assert ours == pytest.approx({names.get(name, name): energy for name, energy in theirs.items()})


def padded_with(x):
    """As the shortcut of a ResNet without a convolution fills up its channels."""
    return torch.cat([x, torch.zeros_like(x)], 1)[:, :4]


@pytest.mark.parametrize(
    ("function", "share"),
    [
        (lambda x: F.avg_pool2d(x, 2), 4),
        (lambda x: F.adaptive_avg_pool2d(x, 4), 4),
        (lambda x: x.unflatten(2, (4, 2)).sum(3), 1),
        (lambda x: F.max_pool2d(x, 2), 1),
        (lambda x: x + x, 1),
        (lambda x: x.clone().add_(x), 1),
        (lambda x: torch.cat([x, x], 2), 1),
        (lambda x: torch.cat(x.chunk(2, 1), 1), 1),
        (padded_with, 1),
        (lambda x: F.pad(x, (1, 2, 3, 4)), 1),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), 1),
        (lambda x: F.interpolate(x, scale_factor=2), 1),
        (lambda x: F.pixel_unshuffle(x, 2)[:, ::4], 1),
        (lambda x: x.permute(0, 2, 3, 1).reshape(-1, 64, 4).transpose(1, 2).unflatten(2, (8, 8)), 1),
        (lambda x: torch.roll(x, 1, 2)[:, [3, 1, 2, 0]], 1),
        (lambda x: x.repeat_interleave(2, 3).squeeze().contiguous(memory_format=torch.channels_last), 1),
        (lambda x: 0.5 * x / 4, 8),
    ],
)
def test_what_is_made_of_spikes_stays_spikes(function, share):
    """A 1 x 1 convolution behind it costs its outputs for each spike; a value of 1 stands for `share` spikes."""
    layer = nn.Conv2d(4, 5, 1)
    batch = (torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    counter = counted_with({"stage1": nn.Sequential(Called(function), layer)}, nn.Flatten(), batch=batch)
    expected = 5 * share * float(function(batch).sum())
    assert not counter.notes
    assert not counter.multiply_additions
    assert counter.additions["stage1.1"].tolist() == pytest.approx([expected] * 2)
    assert counter.batch_additions.sum(1).tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize(
    ("pool", "sums"),
    [
        (lambda x: F.avg_pool2d(x, 3, 2, 1), lambda x: 9 * F.avg_pool2d(x, 3, 2, 1)),
        (
            lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
            lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=1),
        ),
        (
            lambda x: F.avg_pool2d(x, (3, 2), 2, ceil_mode=True),
            lambda x: 6 * F.avg_pool2d(F.pad(x, (0, 0, 0, 1)), (3, 2), 2),
        ),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), lambda x: 4 * F.avg_pool2d(x, 2)),
        (
            lambda x: F.adaptive_avg_pool2d(x, (3, 8)),
            lambda x: torch.stack([x[:, :, first:last].sum(2) for first, last in ((0, 3), (2, 6), (5, 8))], 2),
        ),
    ],
)
def test_a_spike_in_a_pool_is_one_in_each_window_that_holds_it(pool, sums):
    batch = (torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    stage = nn.Sequential(Called(pool), nn.Conv2d(4, 5, 1))
    counter = counted_with({"stage1": stage}, nn.Flatten(), batch=batch)
    assert not counter.notes
    assert counter.additions["stage1.1"].tolist() == pytest.approx([5 * float(sums(batch).sum())] * 2)


def test_a_residual_of_none_and_an_input_by_name_cost_what_is_computed():
    class Unusual(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.fc = ann_units()(4), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(input=self.act(x, None).mean((2, 3)))

    network = Staged({"stage1": nn.Conv2d(2, 4, 1)}, Unusual())
    found = teacher_layers(Teacher(network, (0.5, 0.5), (0.2, 0.2)).eval(), (2, 8, 8))
    assert (found["head.act"].always.additions, found["head.act"].always.value_reads) == (4 * 64, 0)
    assert found["head.fc"].always.multiply_additions == 12


def test_a_difference_of_spikes_is_as_many_as_both():
    layer = nn.Conv2d(4, 5, 1)
    batch = (torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    for function, share in ((lambda x: x - x.flip(2), 2), (lambda x: -x, 1), (lambda x: F.avg_pool2d(x - x, 2), 2)):
        counter = counted_with({"stage1": nn.Sequential(Called(function), layer)}, nn.Flatten(), batch=batch)
        assert counter.additions["stage1.1"].tolist() == pytest.approx([5 * share * float(batch.sum())] * 2)


class Ternary(nn.Module):
    """Spikes of 1 where the current is positive, of -1 where it is negative."""

    def forward(self, current, v0=None, timesteps=None):
        return current.sign().expand(timesteps, *current.shape[1:]), current[-1]


def test_a_negative_spike_is_one_spike():
    act = snn_units()
    unit = act()
    unit.neuron = Ternary()
    # One of three channels is positive and two are negative, at each of 16 pixels and 2 steps.
    first, second = nn.Conv2d(1, 3, 1, bias=False), nn.Conv2d(3, 5, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1, 1))
    stages = {"stage1": nn.Sequential(first, unit), "stage2": nn.Sequential(nn.AvgPool2d(2), second, act())}
    counter = counted_with(stages, nn.Sequential(nn.Flatten(), nn.Linear(20, 2)), batch=torch.ones(1, 1, 4, 4))
    result = counter.after(2)
    assert result["firing_rate_by_layer"]["stage1.1"] == 1
    # Each costs what it would cost behind the pool.
    assert float(counter.additions["stage2.1"].sum()) == 2 * 16 * 3 * 5
    assert result["energy_uj"] > 0
    assert result["memory_accesses"]["stage1.1"]["spike_writes"] == 2 * 16 * 3


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.ConvTranspose2d(4, 2, (2, 3), dilation=(1, 2), padding=(0, 1)),
        nn.Conv2d(4, 6, (3, 2), stride=(3, 1), dilation=2, padding=(2, 0), groups=2),
        nn.Conv2d(4, 6, 2, padding="same"),
        nn.Conv1d(4, 3, 5, stride=3, padding=4),
        nn.ConvTranspose1d(4, 3, 3, stride=2),
        nn.Conv3d(4, 2, 3, padding=1),
        nn.Linear(8, 3),
    ],
)
def test_layers_of_every_kind_cost_their_connections(layer):
    """By brute force: with weights of one the outputs sum up what the spikes reach."""
    size = {"1d": "2", "2d": "2 3", "3d": "3 4"}.get(type(layer).__name__[-2:], "3")
    shape = {"2": (4, 64), "2 3": (4, 8, 8), "3 4": (4, 2, 4, 8), "3": (4, 8, 8)}[size]
    batch = (torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    stages = {"stage1": nn.Sequential(nn.Flatten(1), nn.Unflatten(1, shape), layer)}
    counter = counted_with(stages, nn.Flatten(), batch=batch)
    spikes, before = batch.view(3, *shape), {name: value.clone() for name, value in layer.named_parameters()}
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.zero_()
        by_image = layer(spikes).flatten(1).sum(1)
        for name, value in before.items():
            layer.get_parameter(name).copy_(value)
    assert counter.batch_additions.tolist() == [pytest.approx(by_image.tolist())] * 2
    assert not counter.notes
    # Fed by real values it costs what PyTorch counts, at each step.
    stages = {"stage1": nn.Sequential(nn.Sigmoid(), nn.Flatten(1), nn.Unflatten(1, shape), layer)}
    counter = counted_with(stages, nn.Flatten(), batch=batch)
    student = Student(Staged(stages, nn.Flatten()), Fixed(), 1).eval()
    dense = dense_operations(student.steps, (4, 8, 8), torch.device("cpu"))
    assert float(counter.multiply_additions["stage1.3"].sum()) == 2 * 3 * dense > 0
    assert counter.notes == {"stage1.3": "fed by real values: sigmoid in stage1.0"}
    teacher = teacher_layers(Teacher(Staged(stages, nn.Flatten()), (0.5,) * 4, (0.2,) * 4).eval(), (4, 8, 8))
    assert teacher["stage1.3"].always.multiply_additions == dense


def attend(x, weights):
    """Attention as networks write it: 64 pixels of 4 channels, two heads."""
    q, k, v = (x.flatten(2).transpose(1, 2) @ weights["w"]).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
    return ((q @ k.transpose(-2, -1)) @ v).transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, (8, 8))


def test_what_cannot_be_told_is_charged_as_real_values_and_said():
    batch = (torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    act = snn_units(threshold=0.2)
    attention = Called(attend, w=torch.randn(4, 12))
    # The second reads spikes, whose product is none that the counter knows; an LSTM is no layer that it knows.
    stages = {"stage1": nn.Sequential(attention, act()), "stage2": nn.Sequential(Called(attend_to_itself), act())}
    stages["stage3"] = nn.Sequential(nn.Flatten(2), nn.LSTM(64, 5, batch_first=True), Called(lambda found: found[0]))
    counter = counted_with(stages, nn.Sequential(nn.Flatten(), nn.Linear(20, 2)), batch=batch)
    product = "charged as one of real values: a product of two signals"
    assert counter.notes == {
        "stage1.0.bmm": product,
        "stage1.0.bmm2": product,
        "stage2.0.bmm": product,
        "stage3.1.weight_ih_l0": "not counted: mkldnn_rnn_layer is not known",
        "head.1": "fed by real values: mkldnn_rnn_layer in stage3.1",
    }
    assert counter.additions["stage1.0.tensors.w"].tolist() == pytest.approx([12 * float(batch.sum())] * 2)
    # Of each of 3 images: 64 x 64 pairs of pixels for two of each head's channels.
    for name in ("stage1.0.bmm", "stage1.0.bmm2"):
        assert counter.multiply_additions[name].tolist() == [3 * 2 * 64 * 64 * 2] * 2
    assert counter.multiply_additions["stage2.0.bmm"].tolist() == [3 * 4 * 8 * 8 * 8] * 2
    result = counter.after(2)
    assert result["counting_notes"] == counter.notes
    assert {"stage1.0.bmm", "stage2.0.bmm", "head.1"} <= set(result["energy_uj_by_layer"])


def attend_to_itself(x):
    return x @ x.transpose(-2, -1)


def test_spikes_whose_step_cannot_be_told_are_spread_evenly():
    """PyTorch's own attention puts the pixels first; how many spikes there are is still known."""
    layer = nn.Linear(4, 3, bias=False)
    batch = (torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    moved = Called(lambda x: x.flatten(2).permute(2, 0, 1))
    counter = counted_with(
        {"stage1": nn.Sequential(moved, layer, Called(lambda x: x.transpose(0, 1)))}, nn.Flatten(), batch=batch
    )
    assert counter.additions["stage1.1"].tolist() == pytest.approx([3 * float(batch.sum())] * 2)
    assert counter.batch_additions.flatten().tolist() == pytest.approx([float(batch.sum())] * 6)
    assert counter.notes == {"stage1.1": "fed by spikes whose step and image cannot be told: spread evenly over both"}


def test_hooks_are_no_part_of_the_network():
    """What a forward hook computes is not counted, and what it puts in an output's place are real values."""
    layer, last = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1)
    pool = nn.AvgPool2d(2)
    stages = {"stage1": nn.Sequential(pool, layer, snn_units(threshold=0.2)(), last)}
    plain = counted_with(stages, nn.Flatten())

    def compute(module, inputs, output):
        F.conv2d(inputs[0], module.weight)

    hook = layer.register_forward_hook(compute)
    assert counted_with(stages, nn.Flatten()).after(2) == plain.after(2)
    hook.remove()
    pool.register_forward_hook(lambda module, inputs, output: output.sqrt())
    assert counted_with(stages, nn.Flatten()).notes == {"stage1.1": "fed by real values: AvgPool2d"}


@pytest.mark.parametrize("encoder", ["direct", "poisson"])
def test_the_dense_count_does_not_depend_on_time_chunks(encoder):
    """By hand: under direct encoding the first layer runs once, whatever T."""
    student = small(encoder)
    first = 12 * 12 * 4 * 2 * 9
    step = 3 * 3 * 6 * 2 * 9 + 2 * 2 * 5 * 6 * 4 + 5 * 3
    for steps in (1, 8, 9, 16, 32):
        student.timesteps = steps
        dense = dense_operations(student.steps, (2, 12, 12), torch.device("cpu"))
        assert dense == first * (1 if encoder == "direct" else steps) + step * steps
        assert student.timesteps == steps


@pytest.mark.parametrize("architecture", ["vgg5", "resnet20", "resnet20-sew", "resnet20-membrane", "spikformer"])
def test_there_is_nothing_to_note_of_what_ships(architecture):
    """Every layer is counted, under its own name."""
    torch.manual_seed(0)
    name, _, style = architecture.partition("-")
    options = {"residual": style} if style else {}
    network = build(name, snn_units(threshold=0.3), in_channels=2, num_classes=3, width=16, **options)
    student = Student(network, encoders.build("direct", (0.5, 0.5), (0.25, 0.25)), 9).eval()
    with torch.no_grad(), OperationCounter(student, 9) as counter:
        student.steps(images(2).pixels.float() / 255)
    assert not counter.notes
    kinds = nn.Conv2d, nn.Linear, Product
    layers = {name for name, module in network.named_modules() if isinstance(module, kinds)}
    assert layers == {*counter.additions, *counter.multiply_additions}


def test_inference_mode_and_gradients_change_nothing():
    """In either PyTorch shows a network's operations in another form."""
    pools = Called(lambda x: F.avg_pool2d(x.transpose(2, 3), 2).flatten(1))
    stages = {"stage1": nn.Sequential(pools, nn.Linear(64, 32), nn.Unflatten(1, (8, 2, 2)), snn_units(threshold=0.1)())}
    student = Student(Staged(stages, nn.Sequential(nn.Flatten(), nn.Linear(32, 3))), Fixed(), 2).eval()
    batch, found = (torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.3).float(), []
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode(), OperationCounter(student, 2) as counter:
            student.steps(batch)
        found.append(counter.after(2))
    assert found[0] == found[1] == found[2]
    assert found[0]["operations"]["additions"] > 0


def test_what_is_constant_is_counted_at_each_step_once_it_is_written_out():
    """Nine steps, made as eight and one: the first layer runs once, the one behind the copies at each step."""
    act = snn_units(threshold=0.2)
    first, second = nn.Conv2d(2, 4, 1, bias=False), nn.Conv2d(4, 5, 1, bias=False)

    class Repeat(nn.Module):
        def forward(self, x):
            return x.repeat(network.time.steps, 1, 1, 1)

    network = Staged(
        {"stage1": nn.Sequential(first, Repeat(), second, act())}, nn.Sequential(nn.Flatten(), nn.Linear(45, 3))
    )
    student = Student(network, encoders.build("direct", (0.5, 0.5), (0.25, 0.25)), 9).eval()
    with torch.no_grad(), OperationCounter(student, 9) as counter:
        student.steps(images(4, size=3).pixels.float() / 255)
    assert counter.multiply_additions["stage1.0"].tolist() == [4 * 9 * 8, *[0] * 8]
    assert counter.multiply_additions["stage1.2"].tolist() == [4 * 9 * 20] * 9
