"""Residual styles and the transformer as a user meets them: in a recipe, trained, evaluated, reported; mistakes."""

import pytest

from lasnn import distill, evaluate, load_run
from lasnn.errors import UserError
from lasnn.network.teacher import without_activations
from lasnn.plan import make_plan
from lasnn.recipe.schema import Recipe
from lasnn.report import report

STYLES = ("sew", "membrane")
SHORT = ["teacher.epochs=1", "distill.epochs=1", "data.batch_size=200"]


def settings(style, student="resnet20", teacher="resnet20"):
    return [
        *(f"{table}.architecture={name}" for table, name in (("teacher", teacher), ("student", student))),
        *(
            f"{table}.residual={style}"
            for table, name in (("teacher", teacher), ("student", student))
            if name[0] == "r"
        ),
    ]


@pytest.mark.parametrize("style", [pytest.param("sew", marks=pytest.mark.full), "membrane"])
def test_a_whole_run(style, tiny):
    """Two steps of teacher and student each, from the teacher's weights; evaluated at any T, converted, reported."""
    losses = 'losses=[{name="cross-entropy"},{name="attention",weight=10.0},{name="feature-mse"}]'
    path = distill(tiny, "run", overrides=[*settings(style), *SHORT, losses, "student.init=teacher"])
    run = load_run(path.path)
    assert set(run.student.network.state_dict()) == set(without_activations(run.teacher.network))
    assert [pair["student"] for pair in make_plan(run.recipe).summary()["pairs"]] == ["stage1", "stage2", "stage3"]
    found = {result["timesteps"]: result for result in evaluate(path.path, [1, 5])}
    assert found[5]["operations"]["additions"] > found[1]["operations"]["additions"] > 0
    page = report(run, timesteps=[2], longest=4)
    assert page["attention_distance"].keys() == {"stage1", "stage2", "stage3"}
    assert [row["timesteps"] for row in page["converted"]["results"]] == [1, 2, 4]
    assert f"residual {style}" in (path / "report.html").read_text()


def test_a_transformer_is_distilled_from_its_ann_twin(tiny):
    both = [f"{table}.{key}" for table in ("teacher", "student") for key in ("architecture=spikformer", "width=16")]
    losses = 'losses=[{name="cross-entropy"},{name="attention",weight=10.0}]'
    path = distill(
        tiny, "run", overrides=[*both, *SHORT, losses, "student.init=teacher", "student.neuron.threshold=0.1"]
    )
    run = load_run(path.path)
    assert [pair["student_shape"] for pair in make_plan(run.recipe).summary()["pairs"]] == [
        [8, 14, 14],
        [16, 7, 7],
        [16, 7, 7],
    ]
    found = {result["timesteps"]: result for result in evaluate(path.path, [1, 5])}
    assert found[5]["operations"]["additions"] > found[1]["operations"]["additions"] > 0
    assert found[1]["energy_uj_by_layer"]["stage2.3.0.inner.product"] > 0
    page = report(run, timesteps=[2])
    assert page["attention_distance"].keys() == {"stage1", "stage2", "stage3"}
    assert "bmm is not linear" in page["converted"]["reason"]


@pytest.mark.parametrize("style", STYLES)
def test_a_teacher_of_another_style_pairs_but_does_not_start_its_student(style, tiny):
    other = ["teacher.residual=activate-after-add"]
    recipe = Recipe.load(tiny, [*settings(style), *other])
    assert len(make_plan(recipe).pairs) == 3
    with pytest.raises(UserError, match='teacher.residual = "activate-after-add", student.residual = "'):
        make_plan(Recipe.load(tiny, [*settings(style), *other, "student.init=teacher"]))


def test_a_style_that_is_not_known_and_one_where_there_is_none(tiny):
    with pytest.raises(UserError) as caught:
        Recipe.load(tiny, ["student.architecture=resnet20", "student.residual=membran", "teacher.residual=sew"])
    one, other = sorted(caught.value.problems)
    assert 'student.residual: \'membran\' is not valid; it takes one of "activate-after-add", "sew"' in one
    assert "teacher.residual: unknown key 'residual' in [teacher] (vgg5)" in other
