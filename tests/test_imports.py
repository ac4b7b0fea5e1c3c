"""The house has one direction: imports point down only."""

import ast
import subprocess
import sys

from common import ROOT

# A module may import what stands above it in this list, and its own neighbours on the line.
LAYERS = [
    {"errors", "option_types", "random", "streams", "markdown", "kernels", "__init__"},
    {"registry", "processes", "files", "lock", "weights", "foreign_weights", "file_kind", "numpy_pickle"},
    {"neuron", "encoder", "activation", "callback"},
    {"network"},
    {"architecture", "data", "loss"},
    {"recipe"},
    {"factory", "memory", "compatibility", "description", "problems"},
    {"probe"},
    {"plan"},
    {"bound_data", "resume", "starter"},
    {"run", "open_run", "loaded_run"},
    {"evaluation"},
    {"training", "export", "console", "notebook"},
    {"bench", "compare", "report"},
    {"cli", "__main__"},
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def imported(path):
    """(name of the room, whether at import time) of everything of lasnn that a file imports."""
    tree = ast.parse(path.read_text())
    # What only type checkers import.
    unread = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in unread:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "lasnn":
                names = [f"lasnn.{alias.name}" for alias in node.names if alias.name != "__version__"]
        for name in names:
            parts = name.split(".")
            if parts[0] == "lasnn" and len(parts) > 1 and parts[1] not in ("recipes", "models", "datasets"):
                yield parts[1]


def test_imports_point_down():
    files = list((ROOT / "lasnn").rglob("*.py"))
    assert len(files) > 15
    wrong = []
    for path in files:
        room = path.relative_to(ROOT / "lasnn").parts[0].removesuffix(".py")
        for other in imported(path):
            if HEIGHT[other] > HEIGHT[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports lasnn.{other}")
    assert not wrong


def test_kernels_know_nothing_of_lasnn():
    wrong = [path for path in (ROOT / "kernels").glob("*.py") if set(imported(path)) - {"kernels"}]
    assert not wrong


def test_importing_lasnn_does_not_import_torch():
    code = "import sys, lasnn, lasnn.cli; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_resolve():
    import lasnn

    for name in lasnn.__all__:
        assert getattr(lasnn, name) is not None
    assert set(lasnn.__all__) <= set(dir(lasnn))
    assert set(lasnn.__all__) == {"__version__", *lasnn._HOMES}
    # A submodule of the same name, once imported, would stand in a registry's place.
    from lasnn.registry import REGISTRIES

    for name, registry in REGISTRIES.items():
        assert getattr(lasnn, name) is registry
