"""`lasnn bench memory`: what its runs are, what it prints, and, in the long tests, that the promise is kept."""

import json
import subprocess
import sys

import pytest

from lasnn.bench import memory
from lasnn.errors import MachineError, UserError


def row(timesteps, chunk, peak, ratio):
    sizes = {"peak_bytes": peak * 2**20, "base_bytes": 100 * 2**20, "planned_bytes": 50 * 2**20}
    return {"timesteps": timesteps, "time_chunk": chunk, **sizes, "seconds": 3.2, "ratio": ratio}


def test_the_table_and_the_promise():
    rows = [row(8, 0, 200, 1.0), row(100, 8, 310, 2.1), row(100, 4, 280, 1.8)]
    rows.append({"timesteps": 100, "time_chunk": 0, "failed": "killed, as when memory is out"})
    lines = memory.table({"rows": rows})
    assert lines[0].startswith("| T | distill.time_chunk | peak, MiB |")
    assert lines[3] == "| 100 | 8 | 310 | 100 | 2.10 | 50 | 3 |"
    assert "killed, as when memory is out" in lines[-1]
    assert len({line.count("|") for line in lines}) == 1
    memory.complain({"rows": rows})
    with pytest.raises(MachineError, match=r"2\.10 times that of T = 8; at most 2 is promised"):
        memory.complain({"rows": [rows[0], rows[1], rows[3]]})


def test_a_case_is_a_whole_run(tmp_path):
    case = {"timesteps": 3, "time_chunk": 2, "device": "cpu", "batch_size": 4, "precision": "fp32"}
    # In a process of its own, as always: one that other tests have filled may shrink meanwhile.
    call = f"memory._run({case!r}, architecture='vgg5', width=4)"
    code = f"import json; from lasnn.bench import memory; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak_bytes"] >= found["base_bytes"] > 2**20
    assert found["planned_bytes"] > 0
    assert (tmp_path / "run" / "summary.json").is_file()
    assert "time_chunk = 2" in (tmp_path / "run" / "recipe.toml").read_text()


def test_a_device_that_is_not_here():
    with pytest.raises(UserError, match="--device: 'cuda:99' is not here"):
        memory.measure("cuda:99", 4, "fp32", lambda text: None)


@pytest.mark.full
def test_a_hundred_steps_take_at_most_twice_the_memory_of_eight(lasnn):
    found = lasnn.json("bench", "memory", "--batch-size", "50")
    assert min(row["ratio"] for row in found["rows"] if row["time_chunk"]) <= memory.PROMISED
