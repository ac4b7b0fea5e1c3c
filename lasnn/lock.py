"""One process in a folder at a time: a lock that the kernel gives back, whatever ends the process that holds it."""

import errno
import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lasnn.errors import MachineError, UserError

NAME = ".lock"
# A look at a lock holds it for a moment (see `holder`), and a process that is being killed holds it a little longer.
PATIENCE = 1.0
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[int] = set()


@contextmanager
def locked(folder: Path, note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Keep other processes out of a folder within the block.

    Args:
        folder: a folder that is there.
        note: gets a line where the file system has no locks, and nobody is kept out.

    Raises:
        UserError: another process holds it; the line says which.
        MachineError: the folder cannot be written.
    """
    path = folder / NAME
    try:
        descriptor = _acquire(path, folder, note)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror}") from error
    _held.add(descriptor)
    try:
        yield
    finally:
        # Removed while it is held: who waits for it notices that it got a file that is gone (see _acquire).
        path.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def holder(folder: Path) -> str | None:
    """The process that holds a folder's lock, `process 4711 on HOST`; None where nobody does."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError as error:
        return None if error.errno in _UNSUPPORTED else _named(descriptor)
    finally:
        os.close(descriptor)


def _acquire(path: Path, folder: Path, note: Callable[[str], None]) -> int:
    begin = time.monotonic()
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(descriptor, path):
                os.close(descriptor)
                continue
        except BlockingIOError:
            named = _named(descriptor)
            os.close(descriptor)
            if time.monotonic() - begin < PATIENCE:
                time.sleep(0.05)
                continue
            raise UserError(f"{folder} is in use by {named}; wait until it is done, or choose another folder") from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
            note(f"{folder} is on a file system without locks: see to it that no other process writes there")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _named(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"


def _let_go() -> None:
    """In a forked child, such as a worker that reads images: it must not keep the lock of a parent that was killed."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)
