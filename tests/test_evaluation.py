"""What evaluation says beyond the accuracy: calibration, classes, silence, early exit, draws, speed; and streams."""

import numpy
import pytest
import torch
from test_measure import images, small
from torch import nn

from lasnn.errors import UserError
from lasnn.evaluation.evaluate import evaluate, load_run, merge
from lasnn.evaluation.measure import measure
from lasnn.evaluation.metrics import AccuracyMetrics, EarlyExit
from lasnn.evaluation.operations import OperationCounter
from lasnn.evaluation.speed import speed
from lasnn.network.staged import build
from lasnn.network.student import Student
from lasnn.network.units import NormSpike, snn_units
from lasnn.registry import encoders

OPTIONS = {"batch_size": 16, "seed": 3}


def test_classes_confusion_and_calibration_by_hand():
    tally = AccuracyMetrics(3)
    confident, unsure = torch.tensor([0.98, 0.01, 0.01]).log(), torch.tensor([0.5, 0.3, 0.2]).log()
    tally.add(torch.stack([confident, confident, unsure]), torch.tensor([0, 1, 0]))
    # A second batch, of another class: no image of class 2 is ever seen.
    tally.add(torch.stack([unsure]), torch.tensor([1]))
    result = tally.result()
    assert result["accuracy"] == 0.5
    assert result["accuracy_by_class"] == [1.0, 0.0, None]
    assert result["confusion"] == [[2, 0, 0], [2, 0, 0], [0, 0, 0]]
    # Two bins of two answers, each half right: |0.98 - 0.5| and |0.5 - 0.5|, weighted by a half.
    assert result["calibration_error"] == pytest.approx((0.98 - 0.5) / 2)


def test_a_confidence_of_one_and_one_on_a_border_are_counted():
    tally = AccuracyMetrics(15)
    tally.add(torch.eye(15) * 100, torch.arange(15))
    tally.add(torch.zeros(1, 15), torch.tensor([0]))
    assert tally.bins[0].tolist() == [1, *[0] * 13, 15]


def test_silent_is_who_never_spiked_on_any_image():
    student, data = small("poisson"), images(40)
    results = {result["timesteps"]: result for result in measure(student, data, [1, 3], **OPTIONS)}
    fired: dict[str, torch.Tensor] = {}
    for steps in (1, 3):
        fired.clear()
        student.timesteps = steps
        with OperationCounter(student, steps) as counter, torch.no_grad():
            hooks = [
                unit.register_forward_hook(
                    lambda _, __, spikes, name=name: fired.update(
                        {name: fired.get(name, False) | student.network.time.unfold(spikes).ne(0).any(0).any(0)}
                    )
                )
                for name, unit in student.network.named_modules()
                if name in ("stage1.1", "stage2.2", "stage3.1")
            ]
            measure(student, data, [steps], **OPTIONS)
        for hook in hooks:
            hook.remove()
        assert counter.images == 40
        silent = {name: float((~each).float().mean()) for name, each in fired.items()}
        assert results[steps]["silent_by_layer"] == pytest.approx(silent)
        count = sum(each.numel() for each in fired.values())
        assert results[steps]["silent"] == pytest.approx(sum(int((~each).sum()) for each in fired.values()) / count)
    assert 0 < results[3]["silent"] < results[1]["silent"] < 1


def test_early_exit_is_the_run_that_stops():
    """Against each image on its own, at batch size 1, for which a run of so many steps is made."""
    student, data = small(timesteps=4), images(24)
    for weight in student.network.parameters():
        weight.data *= 4
    logits, _ = student.steps(data.pixels.float() / 255)
    means = logits.detach().cumsum(0) / torch.arange(1, 5)[:, None, None]
    confidence = means.softmax(-1).amax(-1)
    threshold = float(confidence[:-1].median())
    [together] = measure(student, data, [4], early_exit=threshold, **OPTIONS)
    found = together["exit"]
    used = [next((t + 1 for t in range(4) if confidence[t, i] >= threshold), 4) for i in range(24)]
    assert len(set(used)) > 1
    right = [int(means[t - 1, i].argmax() == data.labels[i]) for i, t in enumerate(used)]
    energy = 0.0
    for i, t in enumerate(used):
        one = type(data)(data.pixels[i : i + 1], data.labels[i : i + 1])
        energy += measure(student, one, [t], batch_size=1, seed=3)[0]["energy_uj"]
    assert found["threshold"] == threshold
    assert found["mean_steps"] == pytest.approx(sum(used) / 24)
    assert found["accuracy"] == pytest.approx(sum(right) / 24)
    assert found["energy_uj"] == pytest.approx(energy / 24)
    assert found["energy_uj"] < together["energy_uj"]


def test_an_unreachable_threshold_takes_every_step():
    early = EarlyExit(1.0)
    early.add(torch.zeros(3, 2, 5), torch.tensor([0, 1]), torch.ones(3, 2).cumsum(0))
    assert early.result() == {"threshold": 1.0, "mean_steps": 3.0, "accuracy": 0.5, "energy_uj": 3.0}


