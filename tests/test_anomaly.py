"""A training that breaks: the step, the term and the layer are named, and the last good state stays."""

import dataclasses
import re
import signal

import pytest
import torch
from test_distillation import StopAt, digest, without_times

from lasnn import distill
from lasnn.errors import MachineError
from lasnn.plan import read_plan
from lasnn.training.nonfinite import NonFiniteMonitor
from lasnn.training.stop import Stopped
from lasnn.training.trainer import Trainer
from lasnn.weights import load_state

BREAKS = '''
import torch
from torch import nn
from lasnn import Staged, architectures, losses


class Breaks(nn.Module):
    """From its call number `at` on (in training) it breaks, `forward` or `backward`."""

    def __init__(self, how, at):
        super().__init__()
        self.how, self.at = how, at
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += self.training
        whole = (self.calls <= self.at).float()
        return x / whole if self.how == "forward" else x + (0 * x + whole).sqrt() - whole


@architectures.register("breaks")
def breaks(act, *, in_channels: int, num_classes: int, how: str = "forward", at: int = 10) -> Staged:
    """One stage that breaks."""
    stage = nn.Sequential(nn.Conv2d(in_channels, 4, 3, stride=2), act(4), Breaks(how, at), nn.Conv2d(4, 4, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
    return Staged({"stage1": stage}, head)


calls = []


@losses.register("bad-log")
def bad_log(logits):
    """Finite while the plan tries it; later not, whatever it is given."""
    calls.append(None)
    return logits.sum() * 0 if len(calls) < 10 else (logits * 0).sum().log()
'''
SETTINGS = ['plugins=["tiny_clothes.py","breaks.py"]', "teacher=", "student.architecture=breaks", "student.width="]


@pytest.fixture
def breaks(tiny):
    """The tiny recipe, without a teacher: 8 steps an epoch."""
    (tiny.parent / "breaks.py").write_text(BREAKS)
    return tiny


def check_every(monkeypatch, interval):
    """Look at what was found after so many steps, as a GPU does after 20."""
    monkeypatch.setattr(NonFiniteMonitor, "due", lambda _, step, steps: step % interval == 0 or step + 1 == steps)


@pytest.mark.parametrize("interval", [1, 20])
def test_the_step_the_term_and_the_layer(breaks, monkeypatch, interval):
    # 20 is what a GPU gets: the break is found steps later, in the same epoch, and yet named exactly.
    check_every(monkeypatch, interval)
    with pytest.raises(MachineError) as caught:
        distill(breaks, "out", overrides=SETTINGS)
    message = str(caught.value)
    assert "the student's loss is not a finite number in epoch 2, step 3 (cross-entropy)" in message
    assert "it began in the layer student stage1.2 (Breaks), " in message
    assert "The last good state is in out/last.pt." in message
    state = load_state(breaks.parent / "out" / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in state["module"].values())


def test_the_layer_of_a_compiled_student(breaks):
    """Its modules are called by none but the compiler: the batch is repeated without it."""
    with pytest.raises(MachineError, match=r"it began in the layer student stage1.2 \(Breaks\), "):
        distill(breaks, overrides=[*SETTINGS, "compile=true"])


def test_nothing_is_learnt_from_a_broken_step(breaks, monkeypatch):
    """The weights are still those from before it when it is found."""
    check_every(monkeypatch, 20)
    seen, heads, check = {}, [], Trainer.raise_if_nonfinite

    def looked_at(self, batch):
        seen.update({name: value.clone() for name, value in self.phase.model.state_dict().items()})
        check(self, batch)

    monkeypatch.setattr(Trainer, "raise_if_nonfinite", looked_at)
    for at in (10, 13):
        with pytest.raises(MachineError):
            distill(breaks, overrides=[*SETTINGS, f"student.at={at}", "data.augment=[]"])
        assert all(value.isfinite().all() for name, value in seen.items() if "weight" in name)
        heads.append(seen["network.head.2.weight"])
    assert not torch.equal(*heads), "three more steps were learnt from"


