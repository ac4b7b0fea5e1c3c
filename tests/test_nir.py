"""NIR graphs: run from the file by NIR's own equations, they give the network's spikes."""

import json
import re

import nir
import nir_reference
import numpy as np
import pytest
import torch
from test_network import MOST, make
from torch import nn

from common import ROOT, TINY, TINY_DATA
from lasnn import Staged, __version__, distill, load_run, neurons
from lasnn.errors import UserError
from lasnn.export import Disagreement, export, nir_graph
from lasnn.export.nir_graph import DT, neuron_node
from lasnn.export.nir_graph import build as to_nir
from lasnn.network.staged import build
from lasnn.network.units import NormSpike, snn_units
from lasnn.neuron import IF, LIF, Neuron

T, B, K = 4, 3, 5


def ready(network, size=28):
    """In eval mode with batch norms that let every layer spike."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.2, 0.8)
            module.momentum = None
    network.train()
    with torch.no_grad():
        for _ in range(2):
            network(torch.randn(1, 4, 1, size, size), T)
    return network.eval()


def spikes_of(network, x):
    """Logits [T, B, K] and the spikes [T, B, ...] of each unit's run."""
    spikes = []
    hooks = [
        unit.register_forward_hook(lambda _, __, output: spikes.append(network.time.unfold(output)))
        for unit in network.modules()
        if isinstance(unit, NormSpike)
    ]
    with torch.no_grad():
        logits, _ = network(x, T)
    for hook in hooks:
        hook.remove()
    return logits, spikes


def compare(network, tmp_path, size=28, exact=True):
    """Export, run the file, compare every spike."""
    graph, names = to_nir(network, (1, size, size))
    file = tmp_path / "student.nir"
    nir.write(file, graph)
    x = torch.randn(1, B, 1, size, size)
    logits, spikes = spikes_of(network, x)
    read_logits, read_spikes = nir_reference.run(file, x.expand(T, -1, -1, -1, -1))
    assert set(names) == set(read_spikes)
    assert all(0.01 < layer.mean() < 0.99 for layer in spikes[:-1]), "a silent network proves nothing"
    flips = [int((read_spikes[name] != layer).sum()) for name, layer in zip(names, spikes, strict=True)]
    if exact:
        assert flips == [0] * len(flips)
        torch.testing.assert_close(read_logits, logits, rtol=1e-5, atol=1e-5)
    else:
        # A rounding difference may flip a spike of a deep network, and others with it.
        assert sum(flips) <= 0.005 * sum(layer.numel() for layer in spikes)
        assert read_logits.mean(0).argmax(1).equal(logits.mean(0).argmax(1))


@pytest.mark.parametrize("name", [one for one in MOST if one.values != ("spikformer",)])
def test_every_architecture(name, tmp_path):
    network = ready(make(name, snn_units(), in_channels=1, num_classes=K), size=16)
    compare(network, tmp_path, size=16, exact=name in ("vgg5", "vgg9"))


OPTIONS = {
    "lif": [{"tau": 3.0}, {"decay_input": True, "threshold": 0.4}, {"v_reset": -0.5, "threshold": 0.7}],
    "plif": [{"tau": 2.5}],
    "if": [{}, {"threshold": 1.3, "v_reset": 0.25}],
}


@pytest.mark.parametrize(("name", "options"), [(name, each) for name in neurons for each in OPTIONS[name]])
@pytest.mark.parametrize("architecture", ["vgg5", "resnet19"])
def test_every_neuron(architecture, name, options, tmp_path):
    network = build(architecture, snn_units(name, **options), in_channels=1, num_classes=K, width=4)
    for unit in network.modules():
        if isinstance(unit, NormSpike) and name == "plif":
            nn.init.uniform_(unit.neuron.w, -1, 1)
    compare(ready(network, size=16), tmp_path, size=16, exact=architecture == "vgg5")


def own(stem, head=None):
    """A network of a user's making: `stem`, one stage on two channels, a linear head."""
    act = snn_units()
    stage = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), act(2))
    head = head or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, K))
    return Staged({"stage1": stage}, head, stem(act))


class Joined(nn.Module):
    """Branches of one input, added before the neuron."""

    def __init__(self, act, *branches):
        super().__init__()
        self.first, self.second = branches
        self.act = act()

    def forward(self, x):
        return self.act(self.first(x), residual=self.second(x))


