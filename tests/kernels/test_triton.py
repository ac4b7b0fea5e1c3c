"""The Triton kernels: the same tests in a process of their own, under Triton's interpreter and, where there is one, on
the GPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_cases import TRITON

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(TRITON, reason="this is that process")
INTERPRETER = {"TRITON_INTERPRET": "1"}
GPU = {"TEST_DEVICE": "cuda"}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
FOLDER = Path(__file__).parent
FILES = [str(FOLDER / name) for name in ("test_lif.py", "test_norm_lif.py", "test_attention.py")]


def passed(environment: dict[str, str], *arguments: str) -> int:
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
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return int(re.search(r"(\d+) passed", result.stdout)[1])


# What the interpreter takes long for, and hardly differs by the launcher: left to `make test-all`.
SLOW = "state or results_repeat or far_away_mean or many_elements or kept_for_the_backward"


def test_the_same_tests_pass():
    """conftest.py registers the launchers there; each test fails if no launcher was called."""
    assert passed(INTERPRETER, "-m", "not full", "-k", f"not ({SLOW})", *FILES) > 200


@pytest.mark.full
def test_the_full_grids_pass():
    assert passed(INTERPRETER, "-m", "full", *FILES) > 20
    assert passed(INTERPRETER, "-m", "not full", "-k", SLOW, *FILES) > 20
    assert passed(INTERPRETER, "-m", "", str(FOLDER / "test_ops.py")) > 30


@needs_gpu
def test_the_same_tests_pass_on_the_gpu():
    """test_ops.py is left to the interpreter: it is about tracing, not about the device."""
    assert passed(GPU, "-m", "not full", *FILES) > 200


@pytest.mark.full
@needs_gpu
def test_the_full_grids_pass_on_the_gpu():
    assert passed(GPU, "-m", "full", *FILES) > 20
