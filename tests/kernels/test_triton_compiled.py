"""The Triton kernels compiled for GPUs that are not here: what the interpreter cannot show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from compile_kernels import table


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
    (overflowing,) = (row for row in rows if row["kernel"] == "overflowing")
    # The look for overflow can fail: 32-bit offsets into a tensor of 2^36 elements do not hold.
    assert overflowing["int32"] >= 2**31
    rows.remove(overflowing)
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["int32"] < 2**31, row
        if not row["target"].startswith("cuda"):
            continue
        if "lif" in row["kernel"] and "enable_fp_fusion" not in row:
            # Neither fused nor left for the assembler to fuse, which `.rn` forbids.
            assert row["fma"] == row["unrounded"] == 0, row
        learnt, last = "learnt" in row["variant"], "channels_last" in row["variant"]
        for what in ("loads", "stores"):
            wide, tiles = row[f"wide_{what}"], row[f"tile_{what}"]
            if "strided" not in row["variant"]:
                assert all(found >= needed for found, needed in zip(wide, tiles, strict=True)), row
                # Half the width is left to where registers are short.
                assert tiles[1] == 0 or learnt or (last and row["T"] > 4), row
            if what == "loads" and last and row["kernel"].startswith("norm"):
                # What is one number a channel is contiguous there, too.
                assert row[what] - sum(wide) == learnt * ("lif" in row["kernel"]), row
    # Statistics' second stage reads a few numbers a channel; every other kernel is seen to go beyond 32 bits.
    beyond = {row["kernel"] for row in rows if row["reach"] > 2**32}
    assert beyond == {row["kernel"] for row in rows} - {"statistics"}


def test_a_small_set(tmp_path):
    rows = variants("default", tmp_path)
    print("", table(rows), sep="\n")
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
    print("", table(rows), sep="\n")
    check(rows)
    assert len(rows) > 1000
