"""What docs/reliability.md promises, beyond kills (test_kill.py) and broken files (test_hostile.py)."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from test_distillation import Notes, StopAt, digest, without_times

from common import TINY, TINY_DATA, Command
from lasnn import distill, files, lock, weights
from lasnn.data import Images
from lasnn.errors import MachineError, UserError
from lasnn.run import status
from lasnn.training import checkpoints
from lasnn.training.stop import Stopped

SHORT = ["teacher.epochs=1", "distill.epochs=2"]


def stopped(recipe, phase="student", epoch=1, out="out", settings=SHORT):
    with pytest.raises(Stopped):
        distill(recipe, out, overrides=settings, progress=StopAt(phase, epoch, 15))
    return recipe.parent / out


def test_a_disk_that_is_full_costs_one_save(tiny, monkeypatch):
    """Whichever of a run's writes fails, what was there stays whole, and the run goes on once there is room."""
    whole = distill(tiny, "whole", overrides=SHORT)
    real, failed = os.fsync, []

    for number in (2, 6, 8, 11):
        shutil.rmtree("runs")
        left = iter(range(number))

        def full(descriptor, left=left):
            if next(left, None) is None:
                failed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        out = f"full-{number}"
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(MachineError, match=r"cannot write .*: No space left on device"):
            distill(tiny, out, overrides=SHORT)
        monkeypatch.setattr(os, "fsync", real)
        assert not [name for name in os.listdir(out) if name.startswith(".")]
        if (tiny.parent / out / "last.pt").exists():
            weights.load_state(tiny.parent / out / "last.pt")
        run = distill(tiny, out, overrides=SHORT, resume=True)
        assert digest(run / "student.safetensors") == digest(whole / "student.safetensors")
        assert without_times(run.metrics()) == without_times(whole.metrics())
    assert len(failed) >= 4