def test_a_gradient_that_breaks(breaks):
    settings = [*SETTINGS, "student.how=backward"]
    with pytest.raises(MachineError) as caught:
        distill(breaks, overrides=settings)
    message = str(caught.value)
    assert "the student's gradient is not a finite number in epoch 2, step 3 (after a finite loss)" in message
    assert "the first gradient that is not finite is that of the output of student stage1.1 (NormSpike), " in message
    with pytest.raises(MachineError) as caught:
        distill(breaks, overrides=settings, detect_anomaly=True)
    message = str(caught.value)
    assert "the student's gradient breaks in epoch 2, step 3: Function 'MulBackward0' returned nan values" in message
    assert re.search(r"computed in forward \(.*breaks\.py:\d+\)", message)
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize("anomaly", [False, True])
def test_a_loss_that_breaks_alone(breaks, anomaly):
    losses = 'losses=[{name="cross-entropy"},{name="bad-log",weight=0.1}]'
    with pytest.raises(MachineError) as caught:
        distill(breaks, overrides=[*SETTINGS, losses], detect_anomaly=anomaly)
    message = str(caught.value)
    assert re.search(r"loss is not a finite number in epoch \d, step \d \(bad-log\)", message)
    assert "every layer's values are finite, so that it began in the loss itself" in message


def test_the_flag(breaks, lasnn):
    settings = [option for setting in [*SETTINGS, "student.how=backward"] for option in ("--set", setting)]
    result = lasnn("distill", "tiny.toml", *settings, "--detect-anomaly", code=1)
    assert "Function 'MulBackward0' returned nan values" in result.stderr


def test_the_first_of_each():
    monitor = NonFiniteMonitor(["a", "b"], torch.device("cpu"), watches_gradient=False)
    good, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    monitor.update(0, {"a": good, "b": good, "loss": good})
    assert monitor.first_failure() is None
    monitor.update(1, {"a": good, "b": bad, "loss": good})
    monitor.update(2, {"a": bad, "b": good, "loss": good})
    assert monitor.first_failure() == (1, ["b"])
    assert monitor.found_inf() is None, "a scaler decides"
    monitor.begin_epoch()
    assert monitor.first_failure() is None


def test_a_gradient_that_is_not_finite_stops_the_optimiser():
    model = torch.nn.Linear(2, 1)
    monitor = NonFiniteMonitor([], torch.device("cpu"))
    for value, found_inf in ((1.0, 0), (float("inf"), 1), (1.0, 1)):
        model.weight.grad = torch.full((1, 2), value)
        monitor.update(0, {"loss": torch.tensor(1.0)}, model)
        assert monitor.found_inf() == found_inf
    assert monitor.first_failure() == (0, ["gradient"])


@pytest.fixture
def fp16(tiny, monkeypatch):
    """fp16 with its scaler, where there is no GPU: the CPU computes it slowly."""
    read = read_plan

    def in_fp16(*arguments):
        plan = read(*arguments)
        return dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"precision": "fp16"}))

    monkeypatch.setattr("lasnn.training.distill.read_plan", in_fp16)
    return tiny


def test_a_scaler_resumes_and_its_skipped_steps_are_no_failure(fp16):
    # So heavy an objective overflows at the scale that the scaler starts with.
    settings = ["teacher.epochs=1", "distill.lr=0.0005", "data.accumulate=2"]
    settings += ['losses=[{name="cross-entropy",weight=100.0}]']
    whole = distill(fp16, "whole", overrides=settings)
    scaler = load_state(whole / "last.pt")["scaler"]
    assert scaler["scale"] < 2.0**16, "steps were left out"
    assert scaler["_growth_tracker"] > 0, "and others were not"
    with pytest.raises(Stopped):
        distill(fp16, "out", overrides=settings, progress=StopAt("student", 1, signal.SIGTERM))
    assert load_state(fp16.parent / "out" / "last.pt")["scaler"]["scale"] < 2.0**16
    resumed = distill(fp16, "out", resume=True, overrides=settings, detect_anomaly=True)
    assert digest(resumed / "student.safetensors") == digest(whole / "student.safetensors")
    assert without_times(resumed.metrics()) == without_times(whole.metrics())


def test_a_loss_that_overflows_fp16_is_a_failure(fp16):
    (fp16.parent / "breaks.py").write_text(BREAKS)
    with pytest.raises(MachineError, match=r"epoch 2, step 3 \(cross-entropy\); it began in .* stage1\.2 \(Breaks\)"):
        distill(fp16, overrides=SETTINGS)
    with pytest.raises(MachineError, match="overflows fp16 at every scale of the loss"):
        distill(fp16, overrides=[*SETTINGS, "student.how=backward", "student.at=0", "distill.epochs=6"])
