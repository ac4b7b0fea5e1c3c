"""The Triton kernels without a GPU: the same tests, in a process of their own, under Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="this is that process")
FOLDER = Path(__file__).parent


def passed(*arguments: str) -> int:
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore::RuntimeWarning",
            *arguments,
        ],
        cwd=FOLDER.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return int(re.search(r"(\d+) passed", result.stdout)[1])


def test_the_same_tests_pass():
    """conftest.py registers the launchers there; each test fails if no launcher was called."""
    files = ("test_lif.py", "test_attention.py", "test_ops.py")
    assert passed("-m", "not full", *(str(FOLDER / file) for file in files)) > 150


@pytest.mark.full
def test_the_full_grids_pass():
    assert passed("-m", "full", str(FOLDER / "test_lif.py"), str(FOLDER / "test_attention.py")) > 20
