"""`lasnn bench inference`: the passes that take turns give the same logits, and what it leaves."""

import json

import pytest
import torch
from torch import nn

from lasnn import Staged
from lasnn.bench import inference as bench
from lasnn.network.student import Student
from lasnn.network.units import NormSpike
from lasnn.plan import read_plan
from lasnn.registry import encoders
from lasnn.training.diagnostics import counted

SMALL = ["data.batch_size=3", "student.width=4", "teacher.width=4", "student.timesteps=3", "device=cpu"]


def test_the_command(lasnn):
    name = "inference-quickstart-vgg5-cpu"
    (lasnn.folder / "page.md").write_text(f"# Speed\n\n<!-- {name} -->\n<!-- /{name} -->\nend\n")
    sets = [part for setting in SMALL for part in ("--set", setting)]
    result = lasnn.json("bench", "inference", "quickstart", *sets, "--rounds", "6", "--write", "page.md")
    assert result["files"] == [f"runs/bench/{name}.csv", f"runs/bench/{name}.json", "page.md"]
    written = json.loads((lasnn.folder / result["files"][1]).read_text())
    assert written == {key: value for key, value in result.items() if key != "files"}
    names = [bench.LASNN, bench.STREAM, bench.PEER, bench.PEER_STREAM, bench.FLOOR]
    if not result["environment"]["spikingjelly"]:
        names = [one for one in names if "SpikingJelly" not in one]
    places = [(row["timesteps"], row["batch_size"], row["implementation"]) for row in result["rows"]]
    assert places == [(3, batch, one) for batch in (1, 3) for one in names]
    for row in result["rows"]:
        assert row["images_per_second"] == pytest.approx(1000 * row["batch_size"] / row["median_ms"])
    assert "| 3 | 1 | lasnn |" in (lasnn.folder / "page.md").read_text()
    line = lasnn("bench", "inference", "quickstart", "--write", "other.md", code=2).stderr
    assert "--write other.md: No such file or directory" in line


@pytest.mark.parametrize("encoder", ["direct", "poisson"])
@pytest.mark.parametrize("architecture", ["vgg5", "resnet20"])
def test_the_passes_give_the_same_logits(architecture, encoder):
    """Whole and step by step; of SpikingJelly too where it is there, but for spikes that flip by a rounding."""
    settings = [f"{who}.architecture={architecture}" for who in ("teacher", "student")]
    settings += [f"student.encoder={encoder}", 'distill.pairs=["stage1","stage2","stage3"]']
    settings += ["student.timesteps=9"]
    passes, notes = bench.passes_of(read_plan("quickstart", [*SMALL, *settings]), 3, peer=True)
    assert not notes or "spikingjelly" in notes[0].lower()
    own = passes.pop(bench.LASNN)(0)
    passes.pop(bench.FLOOR)
    assert bench.STREAM in passes
    for name, run in passes.items():
        # A rounding flips a spike of SpikingJelly's at the most.
        near = 1e-5 if name == bench.STREAM else 1e-3
        # A fresh node each time: the second call starts from rest as the first did.
        for number in range(2):
            assert (run(number) - own).abs().max() <= near * own.abs().max(), name


@pytest.mark.parametrize("architecture", ["vgg5", "resnet20"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_layer_of_the_student_that_is_timed_spikes(architecture, batch):
    settings = [f"{who}.architecture={architecture}" for who in ("teacher", "student")]
    plan = read_plan("quickstart", [*SMALL, *settings, 'distill.pairs=["stage1","stage2","stage3"]'])
    images = torch.rand(batch, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    student = bench.spiking_student(plan, images)
    with torch.no_grad(), counted(student) as counts:
        student.steps(images)
    rates = {name: int(of.spikes) / of.values for name, of in counts.items()}
    assert len(rates) == sum(isinstance(unit, NormSpike) for unit in student.modules())
    assert min(rates.values()) > 0.01, rates


def test_a_network_without_units_of_lasnns_own_is_not_cut_in_time():
    """As a peer's, whose neurons would begin anew in each piece."""
    stages = {"stage1": nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())}
    student = Student(Staged(stages, nn.Flatten()), encoders.build("direct", (0.5,), (0.5,)), 9).eval()
    assert not student.neurons_carry_voltages()


def test_an_encoder_that_decides_all_steps_at_once_is_not_run_step_by_step():
    passes, _ = bench.passes_of(read_plan("quickstart", [*SMALL, "student.encoder=rate"]), 3, peer=False)
    assert set(passes) == {bench.LASNN, bench.FLOOR}
