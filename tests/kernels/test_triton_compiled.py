"""The Triton kernels compiled for GPUs that are not here: what the interpreter cannot show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def variants(which: str, cache: Path) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py"), which],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(rows: list[dict]) -> None:
    for row in rows:
        assert row["spilled"] == 0, row
        if not row["target"].startswith("cuda"):
            continue
        if row["kernel"].startswith("lif") and "enable_fp_fusion" not in row:
            # Neither fused nor left for the assembler to fuse, which `.rn` forbids.
            assert row["fma"] == row["unrounded"] == 0, row
        if row.get("layout") == "dense" or row["kernel"] == "attention_forward_kernel":
            assert row["wide_loads"] == row["loads"] > 0, row
        if row["kernel"] == "attention_backward_kernel":
            # Where channels are contiguous the map's gradient is read narrowly; the feature never is.
            assert row["wide_loads"] >= row["loads"] / 2, row


def test_a_small_set(tmp_path):
    rows = variants("default", tmp_path)
    check(rows)
    targets = {row["target"] for row in rows}
    assert targets >= {"cuda80", "cuda90", "cuda100"}
    # The look for fma can fail: with fusion on, the same kernel has some.
    assert any(row["fma"] for row in rows if "enable_fp_fusion" in row)
    if "gfx942" not in targets:
        pytest.skip("this Triton needs ROCm's linker to compile for gfx942; the CUDA targets passed")


@pytest.mark.full
def test_every_variant(tmp_path):
    rows = variants("full", tmp_path)
    check(rows)
    assert len(rows) > 600
