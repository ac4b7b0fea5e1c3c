from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from lasnn import architectures, losses, teachers
from lasnn.errors import UserError
from lasnn.recipe.json_schema import option_schemas
from lasnn.registry import REGISTRIES, REQUIRED, Registry, raised_at


@pytest.fixture
def registry():
    return Registry("thing", "lasnn.errors")


def test_register_build_and_list(registry):
    @registry.register("b")
    def b(x, *, scale: float = 2.0):
        """Scales x.

        More.
        """
        return x * scale

    @registry.register("a")
    def a(x):
        """Returns x."""
        return x

    assert registry.names() == list(registry) == ["a", "b"]
    assert len(registry) == 2
    assert "a" in registry
    assert registry.build("b", 3, scale=4.0) == 12
    assert registry["b"].description == "Scales x."
    assert registry["b"].inputs == ("x",)
    assert registry["b"].options["scale"].default == 2.0


def test_unknown_name_names_the_nearest_and_all(registry):
    registry.register("resnet19")(lambda: None)
    registry.register("vgg9")(lambda: None)
    with pytest.raises(UserError, match=r"unknown thing 'resnet91'; did you mean 'resnet19'\? known: resnet19, vgg9"):
        registry["resnet91"]


def test_duplicates_are_refused_and_say_where_the_first_is(registry):
    def one():
        return 1

    def other():
        return 2

    registry.register("a")(one)
    with pytest.raises(ValueError, match=r"thing 'a' is already registered \(.*test_registry.py:\d+\)"):
        registry.register("a")(other)
    assert registry.build("a") == 1


@pytest.mark.parametrize(
    ("registry", "name", "kind"), [(teachers, "resnet18", "architecture"), (architectures, "timm", "teacher")]
)
def test_teachers_and_architectures_share_their_names(registry, name, kind):
    """A recipe's teacher.architecture takes either."""
    with pytest.raises(ValueError, match=rf"{name}'.*there is {kind} '{name}' \(.*\.py:\d+\).*choose another name"):
        registry.register(name)(lambda act, *, in_channels, num_classes: None)
    assert name not in registry


def test_a_name_can_be_given_again_once_it_is_forgotten(registry):
    registry.register("a")(lambda: 1)
    registry.unregister("a")
    registry.register("a")(lambda: 2)
    assert registry.build("a") == 2


def test_a_plugin_cannot_take_a_built_in_name():
    with pytest.raises(ValueError, match=r"'vgg9' is already registered \(.*vgg.py"):
        architectures.register("vgg9")(lambda act, *, in_channels, num_classes: None)


def test_catch_all_parameters_are_refused(registry):
    with pytest.raises(ValueError, match="name every option"):
        registry.register("a")(lambda **options: None)


def test_an_option_that_no_recipe_can_give_may_be_left_out(registry):
    """One that takes a class or a function of the user's own, with a default."""

    class Own:
        pass

    @registry.register("mine")
    def mine(x, *, own: Own = None, of: Callable[[int], int] = abs, file: Path = Path("x"), size: int = 1):
        return x

    entry = registry["mine"]
    assert not entry.problems({"size": 2})
    [(name, said)] = entry.problems({"own": 1})
    assert (name, said.partition(":")[0]) == ("own", "a recipe cannot give it")
    assert option_schemas(entry, ()).keys() == {"file", "size"}
    assert option_schemas(entry, ())["file"]["default"] == "x"


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_a_loss_has_a_name_of_its_own_in_the_metrics(name):
    with pytest.raises(ValueError, match=f"a loss cannot be called '{name}'"):
        losses.register(name)(lambda logits, targets: logits.sum())


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("/usr/lib/python3/dist-packages/timm/models.py", False),
        ("/env/lib/python3.11/site-packages/timm/models.py", False),
        ("/home/me/nets.py", True),
    ],
)
def test_what_is_installed_is_not_the_users_own_code(file, own):
    scope = {"__name__": "nets"}
    exec(compile("def fail():\n    raise RuntimeError('no')", file, "exec"), scope)
    with pytest.raises(RuntimeError) as caught:
        scope["fail"]()
    # The test itself is on the way, too.
    assert (raised_at(caught.value) == f" ({file}:2)") == own


def test_a_loss_asks_only_for_what_there_is():
    with pytest.raises(ValueError, match="asks for student; .*logits, targets"):
        losses.register("mine")(lambda student: None)
    assert "mine" not in losses


def test_problems_name_key_type_and_limits(registry):
    @registry.register("a")
    def a(
        *,
        size: Annotated[int, Field(ge=1)] = 1,
        kind: Literal["x", "y"] = "x",
        must: float,
        many: list[int] = (),
    ):
        """A."""

    problems = dict(registry["a"].problems({"size": 0, "knid": "x", "kind": "z", "many": ["p"]}))
    assert problems["size"] == "0 is not valid; it takes a whole number (>= 1)"
    assert "did you mean 'kind'?" in problems["knid"]
    assert problems["kind"] == """'z' is not valid; it takes one of "x", "y\""""
    assert problems["must"].startswith("missing; 'a' needs it")
    assert "a list (a whole number each)" in problems["many"]
    assert registry["a"].problems({"must": 1}) == [], "an integer is a number"
    assert dict(registry["a"].problems({"must": 1, "size": True}))["size"], "true is not a whole number"


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_part_has_a_line_of_description_and_typed_options(kind):
    registry = REGISTRIES[kind]
    assert len(registry) >= (1 if kind in ("teachers", "callbacks") else 2)
    for name in registry:
        entry = registry[name]
        assert 10 < len(entry.description) < 130, name
        for option, info in entry.options.items():
            assert info.type_name != "anything", f"{name}.{option} has no annotation"


def test_a_subclass_that_hands_its_options_on_has_those_of_the_class_above(registry):
    class Above:
        def __init__(self, *, size: int = 3, name: str = "a"):
            self.size, self.name = size, name

    @registry.register("below")
    class Below(Above):
        def __init__(self, *, depth: float, name: str = "b", **options: Any):
            super().__init__(name=name, **options)

    assert {name: option.default for name, option in registry["below"].options.items()} == {
        "depth": REQUIRED,
        "name": "b",
        "size": 3,
    }
    assert registry.build("below", depth=1.0, size=5).size == 5

    class Open:
        def __init__(self, **options: Any):
            pass

    with pytest.raises(ValueError, match=r"takes \*options; name every option"):
        registry.register("function")(lambda **options: None)
    with pytest.raises(ValueError, match=r"takes \*"):
        registry.register("open")(Open)
