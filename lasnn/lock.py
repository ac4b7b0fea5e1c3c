"""One process in a folder at a time: a `filelock.FileLock`, which the kernel gives back whatever ends its holder."""

import errno
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lasnn.errors import MachineError, UserError

NAME = ".lock"
# Seconds: a look at a lock holds it for a moment (see `holder`), and a process that is being killed a little longer.
PATIENCE = 1.0
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path, note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Keep other processes out of a folder within the block. A forked child, as a worker that reads images, does not
    keep the lock of a parent that was killed.

    Args:
        folder: a folder that is there.
        note: gets a line where the file system has no locks, and nobody is kept out.

    Raises:
        UserError: another process holds it; the line says which.
        MachineError: the folder cannot be written.
    """
    path = folder / NAME
    lock = _lock(path, PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder} is in use by {_named(path)}; wait until it is done, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise MachineError(f"cannot write {path}: {error.strerror}") from error
        note(f"{folder} is on a file system without locks: see to it that no other process writes there")
    try:
        yield
    finally:
        # Removed while it is held: a process that waits for it notices that its file has no name any more.
        path.unlink(missing_ok=True)
        lock.release()


def holder(folder: Path) -> str | None:
    """The process that holds a folder's lock, `process 4711 on HOST`; None where nobody does."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        with _lock(path, 0, on_acquired=None):
            return None
    except Timeout:
        return _named(path)
    except OSError:
        # Of a folder that cannot be written nobody holds the lock; a file system without locks cannot tell.
        return None


def _say_holder(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)


def _lock(path: Path, timeout: float, on_acquired: Callable[[int], None] | None = _say_holder) -> FileLock:
    # Without kernel locks its own fallback is a file that a killed process leaves behind, in the way of the next.
    return FileLock(path, timeout=timeout, fallback_to_soft=False, on_acquired=on_acquired)


def _named(path: Path) -> str:
    try:
        return path.read_bytes()[:200].decode(errors="replace").strip() or "another process"
    except OSError:
        return "another process"
