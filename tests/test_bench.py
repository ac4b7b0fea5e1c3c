"""`lasnn bench kernels`: what it measures, counts and leaves, and that what is wrong has no speed."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import ROOT
from lasnn import kernels
from lasnn.bench import timing
from lasnn.bench.kernels import OPS, QUICK, Case, Options, bytes_per_element, check, fused, measure, spikingjelly
from lasnn.bench.page import conditions, has_section, replaced
from lasnn.bench.report import COLUMNS, complain, markdown, save, table
from lasnn.bench.timing import kept_bytes, take_turns
from lasnn.errors import MachineError, UserError

CPU = torch.device("cpu")
PAGE = """# Speed

<!-- kernels-cpu -->
<!-- /kernels-cpu -->

and
<!-- kernels-cuda -->
kept
<!-- /kernels-cuda -->
"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The result of a quick run of every op."""
    out = tmp_path_factory.mktemp("bench")
    return measure(Options.read("cpu", "2", "fp32,bf16", quick=True, out=out))


def test_the_command(lasnn, tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    arguments = ["--quick", "--device", "cpu", "--op", "norm_lif,lif", "--out", "out", "--write", "page.md"]
    result = lasnn.json("bench", "kernels", *arguments)
    assert result["files"] == ["out/kernels-cpu.csv", "out/kernels-cpu.json", "page.md"]
    kept = json.loads((tmp_path / "out/kernels-cpu.json").read_text())
    assert kept == {key: value for key, value in result.items() if key != "files"}
    for key in ("device", "device_name", "torch", "triton", "lasnn", "spikingjelly", "python", "threads", "date"):
        assert key in result["environment"]
    with (tmp_path / "out/kernels-cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result["rows"])
    assert list(rows[0]) == list(COLUMNS)
    assert {row["op"] for row in rows} == {"norm_lif", "lif"}
    page = (tmp_path / "page.md").read_text()
    assert "| norm_lif | fp32 | 4x2x8x6x6 |" in page
    assert page.startswith("# Speed\n\n<!-- kernels-cpu -->\n")
    assert page.endswith(PAGE[PAGE.index("<!-- /kernels-cpu -->") :])


def test_every_op_has_its_rows(quick):
    own = [row for row in quick["rows"] if row["implementation"] == "lasnn"]
    assert len(own) == len(OPS) * len(QUICK) * 2
    for row in quick["rows"]:
        assert row["status"] == "ok"
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["kept_bytes"] > 0
        assert not row["large"]
    for row in own:
        case = Case(row["op"], row["image"], row["timesteps"], row["dtype"])
        assert row["bytes"] == case.bytes_moved
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / quick["copy_gb_per_s"])
    names = {row["implementation"] for row in quick["rows"] if row["op"] == "norm_lif+residual"}
    assert {"lasnn", "batch norm, then lif", "reference"} <= names


def test_longer_runs_have_one_shape(tmp_path):
    cases = Options.read("cpu", "4,16", op="lif", out=tmp_path).cases()
    assert [case.timesteps for case in cases] == [4] * 5 + [16]
    assert cases[0].image == cases[5].image == (16, 128, 32, 32)


def test_bytes_counted_by_hand():
    """Per element and step, as kernels/README.md counts them; past 8 steps with states at the borders."""
    for itemsize in (2, 4):
        assert bytes_per_element("lif", 4, itemsize) == 5 * itemsize + 4 / 4  # v_last
        assert bytes_per_element("norm_lif", 4, itemsize) == 8 * itemsize
        assert bytes_per_element("norm_lif+residual", 4, itemsize) == 11 * itemsize
        assert bytes_per_element("norm_lif+constant", 4, itemsize) == 2 * itemsize + 7 * itemsize / 4
        assert bytes_per_element("attention_map", 4, itemsize) == 2 * itemsize + itemsize / 4
    assert bytes_per_element("lif", 4, 2) == 10 + 1
    assert bytes_per_element("norm_lif", 4, 2) == 16
    assert bytes_per_element("norm_lif+residual", 4, 2) == 22
    # 16 steps have one border, 32 have three; written once, read by each recursion backward.
    assert bytes_per_element("lif", 16, 2) == 10 + 4 / 16 + 8 / 16
    assert bytes_per_element("norm_lif", 16, 2) == 16 + 12 / 16
    assert bytes_per_element("norm_lif+residual", 32, 2) == 22 + 3 * 8 / 32
    assert Case("norm_lif", (64, 128, 32, 32), 4, "bf16").bytes_moved == 16 * 4 * 64 * 128 * 32 * 32


def test_bytes_kept():
    case = Case("norm_lif", (2, 8, 6, 6), 4, "fp32")
    inputs = case.inputs(CPU)
    layer = fused(case, CPU, kernels)
    channels = 4 * (2 * 8 + 2 * 8)  # statistics, weight and bias
    assert inputs.x.nbytes <= kept_bytes(lambda: layer.forward(inputs.x, None)) <= inputs.x.nbytes + channels
    pytest.importorskip("spikingjelly")
    layer = spikingjelly(case, CPU)
    assert kept_bytes(lambda: layer.forward(inputs.x, None)) > 2 * inputs.x.nbytes


def test_spikingjelly_computes_the_same():
    pytest.importorskip("spikingjelly")
    for op in OPS[:4]:
        for last in (False, True):
            case = Case(op, (2, 8, 6, 6), 3, "fp32", last)
            inputs = case.inputs(CPU)
            ours, theirs = (make(case, CPU).run(inputs) for make in (lambda *a: fused(*a, kernels), spikingjelly))
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_the_page_is_replaced_and_nothing_else(quick):
    section = markdown(quick)
    once = replaced(PAGE, "kernels-cpu", section)
    assert replaced(once, "kernels-cpu", section) == once
    assert replaced(once, "kernels-cpu", "new").count("new") == 1
    head, tail = PAGE.split("<!-- kernels-cpu -->\n<!-- /kernels-cpu -->")
    assert once.startswith(head)
    assert once.endswith(tail)
    assert len([line for line in section.splitlines() if line.startswith("| ")]) == 2 + len(table(quick)[1])


def test_the_docs_have_a_section_for_each_kind_of_device():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert has_section(page, "kernels-cpu")
    assert has_section(page, "kernels-cuda")
    assert not has_section("<!-- /kernels-cpu --> <!-- kernels-cpu -->", "kernels-cpu")


def test_a_gpu_is_waited_for(monkeypatch):
    """With a GPU's clock in place of a GPU: it sleeps while a step is issued, and the events' time is what counts."""
    slept = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    calls = []
    times = take_turns({"a": calls.append, "b": lambda _: None}, torch.device("cuda"), seconds=0, rounds=3)
    assert times["a"][:4] == (7.0, 7.0, 7.0, 3)
    assert times["a"].host >= 0
    assert calls == [0, 0, 1, 2, 0, 1, 2]
    assert len(slept) == 6


def test_rounds_take_turns_and_end(monkeypatch):
    monkeypatch.setattr(timing, "MOST_ROUNDS", 4)
    order = []
    steps = {name: lambda number, name=name: order.append((name, number)) for name in "ab"}
    assert take_turns(steps, CPU, seconds=10, rounds=2)["b"].runs == 4
    assert order[2:] == [(name, number) for number in range(4) for name in "ab"]


def test_a_gpus_result_is_shown(quick):
    """The columns that only a GPU fills."""
    known = {**quick["environment"], "device": "cuda", "device_name": "G", "cuda": "13.2", "driver": "580.1"}
    rows = [row for row in quick["rows"] if row["implementation"] == "lasnn" and row["op"] == "norm_lif"]
    other = {**rows[0], "implementation": "SpikingJelly, autocast", "times_lasnn": 4.2}
    failed = {**rows[0], "implementation": "SpikingJelly", "status": "failed: OutOfMemoryError: no", "kept_bytes": None}
    result = {**quick, "environment": known, "rows": [{**rows[0], "large": True}, other, failed, *rows[1:]]}
    assert conditions(result).startswith("cuda (G), CUDA 13.2, driver 580.1, lasnn ")
    titles, lines = table(result)
    assert titles[6:] == ["SpikingJelly", "its autocast", "kept"]
    assert lines[0][2].endswith("†")
    assert lines[0][6].startswith("failed: ")
    assert lines[0][7].endswith("(4.20x)")


def off_by_little(*args, **options):
    """lif with gradients that are 0.1 % too large."""
    spikes, v_last = kernels.functional.lif(*args, **options)
    return spikes.detach() + (spikes - spikes.detach()) * 1.001, v_last


def one_spike_in_a_thousand(*args, **options):
    spikes, v_last = kernels.functional.lif(*args, **options)
    return spikes + (torch.arange(spikes.numel()).reshape(spikes.shape) % 1000 == 0), v_last


def not_a_number(*args, **options):
    spikes, v_last = kernels.functional.lif(*args, **options)
    return spikes.detach() + (spikes - spikes.detach()) * float("nan"), v_last


def raises(*args, **options):
    raise RuntimeError("out of registers\nand more")


@pytest.mark.parametrize(
    ("broken", "status"),
    [
        (off_by_little, "wrong: the gradient of input is off by 0.001"),
        (one_spike_in_a_thousand, "wrong: 0.13% of the spikes differ"),
        (not_a_number, "wrong: "),
        (raises, "failed: RuntimeError: out of registers"),
    ],
)
def test_what_is_wrong_has_no_speed(monkeypatch, tmp_path, broken, status):
    monkeypatch.setattr(kernels, "lif", broken)
    result = measure(Options.read("cpu", quick=True, op="lif,attention_map", out=tmp_path))
    wrong = [row for row in result["rows"] if row["op"] == "lif"]
    assert len(wrong) == len(QUICK)
    for row in wrong:
        assert row["status"].startswith(status)
        assert "\n" not in row["status"]
        assert not any(row[key] for key in ("median_ms", "p10_ms", "runs", "gb_per_s", "share_of_copy"))
    assert all(row["median_ms"] for row in result["rows"] if row["op"] == "attention_map")
    save(result, tmp_path)
    assert status in (tmp_path / "kernels-cpu.csv").read_text()
    with pytest.raises(MachineError, match="2 of lasnn's results are wrong"):
        complain(result)


def test_another_that_fails_has_a_row_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("lasnn.bench.kernels.norm_then_lif", raises)
    result = measure(Options.read("cpu", quick=True, op="norm_lif", out=tmp_path))
    statuses = {row["implementation"]: row["status"] for row in result["rows"]}
    assert statuses.pop("batch norm, then lif") == "failed: RuntimeError: out of registers"
    assert set(statuses.values()) == {"ok"}
    assert "failed: RuntimeError: out of registers" in table(result)[1][0]
    complain(result)


def test_a_spike_at_the_threshold_is_no_fault():
    """One flip, and the trajectory behind it, is within the allowance and has no part in the gradients."""

    def nearly(*args, **options):
        x = args[0].clone()
        x[0, 0, 0, 0, 0] = 1e3
        return kernels.functional.lif(x, *args[1:], **options)

    case = Case("lif", (16, 16, 20, 20), 2, "fp32")
    assert check(case, CPU).flips == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "lif", nearly)
        agreement = check(case, CPU)
    assert 0 < agreement.flips < 1e-4
    assert agreement.error < 1e-4


