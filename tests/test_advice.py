"""A student that ends far below its teacher gets told what to change."""

import pytest

from lasnn.recipe.schema import Recipe
from lasnn.training.advice import advice

RECIPE = {
    "teacher": {"architecture": "vgg5", "epochs": 4},
    "student": {"architecture": "vgg5", "timesteps": 4, "init": "random"},
    "distill": {"epochs": 6},
    "losses": [{"name": "cross-entropy"}, {"name": "attention", "weight": 1000.0}],
}
EPOCHS = [
    {"phase": "teacher", "epoch": 1, "loss": 1.0, "losses": {"cross-entropy": 1.0}},
    {"phase": "student", "epoch": 1, "loss": 40.0, "losses": {"cross-entropy": 2.0, "attention": 0.038}},
]
SUMMARY = {"accuracy": 0.589, "teacher_accuracy": 0.982, "firing_rate": 0.1, "images": 400}


def said(epochs=EPOCHS, recipe=RECIPE, **changes):
    return advice(Recipe.from_tables(recipe), SUMMARY | changes, epochs)


def test_a_term_that_drowns_the_labels_comes_first():
    assert said() == [
        "lower losses.1.weight (1000): 'attention' makes up 95% of the loss",
        "leave student.init out: both have the same architecture, so that it starts from its teacher",
        "raise distill.epochs (6)",
        "raise student.timesteps (4)",
    ]
    low = [EPOCHS[0], EPOCHS[1] | {"loss": 2.5, "losses": {"cross-entropy": 2.0, "attention": 0.0005}}]
    assert not any("losses." in line for line in said(low))


def test_a_teachers_logits_drown_nothing():
    """They say the class as well, and alone they are the whole of the loss whatever their weight."""
    recipe = RECIPE | {"losses": [{"name": "logit-kd"}]}
    epochs = [EPOCHS[0], EPOCHS[1] | {"loss": 2.0, "losses": {"logit-kd": 2.0}}]
    assert not any("losses." in line for line in said(epochs, recipe))


def test_a_silent_student_and_another_architecture():
    recipe = RECIPE | {"teacher": {"architecture": "vgg9", "epochs": 4}}
    lines = said(recipe=recipe, firing_rate=0.002)
    assert "lower student.neuron.threshold: only 0.0020 spikes per neuron and step" in lines
    assert not any("student.init" in line for line in lines)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_accuracy": None},
        {"accuracy": 0.95},
        {"accuracy": 0.99},
        # Of twelve images one that is wrong is 0.08.
        {"accuracy": 10 / 12, "teacher_accuracy": 11 / 12, "images": 12},
    ],
)
def test_nothing_is_said_of_a_student_near_its_teacher(changes):
    assert said(**changes) == []


def test_the_command_prints_it(lasnn, tiny, cached_teachers):
    # A student that knows nothing and learns nothing.
    start = ("--set", "student.init=random")
    result = lasnn("distill", tiny, *start, "--set", "distill.lr=1e-9", "--set", "distill.epochs=1")
    assert "below its teacher; what to try:" in result.stdout
    assert "raise distill.epochs (1)" in result.stdout