def in_a_small_file_system(folder, script):
    """Run a shell script in a mount namespace of its own, `small` being a file system of 1 MiB."""
    command = ["unshare", "--map-root-user", "--mount", "sh", "-ec", f"mount -t tmpfs -o size=1m small small\n{script}"]
    environment = {**os.environ, "LASNN": f"{sys.executable} -m lasnn"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.full
def test_a_file_system_that_is_full_or_read_only(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "tiny_clothes.py").write_text(TINY_DATA)
    (tmp_path / "tiny.toml").write_text('plugins = ["tiny_clothes.py"]\n' + TINY)
    if in_a_small_file_system(tmp_path, "true").returncode:
        pytest.skip("this system gives no mount namespaces")
    result = in_a_small_file_system(
        tmp_path,
        """
        $LASNN distill tiny.toml --out whole
        rm -r runs
        # What is left is less than a second state beside the first.
        head -c 960000 /dev/zero > small/filler
        code=0; $LASNN distill tiny.toml --out small/run || code=$?
        echo "full: $code"
        rm small/filler
        $LASNN distill tiny.toml --out small/run --resume
        cmp whole/metrics.jsonl whole/metrics.jsonl
        cp small/run/student.safetensors small.safetensors
        mount -o remount,ro small
        code=0; $LASNN distill tiny.toml --out small/other || code=$?
        echo "read-only: $code"
        $LASNN evaluate small/run
        """,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert re.search(r"lasnn: cannot write small/run\S*: No space left on device", result.stderr)
    assert re.search(r"lasnn: cannot write small/other\S*: Read-only file system", result.stderr)
    assert "full: 1\n" in result.stdout
    assert "read-only: 1\n" in result.stdout
    assert digest(tmp_path / "small.safetensors") == digest(tmp_path / "whole" / "student.safetensors")


def test_the_second_run_in_a_folder_is_refused(tiny, lasnn):
    run = stopped(tiny)
    with lock.locked(run):
        me = f"process {os.getpid()} on {os.uname().nodename}"
        settings = [part for setting in SHORT for part in ("--set", setting)]
        [line] = lasnn("distill", "tiny.toml", "--out", "out", "--resume", *settings, code=2).stderr.splitlines()
        assert line == f"lasnn: out is in use by {me}; wait until it is done, or choose another folder"
        assert status(run)["state"] == "running"
    assert distill(tiny, "out", overrides=SHORT, resume=True).read_json("summary.json")


def test_a_torn_last_line_is_repaired_on_resume(tiny):
    whole = distill(tiny, "whole", overrides=SHORT)
    run = stopped(tiny)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "student", "epo')
    (run / ".last.pt.abcdefgh.pt").write_bytes(b"what a kill left")
    resumed = distill(tiny, "out", overrides=SHORT, resume=True)
    assert without_times(resumed.metrics()) == without_times(whole.metrics())
    assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert not (run / ".last.pt.abcdefgh.pt").exists()


def test_a_metrics_line_that_cannot_be_written_leaves_the_others(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    files.append_line(path, '{"a": 1}')

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError):
        files.append_line(path, '{"a": 2}')
    assert path.read_text() == '{"a": 1}\n'


def test_a_state_goes_on_with_its_own_images_and_teacher_only(tiny, monkeypatch):
    run = stopped(tiny)
    state = weights.load_state(run / "last.pt")
    assert state["teacher"] == weights.digest(weights.load_weights(run / "teacher.safetensors")[0])
    kept, description = weights.load_weights(run / "teacher.safetensors")
    other = {**kept, next(iter(kept)): next(iter(kept.values())) + 1}
    weights.save_weights(run / "teacher.safetensors", other, description)
    with pytest.raises(
        UserError, match=r"last.pt cannot be resumed: the weights in .*teacher.safetensors are not those"
    ):
        distill(tiny, "out", overrides=SHORT, resume=True)
    weights.save_weights(run / "teacher.safetensors", kept, description)
    monkeypatch.setattr(Images, "fingerprint", lambda self: "other images")
    with pytest.raises(UserError, match=r"out: its images are not those that the run began with"):
        distill(tiny, "out", overrides=SHORT, resume=True)
    # As a run that an earlier lasnn began.
    (run / "data.json").unlink()
    with pytest.raises(UserError, match=r"last.pt cannot be resumed: the training images are not those"):
        distill(tiny, "out", overrides=SHORT, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module": {}}, "does not fit the recipe: RuntimeError: "),
        ({"optimizer": []}, "does not fit the recipe: "),
        ({"step": 10**6}, "there is no epoch 2, step 1000001"),
        ({"sums": None, "latest": None, "epoch": -1}, "there is no epoch 0"),
    ],
)
def test_a_state_that_is_whole_but_made_up(tiny, change, message):
    run = stopped(tiny)
    weights.save_state(run / "last.pt", {**weights.load_state(run / "last.pt"), **change})
    with pytest.raises(UserError, match=f"last.pt .*{re.escape(message)}"):
        distill(tiny, "out", overrides=SHORT, resume=True)


def test_minutes_between_saves(tiny, monkeypatch):
    saves = []
    monkeypatch.setattr(checkpoints, "save_state", lambda path, state: saves.append((state["epoch"], state["step"])))
    distill(tiny, overrides=[*SHORT, "teacher.epochs=1", "distill.epochs=1"])
    assert saves == [(1, 0), (1, 0)], "ten minutes are long"
    saves.clear()
    distill(tiny, overrides=["distill.epochs=1", "teacher.epochs=1", "save_minutes=0"])
    assert saves == [*((0, step) for step in range(1, 9)), (1, 0)], (
        "the teacher is cached, each step of the student saved"
    )


def test_deterministic_runs_are_the_same_to_the_last_bit_or_refused(tiny):
    settings = [*SHORT, "deterministic=true"]
    hashes = []
    for _ in range(2):
        shutil.rmtree("runs", ignore_errors=True)
        run = distill(tiny, overrides=settings)
        hashes.append([weights.digest(weights.load_weights(run / f"{who}.safetensors")[0]) for who in NETWORKS])
    assert hashes[0] == hashes[1]
    assert not torch.are_deterministic_algorithms_enabled(), "as it was before"
    (tiny.parent / "drawn.py").write_text(
        """
import torch
from lasnn import losses

@losses.register("drawn")
def drawn(logits, targets):
    \"\"\"An operation that does not repeat.\"\"\"
    torch.zeros(2).put_(torch.tensor([0, 0]), torch.rand(2))
    return logits.mean()
"""
    )
    more = ['plugins=["tiny_clothes.py","drawn.py"]', 'losses=[{name="cross-entropy"},{name="drawn"}]']
    with pytest.raises(
        UserError, match="deterministic = true: put_.* does not have a deterministic implementation; use"
    ):
        distill(tiny, overrides=[*settings, *more])


NETWORKS = ("teacher", "student")


def test_what_users_code_draws_globally_is_keyed(tiny):
    """An augmentation and a loss that draw from NumPy's and Python's generators: stopped and resumed, the same."""
    (tiny.parent / "draws.py").write_text(
        """
import random
import numpy as np
from lasnn import augmentations, losses

@augmentations.register("dim")
def dim(images):
    \"\"\"Darker, by a draw.\"\"\"
    return images * float(np.random.rand())

@losses.register("jitter")
def jitter(logits, targets):
    \"\"\"Some, by a draw.\"\"\"
    return logits.square().mean() * random.random()
"""
    )
    settings = [
        *SHORT,
        'plugins=["tiny_clothes.py","draws.py"]',
        'data.augment=["flip","dim"]',
        'losses=[{name="cross-entropy"},{name="jitter"}]',
    ]
    whole = distill(tiny, "whole", overrides=settings)
    stopped(tiny, settings=settings)
    resumed = distill(tiny, "out", overrides=settings, resume=True)
    assert digest(resumed / "student.safetensors") == digest(whole / "student.safetensors")


@pytest.fixture(scope="module")
def some_runs(tmp_path_factory):
    """A folder with a finished, a stopped and two broken runs."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny_clothes.py").write_text(TINY_DATA)
    (folder / "tiny.toml").write_text('plugins = ["tiny_clothes.py"]\n' + TINY)
    before = os.getcwd()
    os.chdir(folder)
    try:
        distill("tiny.toml", "runs/finished", overrides=SHORT)
        stopped(folder / "tiny.toml", out="runs/stopped")
    finally:
        os.chdir(before)
    for name, file in (("damaged", "last.pt"), ("odd", "metrics.jsonl")):
        shutil.copytree(folder / "runs" / "stopped", folder / "runs" / name)
        (folder / "runs" / name / file).write_bytes(b"[]\n\xff\n")
    return Command(folder)


def test_list_runs(some_runs):
    found = {run["run"].removeprefix("runs/"): run for run in some_runs.json("list", "runs")["runs"]}
    assert {name: (run["state"], run["resumable"]) for name, run in found.items()} == {
        "finished": ("finished", False),
        "stopped": ("stopped", True),
        "damaged": ("broken", False),
        "odd": ("broken", False),
    }
    summary = json.loads((some_runs.folder / "runs/finished/summary.json").read_text())
    assert found["finished"]["accuracy"] == summary["accuracy"]
    assert [found["finished"][key] for key in ("phase", "epoch", "epochs")] == ["student", 2, 2]
    assert [found["stopped"][key] for key in ("phase", "epoch", "epochs")] == ["student", 1, 2]
    assert "last.pt is not a whole checkpoint" in found["damaged"]["problem"]
    out = some_runs("list", "runs").stdout
    assert re.search(r"runs/stopped +stopped +student 1/2 +0\.\d{4} +0\.\d{4} +yes *\n", out)
    assert "metrics.jsonl: line 1 is damaged" in out


def test_evaluate_names_the_plugin_that_it_loads(some_runs):
    """From the run folder's copy; --json keeps standard output for the result."""
    path = some_runs.folder / "runs" / "finished" / "tiny_clothes.py"
    result = some_runs("evaluate", "runs/finished", "--json")
    assert f"plugin: {path}" in result.stderr
    assert json.loads(result.stdout)["images"] == 120


def test_names_that_would_leave_the_folder(tiny):
    (tiny.parent / "up.py").write_text("raise SystemExit('it ran')\n")
    inner = tiny.parent / "inner"
    inner.mkdir()
    (inner / "tiny.toml").write_text(tiny.read_text())
    for plugin in ("../up.py", str(tiny.parent / "up.py"), "./../up.py"):
        with pytest.raises(UserError, match="must lie beside the recipe"):
            distill(inner / "tiny.toml", overrides=[f'plugins=["{plugin}"]'])
    from lasnn import architectures

    with pytest.raises(ValueError, match=r"'../../evil' cannot be a name"):
        architectures.register("../../evil")


def test_resume_from_damage_says_what_helps(tiny):
    run = stopped(tiny)
    content = bytearray((run / "last.pt").read_bytes())
    (run / "last.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="last.pt is not a whole checkpoint: .*"):
        distill(tiny, "out", overrides=SHORT, resume=True, progress=Notes())
    assert (run / "last.pt").stat().st_size == len(content) // 2, "left as it is"
