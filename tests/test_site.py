"""The site's reference is whole, its recipe lines are recipes, and every page can be reached; `make docs` builds it."""

import re
import sys
import tomllib

import pytest
import typer.main

from common import ROOT
from lasnn import cli
from lasnn.data import Dataset
from lasnn.plan import read_plan
from lasnn.registry import REGISTRIES

sys.path.insert(0, str(ROOT / "docs"))
import generated

OBJECTIVES = re.findall(r"```toml\n(\[\[losses\]\].*?)```", (ROOT / "docs" / "objectives.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("lines", OBJECTIVES)
def test_the_lines_of_an_objective_are_a_recipes(lines, tmp_path):
    recipe = (ROOT / "recipes" / "quickstart.toml").read_text().partition("[[losses]]")[0]
    path = tmp_path / "objective.toml"
    path.write_text(recipe + lines)
    named = [loss["name"] for loss in tomllib.loads(lines)["losses"]]
    assert [loss.name for loss in read_plan(path, []).recipe.losses] == named


def test_every_loss_is_in_an_objective():
    assert set(REGISTRIES["losses"]) == {name for lines in OBJECTIVES for name in re.findall(r'name = "(.*?)"', lines)}


def test_the_reference_has_every_part_and_command():
    parts, commands = generated.parts(), generated.commands()
    for kind, registry in REGISTRIES.items():
        assert f"## {kind.capitalize()}\n" in parts
        for name in registry:
            assert f"### {name}\n" in parts
            assert all(
                f"| `{option}` |" in parts
                for option in registry[name].options
                if option not in ("in_channels", "num_classes")
            )
    for name in typer.main.get_command(cli.app).commands:
        assert f"## lasnn {name}" in commands
    assert "`--timesteps T[,T...]`" in commands


def test_the_reference_has_every_key():
    keys = generated.keys()
    found = dict(generated.tables())
    assert {"", "[data]", "[[data.augment]]", "[student.neuron]", "[[losses]]"} <= set(found)
    for title, model in found.items():
        section = keys.partition(f"## {title or 'The head'}\n")[2].partition("\n## ")[0]
        for key in model.model_fields:
            assert (f"| `{key}` |" in section) != generated.is_table(model, key), (title, key)
    assert '| `optimizer` | one of "sgd", "adamw" | `"sgd"` |' in keys


@pytest.mark.parametrize(
    "module", ["lasnn", "lasnn.data", "lasnn.encoder", "lasnn.kernels", "lasnn.loss", "lasnn.network", "lasnn.neuron"]
)
def test_the_reference_has_every_public_name(module):
    found = generated.api(module)
    for name in sys.modules[module].__all__:
        assert re.search(rf"\{{py:\w+\}} {name}\b", found)


def test_the_reference_says_what_a_data_set_must_say():
    said = generated.api("lasnn.data").partition("{py:class} Dataset\n")[2].partition("``````")[0]
    assert all(f"- `{name}`: " in said for name in Dataset.__annotations__)


def test_marks_are_replaced_and_docstrings_are_markdown():
    source = ["# Title\n\n<!-- generated: file CONTRIBUTING.md -->\n"]
    generated.replace(None, "contributing", source)
    assert "](/reference/kernels.md)" in source[0]
    assert "<!-- generated" not in source[0]

    def function(x):
        """One line of [T, B].

            y = f(x) * 2

        Args:
            x: a tensor, a*b.

        Raises:
            ValueError: it is none.
        """

    text = generated.docstring(function)
    assert "```python\ny = f(x) * 2\n```" in text
    assert "- `x`: a tensor, a\\*b." in text
    assert "**Raises**" in text
    assert "\\[T, B\\]" in text


def test_every_page_is_in_a_contents():
    pages = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in (ROOT / "docs").rglob("*.md")}
    pages = {page for page in pages if not page.startswith(("_build", "study")) and page != "index"}
    listed = set()
    for index in ("index.md", "tutorials/index.md", "reference/index.md"):
        folder = index.rpartition("/")[0]
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", (ROOT / "docs" / index).read_text(), re.DOTALL):
            listed |= {
                f"{folder}/{line}".lstrip("/") for line in tree.splitlines() if line and not line.startswith(":")
            }
    assert listed == pages
