"""docs/recipes.md lists every key of a recipe with its type, default and meaning."""

from common import ROOT
from lasnn.recipe import (
    AugmentTable,
    DataTable,
    DistillTable,
    EncoderTable,
    LossTable,
    NeuronTable,
    Recipe,
    StudentTable,
    TeacherTable,
    fields,
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
        for key, kind, default, meaning in fields(model):
            if kind == "a table" or key == "losses":
                continue
            shown = "" if default is None else default if default == "required" else f"`{default!r}`".replace("'", '"')
            lines.append(f"| `{key}` | {kind} | {shown} | {meaning} |".replace("True", "true"))
        lines.append("")
    return "\n".join(lines)


def test_recipes_md_is_current():
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert reference() in text, "run: python tests/test_docs.py, and commit docs/recipes.md"


if __name__ == "__main__":
    path = ROOT / "docs" / "recipes.md"
    head, mark, _ = path.read_text().partition("<!-- keys -->\n")
    path.write_text(head + mark + "\n" + reference())
