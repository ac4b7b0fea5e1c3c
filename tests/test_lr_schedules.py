"""The learning rate over the steps."""

import math
import signal

import pytest
from test_distillation import StopAt, digest, without_times

from lasnn import distill
from lasnn.errors import UserError
from lasnn.plan import read_plan
from lasnn.recipe.schema import Training
from lasnn.training.optimizer import learning_rate
from lasnn.training.stop import Stopped


def rates(steps_per_epoch=10, **options):
    config = Training(lr=1.0, **options)
    return [learning_rate(config, step, steps_per_epoch) for step in range(config.epochs * steps_per_epoch)]


def test_the_cosine_is_what_it_was():
    found = rates(epochs=3, warmup_epochs=0.5, min_lr=0.1)
    assert found[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    wanted = [0.1 + (1.0 - 0.1) * (1 + math.cos(math.pi * ((step - 5.0) / 25.0))) / 2 for step in range(5, 30)]
    assert found[5:] == wanted


def test_steps():
    found = rates(epochs=4, schedule="step", warmup_epochs=0.2)
    assert found[:2] == [0.5, 1.0]
    assert found[2:20] == [1.0] * 18
    assert found[20:30] == [0.1] * 10
    assert found[30:] == pytest.approx([0.01] * 10)
    found = rates(epochs=3, schedule="step", milestones=[0.1, 0.9], gamma=0.5, min_lr=0.3)
    assert found == [1.0] * 3 + [0.5] * 24 + [0.3] * 3
    assert rates(epochs=2, schedule="step", milestones=[]) == [1.0] * 20


def test_warmup_stable_decay():
    found = rates(epochs=2, schedule="warmup-stable-decay", warmup_epochs=0.2)
    assert found[:17] == [0.5] + [1.0] * 16
    assert found[17:] == pytest.approx([0.75, 0.5, 0.25])
    found = rates(epochs=1, schedule="warmup-stable-decay", decay_share=0.5, min_lr=0.5)
    assert found == pytest.approx([1.0] * 6 + [0.9, 0.8, 0.7, 0.6])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["distill.gamma=0.5"], r'distill\.gamma: has no effect with schedule = "cosine".*set schedule = "step"'),
        (["distill.schedule=step", "distill.decay_share=0.5"], "decay_share: has no effect"),
        (["teacher.schedule=step", "teacher.milestones=[0.5,0.2]"], r"teacher\.milestones: they must rise"),
        (["distill.schedule=warmup-stable-decay", "distill.warmup_epochs=1.9"], "run into the last 20%, the decay"),
        (["distill.schedule=linear"], "distill.schedule"),
    ],
)
def test_mistakes(tiny, settings, message):
    with pytest.raises(UserError, match=message):
        read_plan(tiny, settings)


@pytest.mark.parametrize("schedule", ["step", "warmup-stable-decay"])
def test_runs_resume_on_their_schedule(tiny, cached_teachers, schedule):
    options = [f"distill.schedule={schedule}"]
    whole = distill(tiny, "whole", overrides=options)
    with pytest.raises(Stopped):
        distill(tiny, "stopped", overrides=options, progress=StopAt("student", 1, signal.SIGTERM))
    with pytest.raises(UserError, match=r"distill\.schedule: was .*, now .cosine"):
        distill(tiny, "stopped", resume=True)
    with pytest.raises(UserError, match=r"distill\.epochs.*more of them change the rates"):
        distill(tiny, "stopped", overrides=[*options, "distill.epochs=3"], resume=True)
    resumed = distill(tiny, "stopped", overrides=options, resume=True)
    assert digest(resumed / "student.safetensors") == digest(whole / "student.safetensors")
    assert without_times(resumed.metrics()) == without_times(whole.metrics())
    assert digest(whole / "student.safetensors") != digest(distill(tiny, "cosine") / "student.safetensors")