def test_draws_are_averaged_and_their_deviation_is_told():
    student, data = small("poisson"), images(40)
    each = [measure(student, data, [2], draw=draw, **OPTIONS)[0] for draw in range(3)]
    assert each[0] == measure(student, data, [2], **OPTIONS)[0]
    assert each[0]["firing_rate"] != each[1]["firing_rate"]
    merged = merge(each)
    accuracies = torch.tensor([one["accuracy"] for one in each], dtype=torch.float64)
    assert merged["accuracies"] == accuracies.tolist()
    assert merged["accuracy"] == pytest.approx(float(accuracies.mean()))
    assert merged["accuracy_deviation"] == pytest.approx(float(accuracies.std()))
    rates = [one["firing_rate_by_layer"]["stage2.2"] for one in each]
    assert merged["firing_rate_by_layer"]["stage2.2"] == pytest.approx(sum(rates) / 3)
    assert merged["timesteps"] == 2
    assert merged["images"] == 40


def test_speed_runs_what_it_is_given():
    seen = []
    found = speed(lambda batch: seen.append(len(batch)), images(40), batch_size=16, seconds=0.01)
    assert set(seen) == {16, 8, 1}
    assert found["images_per_second"] > 0
    assert found["latency_ms"] > 0
    assert found["peak_memory_mib"] > 50


