"""What is measured of the terms and the stages after each epoch, and that it changes nothing."""

import json
import signal

import pytest
import torch
from test_distillation import StopAt, digest, without_times

from lasnn import build, distill
from lasnn.recipe.schema import Recipe
from lasnn.report import report
from lasnn.training.advice import term_notes
from lasnn.training.diagnostics import Diagnostics, how_many
from lasnn.training.stop import Stopped

TERMS = 'losses=[{name="cross-entropy"},{name="logit-kd",weight=2.0},{name="attention",weight=3.0}]'

pytestmark = pytest.mark.usefixtures("cached_teachers")


def test_they_change_nothing_and_are_logged(tiny):
    run = distill(tiny, "on", overrides=[TERMS])
    without = distill(tiny, "off", overrides=[TERMS, "distill.diagnostics=false"])
    assert digest(run / "student.safetensors") == digest(without / "student.safetensors")
    lines = [line for line in run.metrics() if line["phase"] == "student"]
    assert [line.pop("diagnostics")["images"] for line in lines] == [4, 4]
    assert without_times(lines) == without_times([line for line in without.metrics() if line["phase"] == "student"])
    found = run.metrics()[-1]["diagnostics"]
    assert found["gradient"].keys() == {"logit-kd", "attention"}
    assert all(value > 0 for value in found["gradient"].values())
    stages = {"stage1", "stage2", "stage3"}
    assert found["attention_distance"].keys() == stages
    for what in ("attention_distance", "silent", "firing_rate"):
        assert all(0 <= value <= 1 for value in found[what].values())
    assert found["firing_rate"].keys() == found["silent"].keys() >= stages
    report(run.path)
    page = (run / "report.html").read_text()
    for title in ("distance of the attention maps", "gradient of each term", "firing rate by stage", "silent neurons"):
        assert title in page


def test_by_hand(tiny):
    built = build(tiny, overrides=[TERMS], train_teacher=True)
    student, teacher = built.student, built.teacher
    for images, targets in built.batches(0):
        # Running statistics of this data.
        student.train()
        built.objective(images, targets)
    kept = {name: value.clone() for name, value in student.state_dict().items()}
    measure = Diagnostics(built.objective, built.plan, built.train)
    before = torch.random.get_rng_state()
    found = measure(0)["diagnostics"]
    assert torch.equal(before, torch.random.get_rng_state())
    assert student.training
    assert all(torch.equal(value, kept[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())
    assert measure(0)["diagnostics"] == found

    student.eval()
    images = built.train.pixels[measure.chosen].float() / 255
    targets = built.train.labels[measure.chosen]

    def gradient(name):
        terms = built.objective.terms(images, targets, torch.Generator(), {"first": 0, "total": None})
        gradients = torch.autograd.grad(terms[name], list(student.parameters()), allow_unused=True)
        return torch.cat([one.flatten() for one in gradients if one is not None]).norm().item()

    reference = gradient("cross-entropy")
    for name, weight in (("logit-kd", 2.0), ("attention", 3.0)):
        assert found["gradient"][name] == pytest.approx(weight * gradient(name) / reference, rel=1e-4)
    with torch.no_grad():
        _, ours = student.steps(images, ["stage2"])
        _, theirs = teacher.taps(images, ["stage2"])
    maps = [feature.square().sum(1).flatten(1).double() for feature in (ours["stage2"].mean(0), theirs["stage2"])]
    wanted = 1 - torch.nn.functional.cosine_similarity(*maps).mean().item()
    assert found["attention_distance"]["stage2"] == pytest.approx(wanted, abs=1e-5)


def test_a_stopped_run_logs_the_same(tiny):
    whole = distill(tiny, "whole", overrides=[TERMS])
    with pytest.raises(Stopped):
        distill(tiny, "stopped", overrides=[TERMS], progress=StopAt("student", 1, signal.SIGTERM))
    resumed = distill(tiny, "stopped", overrides=[TERMS], resume=True)
    assert without_times(resumed.metrics()) == without_times(whole.metrics())


def test_chunks_parts_and_lone_students(tiny):
    for number, options in enumerate(
        (["student.timesteps=4", "distill.time_chunk=2", TERMS], ["data.accumulate=2", TERMS], ["teacher="])
    ):
        run = distill(tiny, f"run{number}", overrides=[*options, "distill.epochs=1"])
        found = run.metrics()[-1]["diagnostics"]
        assert found["firing_rate"]["stage1"] > 0
        assert ("gradient" in found) == ("attention_distance" in found) == (TERMS in options)


def test_the_images_are_few(tiny):
    plan = build(tiny, overrides=[TERMS], train_teacher=True).plan
    # 1 + 2/3 * 3 passes an image, 1.2 % of an epoch.
    assert how_many(plan, 10_000) == 40
    assert how_many(plan, 60_000) == plan.recipe.data.batch_size == 50
    assert how_many(plan, 3) == 3


RECIPE = {
    "teacher": {"architecture": "vgg5", "epochs": 1},
    "student": {"architecture": "vgg5"},
    "losses": [{"name": "cross-entropy"}, {"name": "attention", "weight": 100.0}],
}


@pytest.mark.parametrize(
    ("ratios", "line"),
    [
        ([0.001, 0.003], "'attention' does next to nothing: its gradient is 0.002 of cross-entropy's; "
         "raise losses.1.weight from 100 to about 5e+03 for a tenth of it"),
        ([4.0, 6.0], "'attention' drowns the labels: its gradient is 5 times cross-entropy's; "
         "lower losses.1.weight from 100 to about 20 for as much"),
        ([0.0, 0.0], "'attention' does nothing: it has no gradient; leave it out, or compare other stages"),
        ([0.3, 1.0], None),
        ([None], None),
    ],
)  # fmt: skip
def test_what_is_said_at_the_end(ratios, line):
    metrics = [{"phase": "student", "diagnostics": {"gradient": {"attention": ratio}}} for ratio in ratios]
    said = list(term_notes(Recipe.from_tables(RECIPE), [{"phase": "teacher"}, *metrics]))
    assert said == ([] if line is None else [line])


def test_the_command_says_it(tiny, lasnn):
    weights = 'losses=[{name="cross-entropy"},{name="attention",weight=1e-6}]'
    result = lasnn("distill", tiny, "--out", "run", "--set", weights, "--set", "distill.epochs=1")
    assert "'attention' does next to nothing" in result.stdout
    assert json.loads((tiny.parent / "run" / "summary.json").read_text())["terms"]
