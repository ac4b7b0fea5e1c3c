"""A run that is killed again and again ends with the weights, to the last bit, of one that nothing disturbed."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from safetensors.torch import load_file

from common import TINY, TINY_DATA, Command
from lasnn.weights import load_state

EPOCHS = 4
# Every step is saved, so that kills fall into saves as well, and a resumed run goes on in the middle of an epoch.
RECIPE = 'save_minutes = 0\nplugins = ["tiny_clothes.py"]\n' + TINY.replace(
    "batch_size = 50", "batch_size = 20"
).replace("epochs = 2", f"epochs = {EPOCHS}")
COMMAND = ("distill", "tiny.toml", "--out", "run", "--resume")


# Forks of a process that has imported lasnn and done nothing since: autograd's threads would not survive a fork.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lasnn.cli", "lasnn.training.distill", "lasnn.console"])


class Forked:
    """`lasnn` in a fork: as mortal as a process of its own, without its seconds of imports."""

    def __init__(self, folder, *arguments):
        self.process = SERVER.Process(target=run_command, args=(folder, arguments))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.process.exitcode

    def send_signal(self, signum):
        if self.process.exitcode is None:
            os.kill(self.process.pid, signum)


def run_command(folder, arguments):
    """In the fork: the command line, its output in a file."""
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    sys.argv = ["lasnn", *arguments]
    from lasnn.cli import main

    main()


def started(folder, *arguments):
    """`lasnn` as a process of its own."""
    with (folder / "log.txt").open("a") as log:
        return Command(folder).start(*arguments, stdout=log, stderr=subprocess.STDOUT)


def prepared(folder):
    folder.mkdir()
    (folder / "tiny_clothes.py").write_text(TINY_DATA)
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run folder of a run that nothing disturbed."""
    folder = prepared(tmp_path_factory.mktemp("undisturbed") / "whole")
    assert Forked(folder, *COMMAND).wait() == 0, (folder / "log.txt").read_text()
    return folder / "run"


def outcome(run):
    """What must be the same: the bytes of the weights, and the metrics without their times."""
    weights = {
        file: {
            name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in load_file(run / file).items()
        }
        for file in ("teacher.safetensors", "student.safetensors")
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "images_per_second")
    return weights, [{key: value for key, value in line.items() if key not in times} for line in lines]


def epochs_done(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_for(run, process, epochs, saves):
    """Until so many epochs are done, and so many saves were seen after them; or until the process ends."""
    seen = set()
    while process.poll() is None and (epochs_done(run) < epochs or len(seen) < saves):
        if epochs_done(run) >= epochs and (run / "last.pt").is_file():
            seen.add((run / "last.pt").stat().st_mtime_ns)
        time.sleep(0.002)


def kill_and_resume(folder, start, signum, kills, seed):
    """Run to the end through `kills` signals; counts what was being done as they came."""
    draws = random.Random(seed)
    run, hit = folder / "run", Counter()
    # The n-th kill comes at a random moment after so many epochs; two that wait for the same epochs follow each other
    # closely. One half of them waits for epochs of the teacher, the other for the student's (its last might end).
    targets = sorted(draws.randrange(EPOCHS - 1) + EPOCHS * (n % 2) for n in range(kills))
    while targets:
        process = start(folder, *COMMAND)
        # None is waited for in a third of the cases: that kill falls into the start of the process.
        wait_for(run, process, targets[0], max(0, draws.randrange(-8, 8)))
        time.sleep(draws.uniform(0, 0.02 if epochs_done(run) else 1))
        process.send_signal(signum)
        code = process.wait()
        if code == 0:
            # A busy machine let it end before this process could kill it: it is begun again.
            shutil.rmtree(run)
            shutil.rmtree(folder / "runs")
            continue
        assert code in (-signum, 128 + signum), f"it ended with {code}\n{(folder / 'log.txt').read_text()}"
        targets.pop(0)
        hit["kills"] += 1
        if (run / "last.pt").is_file():
            # What is there is whole, whenever the kill came.
            state = load_state(run / "last.pt")
            hit[state["phase"]] += 1
            hit["inside an epoch"] += state["step"] > 0
    process = start(folder, *COMMAND)
    assert process.wait() == 0, (folder / "log.txt").read_text()
    assert "Traceback" not in (folder / "log.txt").read_text()
    assert [name for name in os.listdir(run) if name.startswith(".")] == [], "no lock and no stray is left"
    print(signal.Signals(signum).name, dict(hit))
    return hit


@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_three_kills(undisturbed, tmp_path, signum):
    folder = prepared(tmp_path / "killed")
    hit = kill_and_resume(folder, Forked, signum, 3, 3)
    assert hit["student"] >= 1
    assert hit["inside an epoch"] >= 1
    assert outcome(folder / "run") == outcome(undisturbed)


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_twenty_kills(undisturbed, tmp_path, signum, seed):
    folder = prepared(tmp_path / "killed")
    # Forks, so that many moments can be tried; with the second seed processes as a user starts them.
    hit = kill_and_resume(folder, Forked if seed == 0 else started, signum, 20, seed)
    assert hit["kills"] == 20
    assert hit["teacher"] >= 2
    assert hit["student"] >= 4
    assert hit["inside an epoch"] >= 4
    assert outcome(folder / "run") == outcome(undisturbed)
