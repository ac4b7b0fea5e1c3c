"""What a distillation promises, computed once more by hand from a run's files and the keys of its draws."""

import pytest
import torch
import torch.nn.functional as F
from test_distillation import digest

from lasnn import Recipe, build, distill, load_run
from lasnn.evaluation.measure import accuracy, teacher_accuracy
from lasnn.factory import load_data, make_student, make_teacher
from lasnn.kernels import attention_map
from lasnn.plan import make_plan
from lasnn.random import generator, keyed
from lasnn.training.trainer import Trainer
from lasnn.weights import digest as digest_of
from lasnn.weights import load_weights

pytestmark = pytest.mark.usefixtures("cached_teachers")

LOSSES = (
    'losses=[{name="cross-entropy",weight=0.5},{name="attention",weight=7.0,power=1.0},'
    '{name="logit-kd",weight=0.3,temperature=2.0}]'
)
# One step an epoch, whose terms are computed before the weights change.
SETTINGS = ["data.batch_size=400", "distill.epochs=1", "teacher.epochs=1", "student.encoder=poisson", LOSSES]


def by_hand(recipe, run):
    """The terms of the first step: everything that is drawn is drawn here, by its key."""
    plan = make_plan(recipe)
    train, _, _ = load_data(recipe, plan.data, plan.device)
    order = torch.randperm(len(train), generator=generator(recipe.seed, "order", 0))
    images, labels = train.pixels[order].float() / 255, train.labels[order]
    flipped = torch.rand(len(images), generator=generator(recipe.seed, "augment", 0, 0)) < 0.5
    images = torch.where(flipped[:, None, None, None], images.flip(-1), images)

    teacher = make_teacher(recipe, plan.data)
    teacher.network.load_state_dict(load_weights(run / "teacher.safetensors")[0])
    with torch.no_grad():
        teacher_logits, teacher_features = teacher.eval().taps(images, ["stage1", "stage2", "stage3"])
    with keyed(recipe.seed, "student"):
        student = make_student(recipe, plan.data).train()
    draws = generator(recipe.seed, "encode", 0, 0)
    steps = torch.stack([(torch.rand(images.shape, generator=draws) < images).float() for _ in range(2)])
    logits, features = student.network(steps, 2, ["stage1", "stage2", "stage3"])

    mean = logits.mean(0)
    attention = sum(
        (attention_map(features[name], 1.0) - attention_map(teacher_features[name][None], 1.0)).square().mean()
        for name in features
    )
    softened = F.log_softmax(teacher_logits / 2, -1), F.log_softmax(mean / 2, -1)
    return {
        "cross-entropy": F.cross_entropy(mean, labels).item(),
        "attention": attention.item(),
        "logit-kd": 4 * F.kl_div(softened[1], softened[0], reduction="batchmean", log_target=True).item(),
    }


def test_the_terms_of_a_step_are_those_of_the_recipe(tiny):
    run = distill(tiny, overrides=SETTINGS)
    line = run.metrics()[-1]
    terms = by_hand(Recipe.load(tiny, SETTINGS), run)
    assert line["losses"] == pytest.approx(terms, rel=1e-5)
    weighted = 0.5 * terms["cross-entropy"] + 7 * terms["attention"] + 0.3 * terms["logit-kd"]
    assert line["loss"] == pytest.approx(weighted, rel=1e-5), "each weight goes with its term"


def test_the_teacher_is_frozen_and_in_evaluation_mode_at_every_step(tiny, monkeypatch):
    seen, step = [], Trainer.train_step

    def looked_at(self, batch):
        terms, phase = step(self, batch), self.phase
        if phase.name == "student":
            teacher = phase.networks["teacher"]
            assert not any(module.training for module in teacher.modules())
            assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
            assert all(module.training for module in phase.model.modules())
            seen.append(digest_of(teacher.network.state_dict()))
        return terms

    monkeypatch.setattr(Trainer, "train_step", looked_at)
    run = distill(tiny)
    assert len(seen) == 16
    assert set(seen) == {digest_of(load_weights(run / "teacher.safetensors")[0])}, "its buffers do not change either"


def test_the_accuracies_are_those_of_the_networks_that_are_named(tiny):
    run = distill(tiny)
    loaded, summary = load_run(run.path), run.read_json("summary.json")
    _, test, _ = load_data(loaded.recipe, loaded.data, loaded.device)
    options = {"batch_size": loaded.recipe.data.batch_size}
    assert summary["teacher_accuracy"] == teacher_accuracy(loaded.teacher, test, **options)
    assert summary["accuracy"] == accuracy(loaded.student, test, seed=0, **options)
    phases = {line["phase"]: line["accuracy"] for line in run.metrics()}
    assert phases == {"teacher": summary["teacher_accuracy"], "student": summary["accuracy"]}


@pytest.mark.parametrize("phase", ["teacher", "student"])
def test_networks_are_measured_in_evaluation_mode(tiny, monkeypatch, phase):
    modes, evaluate = [], Trainer.evaluate

    def looked_at(self):
        if self.phase.name == phase:
            model = self.phase.model
            model.register_forward_hook(lambda module, *_: modes.append(module.training))
            model.network.head.register_forward_hook(lambda module, *_: modes.append(module.training))
        return evaluate(self)

    monkeypatch.setattr(Trainer, "evaluate", looked_at)
    # Of this seed no teacher is cached.
    distill(tiny, overrides=["distill.epochs=1", "teacher.epochs=1", "seed=11"])
    assert modes
    assert not any(modes)


def test_the_order_the_augmentation_and_the_encoder_are_keyed_by_seed_epoch_and_step(tiny):
    built = build(tiny, overrides=["student.encoder=poisson"], train_teacher=True)
    first, again, second = ([b for b, _ in built.batches(epoch)] for epoch in (0, 0, 1))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, second, strict=True)), "another epoch"
    other = build(tiny, overrides=["student.encoder=poisson", "seed=1"], train_teacher=True)
    assert not torch.equal(first[0], next(iter(other.batches(0)))[0]), "another seed"
    same = build(tiny, overrides=["student.encoder=poisson"])
    start, same, changed = (made.student.state_dict() for made in (built, same, other))
    assert digest_of(start) == digest_of(same)
    assert digest_of(start) != digest_of(changed), "the student's first weights"


def test_the_teacher_does_not_change_what_the_student_draws(tiny):
    """Without a term that asks for it, a run with a teacher trains the student that one without it trains."""
    plain = 'losses=[{name="cross-entropy"}]'
    with_teacher = distill(tiny, overrides=[plain])
    alone = distill(tiny, overrides=[plain, "teacher="])
    assert digest(with_teacher / "student.safetensors") == digest(alone / "student.safetensors")
