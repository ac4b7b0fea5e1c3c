"""Every shipped recipe says where it comes from, dry-runs without data, and its objective trains."""

import pytest

from lasnn.plan import make_plan
from lasnn.recipe import Recipe, shipped, summary


@pytest.mark.parametrize("name", shipped())
def test_dry_run(name, lasnn):
    plan = lasnn.json("distill", name, "--dry-run", "--set", "device=cpu")
    assert plan["recipe"] == name
    assert plan["pairs"]
    assert plan["teacher_parameters"]


@pytest.mark.parametrize("name", shipped())
def test_header(name):
    path = shipped()[name]
    assert 20 < len(summary(path)) < 120
    assert "T = 4" in summary(path) or name == "quickstart"
    header = path.read_text().partition("\nseed")[0]
    assert "measured" in header, "the header says what was measured with the recipe, or that nothing was"


@pytest.mark.parametrize("name", shipped())
def test_pairs_have_equal_resolution(name):
    for pair in make_plan(Recipe.load(name, ["device=cpu"])).pairs:
        assert pair.student_shape[1:] == pair.teacher_shape[1:]