def test_exit_code_of_a_wrong_kernel(tmp_path):
    code = """
import sys
from lasnn import cli, kernels

sys.modules["spikingjelly"] = None  # as if it were not installed
kernels.lif = lambda x, **_: (x * 0, x[0])
cli.main()
"""
    command = [sys.executable, "-c", code, "bench", "kernels", "--quick", "--device", "cpu", "--op", "lif"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert re.search(r"^4x2x8x6x6 +wrong: \d", result.stdout, re.MULTILINE)
    assert "SpikingJelly is not installed" in result.stdout
    assert "\x1b" not in result.stdout
    [line] = result.stderr.splitlines()
    assert line.startswith("lasnn: 2 of lasnn's results are wrong, their speed is not given; the first, lif")
    assert (tmp_path / "runs/bench/kernels-cpu.csv").is_file()


def test_without_spikingjelly(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "spikingjelly", None)
    result = measure(Options.read("cpu", quick=True, op="norm_lif+constant", out=tmp_path))
    assert result["notes"] == ["SpikingJelly is not installed, and left out: pip install 'lasnn[bench]'"]
    assert result["environment"]["spikingjelly"] is None
    assert {row["implementation"] for row in result["rows"]} == {"lasnn", "batch norm, then lif", "reference"}
    complain(result)


def test_all_mistakes_at_once(lasnn, tmp_path):
    (tmp_path / "page.md").write_text("# no marks\n")
    (tmp_path / "file").write_text("")
    arguments = ["--device", "cpu", "--timesteps", "4,0", "--dtype", "fp23", "--op", "norm-lif"]
    result = lasnn("bench", "kernels", *arguments, "--out", "file/run", "--write", "page.md", code=2)
    lines = result.stderr.splitlines()
    assert [line.split(":")[1] for line in lines] == [
        " --timesteps 4,0",
        " --dtype",
        " --op",
        " --out file/run",
        " --write page.md",
    ]
    assert "did you mean 'norm_lif'?" in lines[2]
    assert "<!-- kernels-cpu --> and <!-- /kernels-cpu -->" in lines[4]
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "--device: 'gpu' is not a device"),
        ({"device": "cuda:99"}, "--device: 'cuda:99' is not here"),
        ({"timesteps": "x"}, "--timesteps x: give whole numbers"),
        ({"write": Path("gone.md")}, "--write gone.md: No such file"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        Options.read(**{"device": "cpu", **arguments})
    [problem] = caught.value.problems
    assert problem.startswith(message)
    assert not list(tmp_path.iterdir()), "nothing is made before all is right"
