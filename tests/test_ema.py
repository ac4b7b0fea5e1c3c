"""The moving average of the weights."""

import json
import signal

import pytest
import torch
from test_distillation import StopAt, digest, without_times
from torch import nn

from lasnn import distill, load_run
from lasnn.errors import UserError
from lasnn.evaluation.measure import accuracy
from lasnn.training.average import Average
from lasnn.training.stop import Stopped
from lasnn.weights import load_state

EMA = ["distill.ema=0.9"]


def test_by_hand():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = Average(model, 0.4)
    seen = []
    for value in (1.0, 3.0, 7.0, 2.0, 5.0, 4.0, 8.0):
        with torch.no_grad():
            model[0].weight.fill_(value)
            model[1].running_mean.fill_(2 * value)
            model[1].num_batches_tracked += 1
        average.update()
        seen.append(value)
    wanted = seen[0]
    for count, value in enumerate(seen[1:], start=1):
        decay = min(0.4, (1 + count) / (10 + count))
        wanted = decay * wanted + (1 - decay) * value
    with average.applied():
        assert model[0].weight.item() == pytest.approx(wanted)
        assert model[1].running_mean.item() == pytest.approx(2 * wanted)
        assert model[1].num_batches_tracked.item() == len(seen)
    assert model[0].weight.item() == 8.0
    assert model[1].running_mean.item() == 16.0


def test_without_a_decay_there_is_none():
    model = nn.Linear(1, 1)
    average = Average(model, 0.0)
    average.update()
    with average.applied():
        pass
    assert average.averaged is None
    assert average.state_dict() == {}


def test_the_average_is_measured_and_kept_and_the_training_is_the_same(tiny, cached_teachers):
    plain, run = distill(tiny, "plain"), distill(tiny, "run", overrides=EMA)
    trained, state = load_state(plain / "last.pt")["module"], load_state(run / "last.pt")
    assert all(torch.equal(value, trained[name]) for name, value in state["module"].items())
    student = load_run(run.path)
    for name, value in student.student.state_dict().items():
        assert torch.equal(value, state["average"][f"module.{name}"])
    assert digest(run / "student.safetensors") != digest(plain / "student.safetensors")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["weights"] == "exponential moving average of the steps, decay 0.9"
    assert json.loads((plain / "summary.json").read_text())["weights"] == "of the last step"
    measured = accuracy(student.student, student.images.test, batch_size=50, seed=0)
    assert summary["accuracy"] == run.metrics()[-1]["accuracy"] == measured
    assert [line["loss"] for line in run.metrics()] == [line["loss"] for line in plain.metrics()]


@pytest.mark.parametrize("options", [[], ["data.accumulate=2"], ["student.timesteps=4", "distill.time_chunk=2"]])
def test_a_stopped_run_resumes_to_the_same_average(tiny, cached_teachers, options):
    options = [*EMA, *options]
    whole = distill(tiny, "whole", overrides=options)
    with pytest.raises(Stopped):
        distill(tiny, "stopped", overrides=options, progress=StopAt("student", 1, signal.SIGTERM))
    if len(options) == 1:
        with pytest.raises(UserError, match=r"distill\.ema: was 0\.9, now 0\.99"):
            distill(tiny, "stopped", overrides=["distill.ema=0.99"], resume=True)
    resumed = distill(tiny, "stopped", overrides=options, resume=True)
    assert digest(resumed / "student.safetensors") == digest(whole / "student.safetensors")
    assert without_times(resumed.metrics()) == without_times(whole.metrics())


def test_a_teacher_has_its_own(tiny, lasnn, cached_teachers):
    said = lasnn("distill", tiny, "--out", "run", "--set", "teacher.ema=0.9", "--set", "distill.ema=0.9").stdout
    assert "student.safetensors has the exponential moving average" in said
    plain = distill(tiny, "plain", overrides=["distill.epochs=1"])
    assert digest(tiny.parent / "run" / "teacher.safetensors") != digest(plain / "teacher.safetensors")