class Functional(nn.Module):
    """Adds and flattens without modules."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * 4 * 4, K)

    def forward(self, x):
        x = x + x
        return self.linear(input=x.view(x.size(0), -1))


def first(act):
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=True), act(2))


PARTS = {
    "a pool before a neuron": lambda act: nn.Sequential(first(act), nn.AvgPool2d(2), act()),
    "a pool before a norm": lambda act: nn.Sequential(first(act), nn.AvgPool2d(2), act(2)),
    "two pools": lambda act: nn.Sequential(first(act), nn.AvgPool2d(3, stride=2), nn.AvgPool2d((1, 2)), act(2)),
    "a divisor": lambda act: nn.Sequential(first(act), nn.AvgPool2d(2, divisor_override=3), act(2)),
    "norms in a row": lambda act: nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2), act(2)),
    "a norm on spikes": lambda act: nn.Sequential(first(act), act(2)),
    "a pooled shortcut": lambda act: nn.Sequential(
        first(act), Joined(act, nn.Conv2d(2, 2, 2, stride=2), nn.AvgPool2d(2))
    ),
    "the same twice": lambda act: nn.Sequential(first(act), Joined(act, nn.Identity(), nn.Dropout(0.5))),
    "padding by name": lambda act: nn.Sequential(nn.Conv2d(1, 2, 3, padding="same", dilation=2), act(2)),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_users_networks(part, tmp_path):
    compare(ready(own(PARTS[part])), tmp_path)


def test_a_module_that_is_two_stages(tmp_path):
    act, pool = snn_units(), nn.AvgPool2d(2)
    stages = {"stage1": first(act), "stage2": pool, "stage3": nn.Sequential(nn.Conv2d(2, 2, 1), act(2)), "stage4": pool}
    head = nn.Sequential(nn.Flatten(), nn.Linear(2 * 7 * 7, K))
    compare(ready(Staged(stages, head)), tmp_path)


class Slow(LIF):
    """Its time constant is its own, and no option."""

    def __init__(self):
        Neuron.__init__(self, threshold=1.0)

    @property
    def time_constant(self):
        return 3.0


def test_a_neuron_with_a_time_constant_of_its_own():
    kept, own = neuron_node(LIF(tau=3.0), (2,)), neuron_node(Slow(), (2,))
    assert all(np.array_equal(getattr(kept, name), getattr(own, name)) for name in ("tau", "v_threshold", "v_reset"))


def test_a_forward_that_adds_and_flattens_by_itself(tmp_path):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(4), Functional())
    compare(ready(own(first, head)), tmp_path)


def test_the_graph_of_a_small_network():
    act = snn_units(tau=4.0)
    stem = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), act(2), nn.AvgPool2d(2))
    head = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten())
    network = Staged({}, head, stem).eval()
    norm = stem[1].norm
    with torch.no_grad():
        stem[0].weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
        head[0].weight.fill_(8.0)
        head[0].bias.fill_(0.25)
        norm.running_mean.copy_(torch.tensor([0.5, 0.0]))
        norm.running_var.fill_(0.25)
        norm.eps = 0.0
        norm.bias.copy_(torch.tensor([0.0, 3.0]))
    graph, units = to_nir(network, (1, 2, 2))
    assert set(graph.edges) == {
        ("input", "stem_0"),
        ("stem_0", "stem_1"),
        ("stem_1", "stem_2"),
        ("stem_2", "head_0"),
        ("head_0", "head_1"),
        ("head_1", "output"),
    }
    assert units == {"stem_1": "stem.1"}
    nodes = graph.nodes
    # (y - mean) / deviation + bias
    assert nodes["stem_0"].weight.flatten().tolist() == [2.0, -4.0]
    assert nodes["stem_0"].bias.tolist() == [-1.0, 3.0]
    assert nodes["stem_1"].tau[0, 0, 0] == np.float32(4 * DT)
    # A voltage of 0.25 fires, as it is above the number before it.
    assert set(nodes["stem_1"].v_threshold.flat) == {np.nextafter(np.float32(0.25), np.float32(0))}
    assert {float(value) for value in nodes["stem_1"].r.flat} == {1.0}
    assert isinstance(nodes["stem_2"], nir.SumPool2d)
    assert nodes["head_0"].weight.flatten().tolist() == [2.0] * 6
    assert nodes["head_0"].bias.tolist() == [0.25] * 3


EDGES = {
    "resnet20": {
        "stage1_0_act2": {"stage1_0_conv2", "stem_1"},
        "stage2_0_act2": {"stage2_0_conv2", "stage2_0_shortcut_0"},
    },
    # Each convolution sums the spikes of all blocks before it.
    "resnet20-sew": {
        "stage1_1_conv1": {"stem_1", "stage1_0_act2"},
        "stage1_2_conv1": {"stem_1", "stage1_0_act2", "stage1_1_act2"},
        "stage2_1_conv1": {"stage2_0_act2", "stage2_0_shortcut_1"},
    },
    # Each neuron sums their currents.
    "resnet20-membrane": {
        "stage1_0_act1": {"stem_0"},
        "stage1_1_act1": {"stem_0", "stage1_0_conv2"},
        "stage2_0_shortcut_0": {"stem_0", "stage1_0_conv2", "stage1_1_conv2", "stage1_2_conv2"},
        "stage2_1_act1": {"stage2_0_conv2", "stage2_0_shortcut_0"},
    },
}


@pytest.mark.parametrize("name", EDGES)
def test_a_residual_is_a_second_edge(name):
    network = ready(make(name, snn_units(), in_channels=1, num_classes=K))
    graph, _ = to_nir(network, (1, 28, 28))
    into = {name: {before for before, after in graph.edges if after == name} for name in graph.nodes}
    assert {node: into[node] for node in EDGES[name]} == EDGES[name]


class Own(LIF):
    """A user's neuron."""

    def forward(self, current, v0=None, timesteps=None):
        return super().forward(current * 2, v0, timesteps)