@pytest.mark.full
def test_operations_are_those_of_spikingjelly():
    """Its counter sees binary inputs of convolutions; pools make none, so the network has none."""
    counters = pytest.importorskip("spikingjelly.activation_based.op_counter")
    network = build("resnet20", snn_units(threshold=0.3), in_channels=2, num_classes=10, width=4)
    # The head's pool makes rates of spikes.
    network.head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16 * 3 * 3, 10))
    student = Student(network, encoders.build("poisson", (0.5, 0.5), (0.25, 0.25)), 3).eval()
    batch = images(4).pixels.float() / 255
    theirs = counters.SynOpCounter()
    with torch.no_grad():
        with counters.DispatchCounterMode([theirs]):
            student.steps(batch, generator=torch.Generator().manual_seed(5))
        with OperationCounter(student, 3) as ours:
            student.steps(batch, generator=torch.Generator().manual_seed(5))
    assert ours.after(3)["operations"]["additions"] * 4 == theirs.get_total() > 10_000


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A trained run with direct encoding, its recipe with poisson, and a command that works beside them."""
    from common import TINY, TINY_DATA, Command

    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "tiny_clothes.py").write_text(TINY_DATA)
    # Attention of power 1 recruits silent neurons, of which so short a training would leave many.
    losses = '[[losses]]\nname = "cross-entropy"\n[[losses]]\nname = "attention"\nweight = 1000.0\npower = 1.0\n'
    (folder / "tiny.toml").write_text('plugins = ["tiny_clothes.py"]\n' + TINY + losses)
    command = Command(folder)
    command("distill", "tiny.toml", "--out", "direct")
    for encoder in ("poisson", "rate"):
        short = ["--set", f"student.encoder={encoder}", "--set", "distill.epochs=1"]
        command("distill", "tiny.toml", "--out", encoder, *short)
    return command


def test_the_command_says_it_all(runs):
    found = runs.json("evaluate", "direct", "--timesteps", "2", "--exit", "0.5")
    assert found["exit"]["threshold"] == 0.5
    assert 1 <= found["exit"]["mean_steps"] <= 2
    assert len(found["accuracy_by_class"]) == len(found["confusion"]) == len(found["classes"]) == 10
    for key in ("calibration_error", "silent", "latency_ms", "peak_memory_mib", "images_per_second"):
        assert found[key] >= 0, key
    operations = found["operations"]
    assert operations["dense"] > operations["additions"] > 0
    assert found["teacher_energy_uj"] > 0
    for precision, teacher in found["teacher_energy_with_memory"].items():
        student = found["energy_with_memory"][precision]
        assert found["energy_uj"] < student["energy_uj"] or precision == "int8"
        assert teacher["energy_uj"] > 0
        at = found["break_even_firing_rate"][precision]
        assert (at > found["firing_rate"]) == (student["energy_uj"] < teacher["energy_uj"])
    assert set(found["memory_accesses"]) == set(found["energy_with_memory"]["fp32"]["by_layer"])
    shown = runs("evaluate", "direct", "--timesteps", "1,2", "--exit", "0.5").stdout
    for word in (
        "ECE",
        "silent",
        "ms at",
        "MiB",
        "early exit",
        "mean steps",
        "accuracy by class",
        "additions by spikes",
        "with memory access",
        "break-even spikes/neuron/step",
    ):
        assert word in shown, word


def test_poisson_is_drawn_several_times(runs):
    found = runs.json("evaluate", "poisson")
    assert len(found["accuracies"]) == 3
    assert found["accuracy_deviation"] >= 0
    one = runs.json("evaluate", "poisson", "--draws", "1")
    assert "accuracies" not in one
    assert one["accuracy"] == found["accuracies"][0] == load_run(runs.folder / "poisson").summary["accuracy"]
    assert "means of 3 draws" in runs("evaluate", "poisson").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rate", "--exit", "0.9"], "takes a causal encoder, as direct or poisson"),
        (["direct", "--exit", "0"], "the confidence must be above 0 and at most 1"),
        (["direct", "--exit", "1.5"], "the confidence must be above 0 and at most 1"),
        (["direct", "--draws", "2"], "nothing is drawn here"),
        (["poisson", "--draws", "0"], "must be at least 1"),
    ],
)
def test_options_that_do_not_fit(runs, arguments, message):
    assert message in runs("evaluate", *arguments, code=2).stderr


def test_rate_encoding_is_run_for_each_t(runs, monkeypatch):
    monkeypatch.chdir(runs.folder)
    together = evaluate("rate", numpy.array([1, 4]))
    assert [one["accuracy"] for one in together] == [evaluate("rate", t)[0]["accuracy"] for t in (1, 4)]
    with pytest.raises(UserError, match="causal"):
        evaluate("rate", early_exit=0.9)


@pytest.mark.parametrize("encoder", ["direct", "poisson"])
def test_a_stream_gives_the_spikes_of_the_run(runs, encoder):
    """Step by step on a trained student, the voltages passed on: the same spikes, and the logits of the steps."""
    run = load_run(runs.folder / encoder)
    student = run.student
    student.timesteps = 5
    batch = run.data.load()[1].pixels[:30].float() / 255
    recorded: dict[str, list] = {}
    units = {name: unit for name, unit in student.network.named_modules() if hasattr(unit, "fused")}
    for name, unit in units.items():
        unit.register_forward_hook(lambda _, __, spikes, name=name: recorded.setdefault(name, []).append(spikes))
    with torch.no_grad():
        logits, _ = student.steps(batch, generator=torch.Generator().manual_seed(1))
    whole = {name: found.pop() for name, found in recorded.items()}
    draws, voltages, steps = torch.Generator().manual_seed(1), None, []
    for _ in range(5):
        step, voltages = student.step(batch, voltages, draws)
        steps.append(step)
    assert set(voltages) == set(units)
    for name, spikes in whole.items():
        assert spikes.mean() > 0.01
        assert torch.equal(torch.cat(recorded[name]), spikes), name
    assert torch.allclose(torch.stack(steps), logits, atol=1e-5)
    # It kept nothing: a run afterwards is the run before.
    with torch.no_grad():
        again, _ = student.steps(batch, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, logits)


@pytest.mark.parametrize("style", ["sew", "membrane"])
def test_a_stream_of_a_residual_style_gives_the_logits_of_the_run(style):
    torch.manual_seed(0)
    network = build("resnet20", snn_units(threshold=0.3), in_channels=2, num_classes=10, width=4, residual=style)
    student = Student(network, encoders.build("direct", (0.5, 0.5), (0.25, 0.25)), 5).eval()
    batch, voltages, steps = images(4).pixels.float() / 255, None, []
    with torch.no_grad():
        logits, _ = student.steps(batch)
    for _ in range(5):
        step, voltages = student.step(batch, voltages)
        steps.append(step)
    assert logits.std() > 0
    torch.testing.assert_close(torch.stack(steps), logits, rtol=1e-4, atol=1e-5)


def test_a_stream_needs_a_causal_encoder_in_eval_mode():
    batch = torch.rand(2, 2, 12, 12)
    with pytest.raises(ValueError, match="needs a causal one"):
        small("rate").step(batch)
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        small().train().step(batch)
    student = small()
    for unit in student.modules():
        if isinstance(unit, NormSpike):
            unit.neuron = WithoutStart()
    with pytest.raises(ValueError, match="its neurons take no v0"):
        student.step(batch)


class WithoutStart(nn.Module):
    """A neuron that cannot go on from a voltage."""

    def forward(self, x, timesteps):
        return (x > 0).to(x.dtype)


def test_no_images_have_no_logits():
    assert small()(torch.rand(0, 2, 12, 12)).shape[0] == 0


def test_the_mean_of_draws_has_what_only_some_of_them_have():
    """A layer that is silent in one draw has no spikes to count there."""
    draws = [
        {"accuracy": 0.5, "reads": {"a": {"spikes": 2}}},
        {"accuracy": 0.7, "reads": {"a": {"values": 1}}},
    ]
    for order in (draws, draws[::-1]):
        found = merge(order)
        assert found["reads"] == {"a": {"spikes": 1, "values": 0.5}}
        assert found["accuracy"] == pytest.approx(0.6)
