"""A training loop of one's own, from a recipe's parts."""

import pytest
import torch

from lasnn import Recipe, build, distill
from lasnn.errors import UserError
from lasnn.weights import load_state

# One step in all, after which SGD's momentum is that step's gradient.
ONE_STEP = ["data.batch_size=400", "distill.epochs=1", "teacher.epochs=1", "distill.weight_decay=0"]


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["student.encoder=poisson", "data.augment=[]"],
        ['losses=[{name="cross-entropy",readout="step"},{name="logit-kd"},{name="feature-mse",weight=0.1}]'],
        ["teacher=", 'losses=[{name="tet"}]'],
        ["distill.time_chunk=1", "student.init=teacher"],
    ],
)
def test_the_first_step_is_that_of_distill(tiny, settings):
    run = distill(tiny, overrides=[*ONE_STEP, *settings])
    built = build(tiny, overrides=[*ONE_STEP, *settings])
    [(images, targets)] = built.batches(0)
    terms = built.objective(images, targets, epoch=0, step=0)
    terms["loss"].backward()
    line = run.metrics()[-1]
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        line["losses"] | {"loss": line["loss"]}, rel=1e-12
    )
    # The optimiser's two groups: weights, then vectors.
    learnt = list(built.student.parameters())
    learnt = [p for p in learnt if p.ndim > 1] + [p for p in learnt if p.ndim <= 1]
    kept = load_state(run / "last.pt")["optimizer"]["state"]
    assert len(kept) == len(learnt)
    for number, parameter in enumerate(learnt):
        assert torch.equal(parameter.grad, kept[number]["momentum_buffer"]), number


def test_a_deterministic_recipes_teacher_is_trained_as_it_says(tiny, monkeypatch):
    """Its place in the cache promises it."""
    seen = []
    monkeypatch.setattr(
        torch.optim.Optimizer, "zero_grad",
        lambda *_, **__: seen.append(torch.are_deterministic_algorithms_enabled()),
    )  # fmt: skip
    build(tiny, overrides=[*ONE_STEP, "deterministic=true", "seed=5"], train_teacher=True)
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_ten_lines_of_pytorch_train_with_it(tiny):
    built = build(tiny, train_teacher=True)
    optimizer = torch.optim.SGD(built.student.parameters(), lr=0.05, momentum=0.9)
    means = []
    for epoch in range(3):
        losses = []
        for step, (images, targets) in enumerate(built.batches(epoch)):
            optimizer.zero_grad()
            loss = built.objective(images, targets, epoch, step)["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
    assert means[-1] < means[0]


def test_parts(tiny):
    built = build(Recipe.load(tiny), train_teacher=True)
    assert all(isinstance(part, torch.nn.Module) for part in (built.teacher, built.student, built.objective))
    assert not built.teacher.training
    assert not any(parameter.requires_grad for parameter in built.teacher.parameters())
    assert list(built.objective.parameters()) == [], "its losses have none of their own"
    assert len(built.batches(0)) == 8
    images, _ = next(iter(built.batches(0)))
    assert built.student.eval()(images).shape == (50, 10)


def test_a_call_leaves_the_callers_random_state_alone_and_repeats(tiny):
    built = build(tiny, overrides=["student.encoder=poisson"], train_teacher=True)
    images, targets = next(iter(built.batches(0)))
    state = torch.get_rng_state()
    one, again, other = (built.objective(images, targets, 0, step)["loss"] for step in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert one == again
    assert one != other, "the step keys what the encoder draws"


def test_a_teacher_is_not_trained_unasked(tiny):
    with pytest.raises(UserError, match=r"the teacher of tiny is not trained yet: build\(\.\.\., train_teacher=True\)"):
        build(tiny)
    trained = build(tiny, train_teacher=True)
    from_cache = build(tiny)
    for one, two in zip(trained.teacher.parameters(), from_cache.teacher.parameters(), strict=True):
        assert torch.equal(one, two)