class Recurrent(nn.Module):
    """A module that returns more than one tensor."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(28, 28)

    def forward(self, x):
        return self.gru(x[0])[0][None]


class Deciding(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def refused(network):
    with pytest.raises(UserError) as error:
        to_nir(network, (1, 28, 28))
    return error.value.problems


def test_max_pools_are_refused_by_name():
    network = build("vgg9", snn_units(), in_channels=1, num_classes=K, width=4, pool="max").eval()
    assert refused(network) == ('stage2.0, stage3.0: NIR has no max-pooling; train with pool = "avg"',)


def test_attention_is_refused():
    network = make("spikformer", snn_units(), in_channels=1).eval()
    (problem,) = refused(network)
    where = "stage2.3.0.inner.product, stage2.4.0.inner.product, stage3.0.0.inner.product and 1 more: "
    assert problem == f"{where}NIR has no product of two signals, as attention makes; export to onnx or pt2"


def test_a_soft_reset_is_refused():
    network = build("vgg9", snn_units(reset="soft"), in_channels=1, num_classes=K, width=4).eval()
    (problem,) = refused(network)
    assert problem.startswith("stage1.1, stage1.3, stage2.2 and 5 more: ")
    assert 'train with student.neuron.reset = "hard"' in problem


def test_a_neuron_of_its_own_is_refused():
    neurons.register("own")(Own)
    network = build("vgg5", snn_units("own"), in_channels=1, num_classes=K, width=4).eval()
    (problem,) = refused(network)
    assert "Own computes its spikes by itself; NIR holds lasnn's own neurons: lif, plif, if" in problem


def test_a_forward_that_decides_is_refused():
    (problem,) = refused(own(lambda act: nn.Sequential(first(act), Deciding())).eval())
    assert "cannot be followed (TraceError" in problem


def test_a_recurrent_layer_is_refused():
    problems = refused(own(lambda act: nn.Sequential(first(act), Recurrent())).eval())
    assert problems == (
        "the architecture's forward: NIR has nothing for getitem()",
        "stem.1.gru: NIR has nothing for GRU(28, 28)",
    )


REFUSED = {
    "grouped": (lambda: nn.Conv2d(2, 2, 1, groups=2), "readers of NIR take no grouped convolution"),
    "oblong": (lambda: nn.Conv2d(2, 2, (1, 3), padding=(0, 1)), "nir takes each kernel for a square one"),
    "reflected": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "NIR pads with zeros, and both sides"),
    "one-sided": (lambda: nn.Conv2d(2, 2, 2, padding="same"), "NIR pads with zeros, and both sides alike"),
    "padded pool": (lambda: nn.AvgPool2d(3, stride=1, padding=1), "no padding, no ceil_mode"),
    "ceiled pool": (lambda: nn.AvgPool2d(3, ceil_mode=True), "no padding, no ceil_mode"),
    "uneven pool": (lambda: nn.AdaptiveAvgPool2d(5), "28 x 28 pixels do not divide into 5 x 5 equal windows"),
    "activation": (nn.GELU, "NIR has nothing for GELU"),
    "batch's norm": (lambda: nn.BatchNorm2d(2, track_running_stats=False), "depends on the batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nir_cannot_say_is_refused(name):
    make, reason = REFUSED[name]
    (problem,) = refused(own(lambda act: nn.Sequential(first(act), make())).eval())
    assert problem.startswith("stem.1: ")
    assert reason in problem


def test_all_reasons_at_once():
    parts = [make() for make, _ in REFUSED.values()]
    network = own(lambda act: nn.Sequential(first(act), *parts), nn.Sequential(nn.Linear(5, K), nn.Flatten(0)))
    network.eval()
    problems = refused(network)
    assert any("GELU" in problem for problem in problems)
    assert "head.0: a linear layer on pictures; put nn.Flatten() before it" in problems
    assert len(problems) >= 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small run on pictures of clothes."""
    folder = tmp_path_factory.mktemp("nir")
    (folder / "tiny_clothes.py").write_text(TINY_DATA)
    (folder / "tiny.toml").write_text('plugins = ["tiny_clothes.py"]\n' + TINY)
    settings = ["teacher.epochs=1", "distill.epochs=1", "student.timesteps=3"]
    return distill(folder / "tiny.toml", folder / "run", overrides=settings).path


