"""Worker processes that read images ahead: whatever ends an epoch, they end, and what failed is a line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from common import ROOT
from lasnn.data import Batches, BatchFailed, BatchLost, Images, Streamed, UnreadableBatch
from lasnn.data.stream import InMemory, limits_left, place
from lasnn.errors import MachineError, UserError

CPU = torch.device("cpu")


class Numbered:
    """Images whose pixels are their number; from number 40 on something happens."""

    def __init__(self, happens=lambda: None):
        self.happens = happens
        self.labels = torch.arange(64)
        self.shape = (64, 1, 2, 2)

    def read(self, chosen):
        if max(chosen) >= 40:
            self.happens()
        return torch.tensor(list(chosen), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()

    def fingerprint(self):
        return "numbered"


def workers() -> set[int]:
    """The processes below this one."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return {int(line.split()[0]) for line in found.stdout.splitlines() if "ps -o" not in line and "defunct" not in line}


def alive(pid: str) -> bool:
    """Whether a process runs; one that has ended may wait for its new parent."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def batches(source, count: int):
    return Batches(Streamed(source, CPU, count), 4, seed=0, epoch=0, shuffle=False)


def a_missing_file():
    raise UserError("pictures/7.png: is gone")


def a_broken_disk():
    raise MachineError("pictures/7.png: cannot be read (Input/output error)")


def a_mistake_of_the_user():
    raise KeyError("label")


def no_memory():
    raise MemoryError


WHAT = {
    "file": (a_missing_file, UnreadableBatch, "pictures/7.png: is gone"),
    "disk": (a_broken_disk, BatchLost, "pictures/7.png: cannot be read (Input/output error)"),
    "own": (a_mistake_of_the_user, UnreadableBatch, "the images' source Numbered failed: KeyError: 'label' ("),
    "memory": (no_memory, BatchLost, "out of memory"),
}


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("what", WHAT)
def test_an_error_is_the_same_line_with_workers_and_without(what, count):
    happens, kind, line = WHAT[what]
    before, read = workers(), []

    def all_batches():
        for _, labels in batches(Numbered(happens), count):
            read.extend(labels.tolist())

    with pytest.raises(kind) as error:
        all_batches()
    assert read == list(range(40))
    assert isinstance(error.value, BatchFailed)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(line)
    if what == "own":
        assert "test_workers.py:" in str(error.value)
    assert workers() <= before


@pytest.mark.parametrize("count", [0, 2])
def test_a_source_must_give_what_it_announced(count):
    class Wrong(Numbered):
        def read(self, chosen):
            return super().read(chosen).float()

    with pytest.raises(UnreadableBatch, match=r"Wrong read torch.float32 \[4, 1, 2, 2\]; it must be torch.uint8"):
        next(iter(batches(Wrong(), count)))
    with pytest.raises(UserError, match="source Wrong read"):
        place([Wrong()], CPU, residence="device", workers=count)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGBUS])
def test_a_killed_worker_is_a_line_and_the_others_end(signum):
    before = workers()
    running = iter(batches(Numbered(), 2))
    next(running)
    for pid in workers() - before:
        os.kill(pid, signum)
    with pytest.raises(BatchLost, match=rf"ended by {signum.name}.*/dev/shm.*data.workers"):
        list(running)
    assert workers() <= before


def test_signals_that_ask_a_run_to_stop_leave_its_workers_alone():
    """A batch system sends them to every process of a job, and the run still goes on to the end of a step."""
    before = workers()
    running = iter(batches(Numbered(), 2))
    next(running)
    time.sleep(0.5)
    for pid in workers() - before:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert len(list(running)) == 15
    assert workers() <= before


def test_workers_end_with_an_epoch_that_is_left_early():
    before = workers()
    running = iter(batches(Numbered(), 2))
    next(running)
    assert len(workers() - before) == 2
    running.close()
    assert workers() <= before


def test_a_worker_that_hangs_does_not_keep_its_run():
    before = workers()
    running = iter(batches(Numbered(lambda: time.sleep(600)), 2))
    next(running)
    time.sleep(0.5)
    begin = time.monotonic()
    running.close()
    assert time.monotonic() - begin < 5
    assert workers() <= before


def test_full_shared_memory_is_a_line(monkeypatch):
    """An error while a worker sends a batch is printed there, and the run would wait for ever."""

    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(BatchLost, match=r"No space left on device.*enlarge /dev/shm.*data.workers"):
        list(batches(Numbered(), 2))


PROGRAM = """
import signal, sys, time
sys.path.insert(0, {tests!r})
import torch
from test_workers import CPU, Numbered, batches
import lasnn.data.workers

held = []
for images, labels in batches(Numbered(), 2):
    held.append(sys._getframe())
    print("begun", flush=True)
    {ends}
"""


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param("raise IndexError('late')", marks=pytest.mark.full),
        pytest.param("sys.exit(3)", marks=pytest.mark.full),
        "held[0] = iter; time.sleep(600)",
    ],
)
def test_a_process_ends_and_leaves_none_behind(tmp_path, ends):
    """Also where the stack of an error, or a signal, keeps the iterator that would end them."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(ROOT / "tests"), ends=ends))
    process = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    begin = time.monotonic()
    if "sleep" in ends:
        process.kill()
    process.wait(timeout=30)
    assert time.monotonic() - begin < 10
    left = children.stdout.split()
    # Those of a run that was killed look for it every five seconds.
    while any(map(alive, left)) and time.monotonic() - begin < 20:
        time.sleep(0.2)
    assert not any(map(alive, left))


RECIPE = """
[data]
name = "image-folder"
root = "pictures"
size = 8
batch_size = 4
residence = "stream"
[student]
architecture = "vgg5"
width = 4
timesteps = 1
[[losses]]
name = "cross-entropy"
[distill]
epochs = 3000
"""


def test_a_picture_that_vanishes_in_training_ends_the_command(lasnn):
    for name in ("cat", "dog"):
        for number in range(20):
            path = lasnn.folder / "pictures" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 99)).save(path)
    (lasnn.folder / "own.toml").write_text(RECIPE)
    process = lasnn.start("distill", "own.toml", "--out", "a")
    metrics = lasnn.folder / "a/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    for path in (lasnn.folder / "pictures/cat").iterdir():
        path.unlink()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2, err
    assert err.startswith("lasnn: pictures/cat/")
    assert len(err.splitlines()) == 1


def test_what_is_in_memory_is_known_by_where_it_came_from():
    source = Numbered()
    [resident], _ = place([source], CPU, residence="device", workers=0)
    [streamed], _ = place([source], CPU, residence="stream", workers=0)
    assert isinstance(resident, Images)
    assert resident.fingerprint() == streamed.fingerprint() == resident.to("cpu").fingerprint() == "numbered"
    images = Images(resident.pixels, resident.labels)
    assert images.fingerprint() == InMemory(images).fingerprint() != "numbered"


def test_the_memory_limit_of_a_control_group_counts(tmp_path):
    """A container's or a batch job's, of any group around the process; none where it says "max"."""
    inner = tmp_path / "cgroup/jobs/one"
    inner.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/jobs/one\n")
    for folder, limit, used, cached in ((inner, "max", 10, 0), (inner.parent, 1000, 700, 100)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    assert list(limits_left(tmp_path / "cgroup", tmp_path / "own")) == [400]
    assert list(limits_left(tmp_path / "cgroup", tmp_path / "missing")) == []
