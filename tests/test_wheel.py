"""A built wheel holds everything, and works outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile

import pytest

from common import ROOT
from lasnn import __version__


def run(*arguments, **options):
    result = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_room_is_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    rooms = {path.parent.relative_to(ROOT) for path in (ROOT / "lasnn").rglob("*.py")}
    rooms |= {
        path.parent.relative_to(ROOT)
        for room in ("kernels", "models", "recipes")
        for path in (ROOT / room).rglob("*.py")
    }
    inside = {".".join(room.parts) if room.parts[0] == "lasnn" else ".".join(("lasnn", *room.parts)) for room in rooms}
    assert listed == inside


def test_there_is_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lasnn.__version__"}
    assert "version" not in project["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\n" in citation
    assert f"\n## {__version__} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.full
def test_source_distribution(tmp_path):
    """It holds what the checkout does, and a wheel is built from it that holds what the checkout's does."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info"))
    run(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})", cwd=source)
    [archive] = tmp_path.glob("lasnn-*.tar.gz")
    assert __version__ in archive.name
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
        opened.extractall(tmp_path / "unpacked", filter="data")
    for pattern in (
        "lasnn/**/*.py",
        "kernels/**/*.py",
        "recipes/*",
        "tests/**/*.py",
        "docs/*",
        "CITATION.cff",
        "LICENSE",
    ):
        for path in source.glob(pattern):
            assert not path.is_file() or str(path.relative_to(source)) in names, path
    [unpacked] = (tmp_path / "unpacked").iterdir()
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, unpacked)
    [wheel] = tmp_path.glob("lasnn-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {"lasnn/py.typed", "lasnn/kernels/py.typed", "lasnn/recipes/recipe.schema.json"} <= inside


@pytest.mark.full
def test_wheel(tmp_path):
    # Built from a copy: setuptools would take up what an earlier build left in the checkout.
    built, source = tmp_path / "built", tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info"))
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", built, source)
    [wheel] = built.glob("lasnn-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "recipes").glob("*.toml")]:
        assert f"lasnn/{path.relative_to(ROOT)}" in names
    for path in (ROOT / "lasnn").rglob("*"):
        if path.suffix in (".py", ".gz", ".html", ".css", ".typed") or path.name == "LICENSE":
            assert str(path.relative_to(ROOT)) in names
    assert not any(name.startswith(("kernels/", "recipes/", "tests/")) for name in names)

    # The dependencies are borrowed from this environment; a path in a .pth brings no editable install along.
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    with open(os.path.join(site, "borrowed.pth"), "w") as file:
        file.write(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
    outside = tmp_path / "outside"
    outside.mkdir()
    where = run(python, "-c", "import lasnn, lasnn.kernels as k; print(lasnn.__file__, k.__file__)", cwd=outside)
    assert all(path.startswith(str(environment)) for path in where.split())
    command = environment / "bin" / "lasnn"
    assert "quickstart" in run(command, "list", "recipes", cwd=outside)
    short = ["--set", "teacher.epochs=1", "--set", "distill.epochs=1"]
    assert "student: test accuracy" in run(command, "distill", "quickstart", *short, cwd=outside)
    assert '"accuracy"' in run(command, "evaluate", "--json", cwd=outside)
