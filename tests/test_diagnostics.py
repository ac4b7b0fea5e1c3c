"""What is measured of the terms and the stages after each epoch, and that it changes nothing."""

import json
import signal

import pytest
import torch
from test_distillation import StopAt, digest, without_times

from lasnn import build, distill
from lasnn.network.units import NormSpike
from lasnn.plan import read_plan
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


def test_a_long_run_is_counted_whole(tiny):
    """Without gradients it comes in chunks of time steps; whether a unit spiked is asked of all of them."""
    built = build(tiny, overrides=["student.timesteps=12", "losses=[{name='cross-entropy'}]"], train_teacher=True)
    measure = Diagnostics(built.objective, built.plan, built.train)
    found = measure(0)["diagnostics"]
    student, spikes = built.student.eval(), {}

    def keep(unit, _, output):
        spikes[unit.name] = output != 0

    for unit in student.modules():
        if isinstance(unit, NormSpike):
            unit.register_forward_hook(keep)
    # With gradients all twelve steps are one call.
    student.steps(built.train.pixels[measure.chosen].float() / 255)
    for stage, rate in found["firing_rate"].items():
        of_stage = [out for name, out in spikes.items() if name.partition(".")[0] == stage]
        assert {len(out) for out in of_stage} == {12 * len(measure.chosen)}
        fired = torch.cat([out.any(0).flatten() for out in of_stage])
        assert rate == pytest.approx(torch.cat([out.flatten() for out in of_stage]).float().mean().item(), abs=1e-6)
        assert found["silent"][stage] == pytest.approx(1 - fired.float().mean().item(), abs=1e-6)


def test_targets_are_as_in_training(tiny):
    """A loss of one's own that takes class probabilities alone, beside an augmentation that mixes."""
    (tiny.parent / "soft.py").write_text(
        """
from lasnn import losses

@losses.register("soft")
def soft(logits, targets):
    \"\"\"Cross-entropy with class probabilities.\"\"\"
    return -(targets * logits.mean(0).log_softmax(-1)).sum(-1).mean()
"""
    )
    terms = 'losses=[{name="soft"},{name="attention",weight=3.0}]'
    mixed = ["data.augment=['mixup']", "plugins=['tiny_clothes.py','soft.py']", terms, "distill.epochs=1"]
    found = distill(tiny, "run", overrides=mixed).metrics()[-1]["diagnostics"]
    assert found["gradient"]["soft"] > 0


def test_the_images_are_few(tiny):
    plan = build(tiny, overrides=[TERMS], train_teacher=True).plan
    # 1 + 2/3 * 3 passes an image, 1.2 % of an epoch.
    assert how_many(plan, 10_000) == 40
    assert how_many(plan, 60_000) == plan.recipe.data.batch_size == 50
    assert how_many(plan, 3) == 3


def test_the_images_are_no_more_than_a_process_has(tiny, monkeypatch):
    plan = build(tiny, overrides=[TERMS], train_teacher=True).plan
    monkeypatch.setattr("lasnn.processes.world_size", lambda: 5)
    assert how_many(plan, 60_000) == 10


RECIPE = {
    "teacher": {"architecture": "vgg5", "epochs": 1},
    "student": {"architecture": "vgg5"},
    "losses": [{"name": "cross-entropy"}, {"name": "attention", "weight": 100.0}],
}


@pytest.mark.parametrize(
    ("ratios", "line"),
    [
        ([0.001, 0.003], "'attention' does next to nothing: its gradient is 0.002 of cross-entropy's; "
         "raise losses.1.weight from 100 to about 5e+03 for a tenth of that"),
        ([4.0, 6.0], "'attention' drowns the labels: its gradient is 5 times cross-entropy's; "
         "lower losses.1.weight from 100 to about 20, to make them equal"),
        ([0.0, 0.0], "'attention' does nothing: it has no gradient; leave it out, or compare other stages"),
        ([0.3, 1.0], None),
        ([None], None),
    ],
)  # fmt: skip
def test_what_is_said_at_the_end(ratios, line):
    assert terms_said(RECIPE, "attention", ratios) == ([] if line is None else [line])


