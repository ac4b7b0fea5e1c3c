"""Energy with memory accesses: by hand, against SpikingJelly's model, and the firing rate of the break-even."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
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
from lasnn.network.units import ann_units, snn_units
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
    quiet = 6 * 4.6 + 12 * 12 * of + 4 * 0.9 + 4 * 8 * 4 * of
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


def test_the_break_even_is_where_both_take_the_same():
    """With every spike scaled by the same factor the student takes what its teacher takes."""
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
        for counts in (counter.spikes, counter.spikes_in, counter.additions):
            for count in counts.values():
                count *= factor
        scaled = counter.after(3)
        assert scaled["firing_rate"] == pytest.approx(rate)
        assert energy_with_memory(counter.layers(3), precision)["energy_uj"] == pytest.approx(aim)
        for counts in (counter.spikes, counter.spikes_in, counter.additions):
            for count in counts.values():
                count /= factor
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
    assert report.counts["synop"] == sum(layer.by_spikes.weight_reads for layer in counter.layers(3).values()) > 1000


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
