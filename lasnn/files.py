"""Files that are whole or not there: written beside their place, flushed, then moved over it."""

import glob
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lasnn import processes
from lasnn.errors import MachineError


def write(path: Path, content: bytes | str) -> None:
    """Replace the file at `path` in one step; a kill leaves the old content or the new one. Of several processes the
    main one writes.

    Raises:
        MachineError: the disk is full, read-only or failing; the old file is untouched.
    """
    if not processes.is_main():
        return
    with atomic_replace(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yield a file beside `path`, of the same ending, that takes its place at the end of the block.

    Where the block raises, the file is removed, unless the block has moved it.

    Raises:
        MachineError: the disk is full, read-only or failing; what was at `path` is untouched.
    """
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(descriptor)
        temporary = Path(name)
        # mkstemp makes files private; what a run leaves behind follows the user's umask like any other file.
        os.umask(mask := os.umask(0))
        temporary.chmod(0o666 & ~mask)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial(folder: Path, names: Iterable[str]) -> None:
    """Remove what a kill left of files that `atomic_replace` was writing; nobody may be writing them now."""
    for name in names:
        for stray in folder.glob(f".{glob.escape(name)}.????????{glob.escape(Path(name).suffix)}"):
            stray.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to the disk. Of several processes the main one writes.

    Raises:
        MachineError: the disk is full, read-only or failing; the lines before are as they were.
    """
    if not processes.is_main():
        return
    size = None
    try:
        with path.open("ab") as file:
            size = file.tell()
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if size is not None:
            os.truncate(path, size)
        raise MachineError(f"cannot write {path}: {error.strerror}") from error