def test_the_command_verifies_in_a_reader(trained, lasnn, tmp_path):
    pytest.importorskip("snntorch")
    file = tmp_path / "student.nir"
    said = lasnn("export", trained, "--format", "nir", "--out", file).stdout
    assert "verified in snntorch 1." in said
    assert "64 test images, arg-max equal on 64/64" in said
    assert "0 of" in said
    assert "takes    at each of 3 steps [C, H, W] = [1, 28, 28]: the image in [0, 1], less mean, over std" in said


def test_the_metadata_and_the_file_alone_give_the_students_logits(trained, tmp_path):
    pytest.importorskip("snntorch")
    file = tmp_path / "student.nir"
    export(trained, "nir", timesteps=5, out=file)
    known = nir.read(file).metadata
    assert (known["timesteps"], known["dt"], known["encoder"], known["lasnn"]) == (5, DT, "direct", __version__)
    assert json.loads(known["classes"])[0] == "T-shirt/top"
    images = torch.rand(2, 1, 28, 28)
    mean, std = (torch.tensor(known[key], dtype=torch.float32).view(-1, 1, 1) for key in ("mean", "std"))
    logits, _ = nir_reference.run(file, ((images - mean) / std).expand(int(known["timesteps"]), -1, -1, -1, -1))
    student = load_run(trained).student
    student.timesteps = 5
    with torch.no_grad():
        torch.testing.assert_close(logits.mean(0), student(images), rtol=1e-5, atol=1e-5)


def test_the_pages_snippet_gives_the_students_logits(trained, tmp_path, monkeypatch):
    pytest.importorskip("snntorch")
    (tmp_path / "mine").mkdir()
    export(trained, "nir", timesteps=4, out=tmp_path / "mine" / "student-t4.nir")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(import nir\n.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(snippet, "docs/export.md", "exec"), names)
    student = load_run(trained).student
    student.timesteps = 4
    torch.testing.assert_close(names["logits"].detach(), student(names["images"]).detach(), rtol=1e-5, atol=1e-5)


def test_a_wrong_file_is_found_out(trained, tmp_path, monkeypatch):
    pytest.importorskip("snntorch")
    right = nir_graph.neuron_node

    def wrong(neuron, shape, factor):
        return right(neuron, shape, factor * (1.25 if shape == (8, 14, 14) else 1.0))

    monkeypatch.setattr(nir_graph, "neuron_node", wrong)
    file = tmp_path / "student.nir"
    with pytest.raises(Disagreement, match=r"does not agree with .* the first layer that differs is stage2\.2 "):
        export(trained, "nir", out=file)
    assert not file.exists()
    assert (tmp_path / "student.nir.unverified").exists()


def test_readers_that_are_not_there(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("lasnn.export.nir.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install spikingjelly or snntorch"):
        export(trained, "nir", out=tmp_path / "student.nir")
    run = load_run(trained)
    for unit in run.student.network.modules():
        if isinstance(unit, NormSpike):
            unit.neuron = IF()
    with pytest.raises(UserError, match="pip install spikingjelly$"):
        export(run, "nir", out=tmp_path / "student.nir")
    assert list(tmp_path.iterdir()) == []
