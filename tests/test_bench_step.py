"""`lasnn bench step`: what takes turns is the same network, and what it leaves."""

import csv
import json

import pytest
import torch
from torch import nn

from lasnn.bench import step as bench
from lasnn.bench.timing import turns
from lasnn.errors import UserError
from lasnn.plan import read_plan

SMALL = ["data.batch_size=6", "teacher.width=4", "student.width=4", "student.timesteps=2", "device=cpu"]
PAGE = "# Speed\n\n<!-- step-quickstart-vgg5-cpu -->\n<!-- /step-quickstart-vgg5-cpu -->\nend\n"


def test_the_command(lasnn):
    (lasnn.folder / "page.md").write_text(PAGE)
    sets = [part for setting in SMALL for part in ("--set", setting)]
    result = lasnn.json(
        "bench", "step", "quickstart", *sets, "--timesteps", "2", "--rounds", "6", "--neighbour", "--write", "page.md"
    )
    files = ["runs/bench/step-quickstart-vgg5-cpu.csv", "runs/bench/step-quickstart-vgg5-cpu.json", "page.md"]
    assert result["files"] == files
    assert json.loads((lasnn.folder / files[1]).read_text()) == {k: v for k, v in result.items() if k != "files"}
    with (lasnn.folder / files[0]).open() as file:
        rows = list(csv.DictReader(file))
    names = ["lasnn", "SpikingJelly", "floor"] if result["environment"]["spikingjelly"] else ["lasnn", "floor"]
    assert [(row["timesteps"], row["implementation"]) for row in rows] == [(t, name) for t in "2" for name in names]
    for row in result["rows"]:
        assert row["over_floor_low"] <= row["over_floor"] <= row["over_floor_high"]
        assert row["beside_rounds"] == row["rounds"] == 6
        assert row["images_per_second"] == pytest.approx(6000 / row["median_ms"])
        assert row["implementation"] == "floor" or row["peak_bytes"] > 0
    for kinds in result["kinds"].values():
        assert sum(kinds.values()) == pytest.approx(1)
        assert (
            min(kinds[kind] for kind in ("normalisation and neurons", "convolutions and linear layers", "pooling")) > 0
        )
    page = (lasnn.folder / "page.md").read_text()
    assert page.count("| 2 | lasnn |") == 1
    assert page.endswith("<!-- /step-quickstart-vgg5-cpu -->\nend\n")


def test_mistakes_are_lines(lasnn):
    (lasnn.folder / "page.md").write_text("# Speed\n")
    result = lasnn("bench", "step", "quickstart", "--write", "page.md", code=2)
    assert "needs the lines <!-- step-quickstart-vgg5-cpu --> and <!-- /step-quickstart-vgg5-cpu -->" in result.stderr
    assert "unknown recipe" in lasnn("bench", "step", "quickstrat", code=2).stderr


@pytest.mark.parametrize("encoder", ["direct", "poisson"])
@pytest.mark.parametrize("architecture", ["vgg5", "resnet20"])
@pytest.mark.parametrize(
    "neuron",
    [{"name": "lif"}, {"name": "lif", "tau": 3.0, "decay_input": True, "reset": "soft"}, {"name": "if"}],
    ids=str,
)
def test_the_peer_is_the_same_network(neuron, architecture, encoder, tmp_path):
    """The same loss and the same weights after a step."""
    pytest.importorskip("spikingjelly")
    table = ",".join(f"{key}={json.dumps(value)}" for key, value in neuron.items())
    settings = [f"{who}.architecture={architecture}" for who in ("teacher", "student")]
    settings += [f"student.encoder={encoder}", "distill.lr=0.01"]
    made = bench.Steps(read_plan("quickstart", [*SMALL, *settings, f"student.neuron={{{table}}}", PAIRS]), tmp_path)
    own, peer = made.training(made.student), made.peer()
    first, second = own(0), peer(0)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)
    first, second = own(1), peer(1)
    torch.testing.assert_close(second["loss"], first["loss"], rtol=1e-2, atol=1e-6)


PAIRS = 'distill.pairs=["stage1","stage2","stage3"]'


def test_a_neuron_that_the_peer_lacks(tmp_path):
    pytest.importorskip("spikingjelly")
    made = bench.Steps(read_plan("quickstart", [*SMALL, "student.neuron.name=plif"]), tmp_path)
    with pytest.raises(UserError, match="'plif' with the surrogate 'atan' is not written for SpikingJelly"):
        made.peer()


def test_the_floor_is_every_convolution_and_linear_layer(tmp_path):
    made = bench.Steps(read_plan("quickstart", SMALL), tmp_path)
    for network in (made.student, made.teacher):
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        assert [layer for layer, _ in bench.layer_calls(network, made.pixels)] == layers
    # The stem runs once under direct encoding, what follows at each step.
    shapes = [tuple(x.shape) for _, x in bench.layer_calls(made.student, made.pixels)]
    assert shapes[0] == (6, 1, 28, 28)
    assert {shape[0] for shape in shapes[1:]} == {12}
    made.floor()(0)


def test_rounds_take_turns():
    calls = []
    found = turns({name: lambda n, name=name: calls.append((name, n)) for name in "ab"}, torch.device("cpu"), rounds=3)
    assert calls == [(name, number) for number in range(4) for name in "ab"]
    assert {name: len(ms) for name, ms in found.items()} == {"a": 3, "b": 3}


def test_the_interval_of_a_median():
    """By the binomial distribution: of 15 values the 4th and the 12th, of 5 the ends."""
    assert bench.interval(range(15, 0, -1)) == (4, 12)
    assert bench.interval(range(1, 41)) == (14, 27)
    assert bench.interval([3, 1, 2, 5, 4]) == (1, 5)
