"""docs/recipes.md lists every key of a recipe with its type, default and meaning; the commands in the docs can run."""

import re
import shlex
import subprocess

import pytest
import typer.main

from common import ROOT
from lasnn import cli
from lasnn.recipe.messages import fields
from lasnn.recipe.schema import (
    AugmentTable,
    DataTable,
    DistillTable,
    EncoderTable,
    LossTable,
    NeuronTable,
    Recipe,
    StudentTable,
    TeacherTable,
)

TABLES = {
    "The head": Recipe,
    "[data]": DataTable,
    "[[data.augment]]": AugmentTable,
    "[teacher]": TeacherTable,
    "[student]": StudentTable,
    "[student.neuron]": NeuronTable,
    "[student.encoder]": EncoderTable,
    "[distill]": DistillTable,
    "[[losses]]": LossTable,
}


def reference() -> str:
    """The tables of docs/recipes.md, from the fields themselves."""
    lines = []
    for title, model in TABLES.items():
        lines += [f"### {title}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key, kind, default, lines_of_meaning in fields(model):
            # A row of a table is one line.
            meaning = " ".join(lines_of_meaning.split())
            if kind == "a table" or key == "losses":
                continue
            shown = "" if default is None else default if default == "required" else f"`{default!r}`".replace("'", '"')
            meaning = " ".join(meaning.split())
            lines.append(f"| `{key}` | {kind} | {shown} | {meaning} |".replace("True", "true"))
        lines.append("")
    return "\n".join(lines)


def test_recipes_md_is_current():
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert reference() in text, "run: python tests/test_docs.py, and commit docs/recipes.md"


EMPTY_LINK = re.compile(r"(?<!!)\[\s*\]\([^)]+\)")
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", *sorted((ROOT / "recipes").glob("*.toml"))]
# What stands for something else.
MEANT = {"RECIPE": "quickstart", "RUN": "runs/x", "$s": "0", "$seed": "0", "SEED": "0", "my-log": "tensorboard"}
MEANT["docs/study"] = str(ROOT / "docs" / "study")


def commands() -> list[str]:
    """The commands of lasnn in the pages' shell blocks and lines."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        blocks = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        found += [line.strip() for line in blocks if line.strip().startswith("lasnn ")]
        found += re.findall(r"`(lasnn [a-z]+ [^`]+)`", text)
    return list(dict.fromkeys(found))


class Planned(Exception):
    """Everything was checked, and the first run would begin."""


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_docs_can_run(command, tmp_path, monkeypatch):
    """It is parsed; what trains is planned as well, all its rows."""
    monkeypatch.chdir(tmp_path)
    for name, value in MEANT.items():
        command = command.replace(name, value)
    _, *words = shlex.split(command, comments=True)
    parsed = typer.main.get_command(cli.app)
    while hasattr(parsed, "commands"):
        parsed = parsed.commands[words.pop(0)]
    with parsed.make_context(parsed.name, [*words]) as context:
        if parsed.name == "distill":
            context.params["dry_run"] = True
            parsed.invoke(context)
        elif parsed.name == "compare":

            def begin(*_, **__):
                raise Planned

            monkeypatch.setattr("lasnn.compare.distill", begin)
            context.params["seeds"] = 1
            with pytest.raises(Planned):
                parsed.invoke(context)


def test_a_loss_that_does_not_reach_the_student_is_said_as_the_page_has_it(lasnn):
    page = (ROOT / "docs/tutorials/parts.md").read_text()
    for name in ("my_parts.py", "parts.toml"):
        (lasnn.folder / name).write_text(re.search(rf"%%writefile {name}\n(.*?)```", page, re.DOTALL).group(1))
    edits = re.findall(r"^sed .*> broken.*$", page, re.MULTILINE)
    subprocess.run("\n".join(edits), shell=True, cwd=lasnn.folder, check=True)
    assert (
        "has no gradient, so that nothing learns from it" in lasnn("distill", "broken.toml", "--dry-run", code=2).stderr
    )


def test_links_have_a_text():
    """GitHub shows `[](page.md)` as nothing; only the site fills in a title."""
    pages = [*ROOT.glob("*.md"), *(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)]
    empty = [f"{page.relative_to(ROOT)}: {link}" for page in pages for link in EMPTY_LINK.findall(page.read_text())]
    assert len(pages) > 20
    assert not empty


def test_the_docs_have_commands():
    assert {"compare", "distill", "evaluate", "bench"} <= {command.split()[1] for command in commands()}


if __name__ == "__main__":
    path = ROOT / "docs" / "recipes.md"
    head, mark, _ = path.read_text().partition("<!-- keys -->\n")
    path.write_text(head + mark + "\n" + reference())
