"""An option that a part cannot do without: named in one line, together with whatever else is wrong."""

from typing import Annotated

import pytest
from pydantic import Field

from lasnn.errors import UserError
from lasnn.option_types import describe_type
from lasnn.registry import REGISTRIES, REQUIRED

RECIPE = """
[data]
name = "fashion-mnist-mini"
[teacher]
architecture = "torchvision"
epochs = 1
[student]
architecture = "vgg5"
timesteps = 0
"""


@pytest.mark.parametrize(
    ("registry", "name"),
    [(registry, name) for registry in REGISTRIES.values() for name in registry],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_a_part_built_without_its_options_says_which(registry, name):
    needed = {option for option, info in registry[name].options.items() if info.default is REQUIRED}
    if not needed:
        return
    with pytest.raises(UserError) as error:
        registry.build(name)
    assert {problem.partition(":")[0] for problem in error.value.problems} == needed
    assert all(f"missing; {name!r} needs it (" in problem for problem in error.value.problems)


def test_a_recipe_names_it_beside_other_mistakes(lasnn):
    (lasnn.folder / "r.toml").write_text(RECIPE)
    said = lasnn("distill", "r.toml", "--dry-run", code=2).stderr
    assert "teacher.model: missing; 'torchvision' needs it (one of" in said
    assert "student.timesteps: 0 is not valid" in said


def test_a_list_says_how_long_it_must_be():
    pair = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
    assert describe_type(pair) == "a list of 2 (a whole number (>= 1) each)"
    assert describe_type(Annotated[list[int], Field(min_length=1)]) == "a list (a whole number each)"
