"""A built wheel holds everything, and works outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from common import ROOT


def run(*arguments, **options):
    result = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


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
        if path.suffix in (".py", ".gz", ".html", ".css") or path.name == "LICENSE":
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
