"""The weight of a term over the training."""

import signal

import pytest
from test_distillation import StopAt, digest, without_times

from lasnn import build, distill
from lasnn.plan import read_plan
from lasnn.recipe.schema import LossTable
from lasnn.training.stop import Stopped

TERMS = (
    'losses=[{name="cross-entropy"},{name="logit-kd",weight=2.0,schedule="cosine"},'
    '{name="attention",weight=3.0,schedule="until",until=0.5}]'
)


def test_weights_by_hand():
    cosine = LossTable(name="a", weight=2.0, schedule="cosine")
    assert [cosine.weight_at(done) for done in (0, 1 / 3, 0.5, 2 / 3)] == pytest.approx([2.0, 1.5, 1.0, 0.5])
    until = LossTable(name="a", weight=2.0, schedule="until", until=0.5)
    assert [until.weight_at(done) for done in (0, 0.49, 0.5, 0.9)] == [2.0, 2.0, 0.0, 0.0]
    assert LossTable(name="a", weight=0.3).weight_at(0.9) == 0.3


def test_the_mean_weight_of_an_epoch_by_hand():
    """ "until" a quarter of six epochs ends within the second."""
    until = LossTable(name="a", weight=2.0, schedule="until", until=0.25)
    assert [until.weight_in(epoch, 6) for epoch in (1, 2, 3, 6)] == pytest.approx([2.0, 1.0, 0.0, 0.0])
    assert until.weight_in(1, 1) == pytest.approx(0.5)
    cosine = LossTable(name="a", weight=2.0, schedule="cosine")
    for epochs in (1, 3):
        for epoch in range(1, epochs + 1):
            steps = [cosine.weight_at((epoch - 1 + step / 1000) / epochs) for step in range(1000)]
            assert cosine.weight_in(epoch, epochs) == pytest.approx(sum(steps) / 1000, abs=2e-3)
    assert LossTable(name="a", weight=0.3).weight_in(2, 3) == pytest.approx(0.3)


def test_the_step_sets_the_weights_and_the_terms_stay_unweighted(tiny):
    """Eight steps an epoch, two epochs: the middle of the training is epoch 1, step 0."""
    built = build(tiny, overrides=[TERMS], train_teacher=True)
    images, targets = next(iter(built.batches(0)))
    for (epoch, step), (cosine, until) in {
        (0, 0): (2.0, 3.0),
        (0, 4): (1.7071068, 3.0),
        (0, 7): (1.1950903, 3.0),
        (1, 0): (1.0, 0.0),
        (1, 4): (0.2928932, 0.0),
    }.items():
        terms = {name: value.item() for name, value in built.objective(images, targets, epoch, step).items()}
        assert list(terms) == ["cross-entropy", "logit-kd", "attention", "loss"]
        wanted = terms["cross-entropy"] + cosine * terms["logit-kd"] + until * terms["attention"]
        assert terms["loss"] == pytest.approx(wanted, rel=1e-6)
        assert terms["attention"] > 0


def test_a_stopped_run_resumes_on_its_schedules(tiny):
    whole = distill(tiny, "whole", overrides=[TERMS])
    with pytest.raises(Stopped):
        distill(tiny, "stopped", overrides=[TERMS], progress=StopAt("student", 1, signal.SIGTERM))
    resumed = distill(tiny, "stopped", overrides=[TERMS], resume=True)
    assert digest(resumed / "student.safetensors") == digest(whole / "student.safetensors")
    assert without_times(resumed.metrics()) == without_times(whole.metrics())
    other = distill(tiny, "other", overrides=[TERMS.replace("0.5", "0.9")])
    assert digest(other / "student.safetensors") != digest(whole / "student.safetensors")


def test_the_plan_says_them(tiny):
    notes = read_plan(tiny, [TERMS]).notes
    assert notes == (
        "loss     'logit-kd': its weight falls to 0 along a cosine",
        "loss     'attention': its weight is 0 after 50% of the training",
    )
