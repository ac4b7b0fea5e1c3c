"""One process in a run folder: the second is refused, and a killed one leaves nothing that is in the way."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from lasnn.errors import MachineError, UserError
from lasnn.lock import NAME, holder, locked

HOLD = """
import os, sys, time
from pathlib import Path
from lasnn.lock import locked
with locked(Path(sys.argv[1])):
    child = os.fork() if len(sys.argv) > 2 else None
    if child != 0:
        print(child, flush=True)
    time.sleep(60)
"""


def hold(folder, *more):
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder, *more], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_the_second_is_told_who_holds_the_folder(tmp_path):
    assert holder(tmp_path) is None
    first, _ = hold(tmp_path)
    assert holder(tmp_path) == f"process {first.pid} on {os.uname().nodename}"
    with pytest.raises(UserError, match=f"is in use by process {first.pid} on "), locked(tmp_path):
        pass
    assert holder(tmp_path), "the one that was refused took nothing away"
    first.kill()
    first.wait()
    assert (tmp_path / NAME).exists()
    assert holder(tmp_path) is None
    with locked(tmp_path):
        assert holder(tmp_path) == f"process {os.getpid()} on {os.uname().nodename}"
    assert os.listdir(tmp_path) == []


def test_a_worker_does_not_keep_the_lock_of_a_killed_parent(tmp_path):
    first, child = hold(tmp_path, "and fork")
    try:
        first.kill()
        first.wait()
        with locked(tmp_path):
            pass
    finally:
        os.kill(int(child), signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_noted(tmp_path, monkeypatch, number):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    notes = []
    with locked(tmp_path, notes.append):
        assert holder(tmp_path) is None, "it cannot be known"
        (tmp_path / "written").touch()
    assert notes == [f"{tmp_path} is on a file system without locks: see to it that no other process writes there"]
    assert os.listdir(tmp_path) == ["written"]


def test_another_failure_is_the_machines(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=r"cannot write .*\.lock: "), locked(tmp_path / "file"):
        pass
