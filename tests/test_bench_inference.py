"""`lasnn bench inference`: the passes that take turns give the same logits, and what it leaves."""

import json

import pytest

from lasnn.bench import inference as bench
from lasnn.plan import read_plan

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
    # Every layer spikes, so that a voltage that is not carried shows.
    settings += ["student.neuron.threshold=0.2", "student.timesteps=4"]
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


def test_an_encoder_that_decides_all_steps_at_once_is_not_run_step_by_step():
    passes, _ = bench.passes_of(read_plan("quickstart", [*SMALL, "student.encoder=rate"]), 3, peer=False)
    assert set(passes) == {bench.LASNN, bench.FLOOR}
