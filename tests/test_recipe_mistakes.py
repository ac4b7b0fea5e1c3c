"""A recipe with one mistake, at every place of every shipped recipe and in every option of every registered part: the
key is named in a line of its own, and nothing but a `UserError` is raised.
"""

import copy
import tomllib
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from lasnn.errors import UserError
from lasnn.plan import make_plan
from lasnn.recipe.load import key_of, shipped
from lasnn.recipe.schema import Recipe
from lasnn.registry import (
    REQUIRED,
    architectures,
    augmentations,
    datasets,
    encoders,
    losses,
    neurons,
    teachers,
)

# What TOML can say, with the edges of its numbers; no key takes all of them.
VALUES = (True, 3, 2.5, -1, 10**30, float("nan"), float("inf"), "", "text", [], [1], ["text"], [[]], [{}], {}, {"a": 1})
SHIPPED = {name: tomllib.loads(path.read_text(encoding="utf-8")) for name, path in shipped().items()}

PLAIN = {
    "data": {"name": "fashion-mnist-mini"},
    "teacher": {"architecture": "vgg5", "epochs": 1},
    "student": {"architecture": "vgg5", "encoder": {"name": "direct"}, "neuron": {"name": "lif"}},
    "losses": [{"name": "cross-entropy"}],
}
# The table of a recipe that names a part of each kind, and the options that lasnn passes itself.
TABLES = {
    architectures: ("student",),
    teachers: ("teacher",),
    encoders: ("student", "encoder"),
    neurons: ("student", "neuron"),
    losses: ("losses", 1),
    datasets: ("data",),
    augmentations: ("data", "augment", 0),
}
SUPPLIED = {"in_channels", "num_classes"}
PARTS = [(registry, name) for registry in TABLES for name in registry]


def places(tables: Any, here: tuple = ()):
    """The place of every table, key and entry of a list."""
    for key, value in tables.items() if isinstance(tables, dict) else enumerate(tables):
        yield (*here, key)
        if isinstance(value, dict | list):
            yield from places(value, (*here, key))


def changed(tables: dict, place: tuple, value: Any = None, *, remove: bool = False) -> dict:
    """A copy of the tables with another value at a place, or with nothing there."""
    tables = copy.deepcopy(tables)
    table = tables
    for key in place[:-1]:
        table = table[key]
    if remove:
        del table[place[-1]]
    else:
        table[place[-1]] = value
    return tables


def mistakes(tables: dict, place: tuple) -> tuple[str, ...]:
    """The lines about a recipe's form; one of them names the place, or the table that it stands in."""
    problems = problems_of(Recipe.from_tables, tables)
    key, last = key_of(place), [part for part in place if isinstance(part, str)][-1]
    blamed = [problem.removeprefix("recipe: ").partition(": ") for problem in problems]
    assert not blamed or any(
        name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") or last in name + message
        for name, _, message in blamed
    ), f"{key}: {problems}"
    return problems


def problems_of(function, *arguments) -> tuple[str, ...]:
    """The lines of a user's mistakes; any other error passes through."""
    try:
        function(*arguments)
    except UserError as error:
        return error.problems
    return ()


def part_recipe(registry, name: str) -> dict:
    """A recipe that names a part, with each of its options written down."""
    options = {
        option: example(info.annotation) if info.default is REQUIRED else info.default
        for option, info in registry[name].options.items()
        if option not in SUPPLIED
    }
    options = {option: value for option, value in options.items() if value is not None}
    tables = copy.deepcopy(PLAIN)
    if registry in (architectures, teachers):
        table = TABLES[registry][0]
        tables[table] = {"architecture": name} | ({"epochs": 1} if table == "teacher" else {}) | options
    elif registry is losses:
        tables["losses"] = [] if name == "cross-entropy" else tables["losses"]
        tables["losses"].append({"name": name, **options})
    elif registry is augmentations:
        tables["data"]["augment"] = [{"name": name, **options}]
    elif registry is datasets:
        tables["data"] = {"name": name, **options}
    else:
        tables["student"][TABLES[registry][1]] = {"name": name, **options}
    return tables


def table_of(registry, name: str) -> tuple:
    return ("losses", 0) if name == "cross-entropy" and registry is losses else TABLES[registry]


def example(annotation: Any) -> Any:
    """A value that an option without a default takes."""
    if get_origin(annotation) is Annotated:
        return example(get_args(annotation)[0])
    return (
        get_args(annotation)[0] if get_origin(annotation) is Literal else {int: 1, float: 1.0, str: "text"}[annotation]
    )


def shipped_for_their_keys():
    """All that ship; those that have no key which others before them lack are left to `make test-all`."""
    seen, found = set(), []
    for name, tables in SHIPPED.items():
        keys = {key_of(place) for place in places(tables)}
        found.append(pytest.param(name, marks=pytest.mark.full if keys <= seen else []))
        seen |= keys
    return found


@pytest.mark.parametrize("name", shipped_for_their_keys())
def test_each_key_and_table_of_a_shipped_recipe_removed(name):
    for place in places(SHIPPED[name]):
        mistakes(changed(SHIPPED[name], place, remove=True), place)


@pytest.mark.parametrize("name", shipped_for_their_keys())
def test_each_value_of_a_shipped_recipe_of_another_type(name):
    for place in places(SHIPPED[name]):
        found = [mistakes(changed(SHIPPED[name], place, value), place) for value in VALUES]
        assert any(found), f"{key_of(place)} takes everything"


@pytest.mark.parametrize(("registry", "name"), PARTS, ids=lambda value: value if isinstance(value, str) else value.kind)
def test_each_option_of_a_part(registry, name):
    tables, table = part_recipe(registry, name), table_of(registry, name)
    assert not mistakes(tables, table)
    for option, info in registry[name].options.items():
        if option in SUPPLIED:
            continue
        place = (*table, option)
        for value in VALUES:
            mistakes(changed(tables, place, value), place)
        said = mistakes(changed(tables, place, {"wrong": [{}]}), place)
        assert any(line.startswith(f"recipe: {key_of(place)}: ") for line in said), said
        misspelt = changed(tables, (*table, f"{option}x"), 1)
        assert any(f"did you mean {option!r}?" in line for line in mistakes(misspelt, (*table, f"{option}x")))
        if info.default is REQUIRED:
            said = mistakes(changed(tables, place, remove=True), place)
            assert f"recipe: {key_of(place)}: missing; {name!r} needs it ({info.type_name})" in said


def plan(tables: dict) -> None:
    """The plan of a recipe: it stands, or says what is wrong in a line each."""
    problems = problems_of(lambda: make_plan(Recipe.from_tables(tables)))
    assert all(problem.startswith("recipe: ") for problem in problems)


# Values that many options take by their type, and that no network can be built from.
EXTREME = (10**30, -1, 0, 1e-300, float("inf"), "", [], [1])


@pytest.mark.parametrize(("registry", "name"), PARTS, ids=lambda value: value if isinstance(value, str) else value.kind)
def test_what_a_part_cannot_be_built_with_is_said_by_the_plan(registry, name):
    tables, table = part_recipe(registry, name), table_of(registry, name)
    for option in registry[name].options:
        if option not in SUPPLIED:
            for value in EXTREME:
                plan(changed(tables, (*table, option), value))


def test_what_the_quickstart_cannot_be_built_with_is_said_by_the_plan():
    tables = SHIPPED["quickstart"]
    for place in places(tables):
        for value in EXTREME:
            plan(changed(tables, place, value))
        plan(changed(tables, place, remove=True))