def terms_said(recipe, term, ratios):
    """What is said of a term whose gradient had these ratios in the epochs of the student."""
    recipe = Recipe.from_tables({**recipe, "distill": {"epochs": len(ratios)}})
    lines = [
        {"phase": "student", "epoch": epoch, "diagnostics": {"gradient": {term: ratio}}}
        for epoch, ratio in enumerate(ratios, start=1)
    ]
    return list(term_notes(recipe, [{"phase": "teacher", "epoch": 1}, *lines]))


def test_a_term_is_judged_by_the_epochs_that_it_is_felt_in():
    until = {"name": "attention", "weight": 100.0, "schedule": "until", "until": 0.4}
    recipe = {**RECIPE, "losses": [{"name": "cross-entropy"}, until]}
    assert terms_said(recipe, "attention", [0.3, 0.0, 0.0]) == []
    assert "is 0.002 of cross-entropy's" in terms_said(recipe, "attention", [0.002, 0.002, 0.0])[0]


def test_a_teacher_s_logits_drown_no_labels():
    recipe = {**RECIPE, "losses": [{"name": "cross-entropy", "weight": 0.1}, {"name": "logit-kd", "weight": 9.0}]}
    assert terms_said(recipe, "logit-kd", [14.0, 20.0]) == []


def test_only_the_student_s_logits_learn_the_class_of_the_teacher_s():
    """The map that samd has them choose says where, not what."""
    recipe = {**RECIPE, "losses": [{"name": "cross-entropy"}, {"name": "samd", "weight": 8.0}]}
    [line] = terms_said(recipe, "samd", [4.0])
    assert line.startswith("'samd' drowns the labels: its gradient is 4 times cross-entropy's; lower losses.1.weight")


@pytest.mark.parametrize("name", ["similarity", "cka"])
def test_a_loss_that_compares_images_is_measured_on_a_whole_batch_or_not_at_all(tiny, name):
    terms = f'losses=[{{name="cross-entropy"}},{{name="{name}"}},{{name="attention"}}]'
    run = distill(tiny, "run", overrides=[terms])
    found = run.metrics()[-1]["diagnostics"]
    assert found["images"] < 50
    assert found["gradient"][name] is None
    assert found["gradient"]["attention"] > 0
    assert not any(name in line for line in run.read_json("summary.json")["terms"])
    report(run.path)
    built = build(tiny, overrides=[terms, f"data.batch_size={found['images']}"], train_teacher=True)
    assert Diagnostics(built.objective, built.plan, built.train)(0)["diagnostics"]["gradient"][name] > 0


def test_a_whole_batch_is_taken_where_it_costs_no_more(tiny):
    """Of 100,000 images 1.2 % are more than 256, whatever the most is elsewhere."""
    for name, wanted in (("attention", 128), ("cka", 256)):
        plan = read_plan(tiny, [f'losses=[{{name="cross-entropy"}},{{name="{name}"}}]', "data.batch_size=256"])
        assert how_many(plan, 100_000) == wanted


def test_the_gradient_of_a_scheduled_term_is_that_of_the_epoch(tiny):
    """Off after the first quarter of one epoch: it was felt, and is not said to do nothing."""
    terms = 'losses=[{name="cross-entropy"},{name="attention",weight=100.0,schedule="until",until=0.25}]'
    run = distill(tiny, "run", overrides=[terms, "distill.epochs=1"])
    assert run.metrics()[-1]["diagnostics"]["gradient"]["attention"] > 0
    assert not any("does nothing" in line for line in run.read_json("summary.json")["terms"])


def test_the_command_says_it(tiny, lasnn):
    weights = 'losses=[{name="cross-entropy"},{name="attention",weight=1e-6}]'
    result = lasnn("distill", tiny, "--out", "run", "--set", weights, "--set", "distill.epochs=1")
    assert "'attention' does next to nothing" in result.stdout
    assert json.loads((tiny.parent / "run" / "summary.json").read_text())["terms"]
