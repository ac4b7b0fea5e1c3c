"""Threads for the compiled loops: as many as `torch.get_num_threads()` says at each call, the caller's own among them.

The loops hold no lock while they run. The threads are those of PyTorch's own OpenMP, where that can be called: after
one of PyTorch's ops they wait, busily, for the next, and other threads would have to share their cores. Elsewhere, and
in a forked process, which has none of its parent's threads, they are a pool of Python's.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

# Elements below which a thread is not worth waking.
SHARE = 32768
Work = Callable[[int, int], None]
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0
_forked = False
# What each thread of a team calls, with a pointer that is not used.
Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class OpenMP(NamedTuple):
    """Functions of the library whose threads PyTorch uses."""

    parallel: Callable[[Entry, None, int, int], None]
    thread: Callable[[], int]
    threads: Callable[[], int]


@cache
def openmp() -> OpenMP | None:
    """PyTorch's OpenMP; None where it is not found, or is of another kind than GNU's."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    names = ("libgomp", "libiomp5", "libomp")
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if "omp" in line and "/" in line}
    found = [path for path in sorted(paths) if Path(path).name.startswith(names)]
    # Another package may have loaded one of its own.
    own = [path for path in found if Path(path).is_relative_to(Path(torch.__file__).parent)] or found
    if len(own) != 1:
        return None
    try:
        # The first without Python's lock, which the team's threads take; the others are too short to give it away.
        return OpenMP(
            ctypes.CDLL(own[0]).GOMP_parallel,
            ctypes.PyDLL(own[0]).omp_get_thread_num,
            ctypes.PyDLL(own[0]).omp_get_num_threads,
        )
    except (OSError, AttributeError):
        return None


def run(work: Work, parts: int, elements: int) -> None:
    """Call work(first, last) on several threads at once, each of the parts 0 to `parts` - 1 in one of the calls.

    Args:
        work: may raise; the first error is raised here, once all calls are over.
        parts: into how many the work is cut.
        elements: how many elements all of it goes through.
    """
    count = max(1, min(torch.get_num_threads(), parts, elements // SHARE))
    # An interpreter that ends lets no other thread in.
    if count == 1 or sys.is_finalizing():
        work(0, parts)
    elif (library := None if _forked else openmp()) is not None:
        run_in_team(library, work, parts, count)
    else:
        run_in_pool(work, parts, count)


def run_in_team(library: OpenMP, work: Work, parts: int, count: int) -> None:
    """The same, on at most `count` of PyTorch's threads."""
    errors: list[BaseException] = []

    def enter(_: None) -> None:
        try:
            # The team may be smaller than asked for.
            number, team = library.thread(), library.threads()
            work(parts * number // team, parts * (number + 1) // team)
        except BaseException as error:
            errors.append(error)

    library.parallel(Entry(enter), None, count, 0)
    if errors:
        raise errors[0]


def run_in_pool(work: Work, parts: int, count: int) -> None:
    """The same, on `count` - 1 threads of a pool and the caller's."""
    limits = [parts * i // count for i in range(count + 1)]
    others = [submit(work, limits[i], limits[i + 1]) for i in range(1, count)]
    try:
        work(0, limits[1])
    finally:
        # What the others write must not be freed before they are done.
        errors = [other.exception() for other in others if other is not None]
    for error in errors:
        if error is not None:
            raise error


def submit(work: Work, first: int, last: int):
    """The call's future; None where it was made here, because an interpreter that ends starts no threads."""
    try:
        with _lock:
            return pool(torch.get_num_threads() - 1).submit(work, first, last)
    except RuntimeError:
        work(first, last)
        return None


def pool(size: int) -> ThreadPoolExecutor:
    """The pool of `size` threads, which start when needed."""
    global _pool, _size
    if _pool is None or _size != size:
        if _pool is not None:
            _pool.shutdown(wait=False)
        _pool, _size = ThreadPoolExecutor(size, thread_name_prefix="lasnn-kernels"), size
    return _pool


def forget() -> None:
    """A forked process has none of its parent's threads, and must not wait for a lock that one of them held."""
    global _lock, _pool, _forked
    _lock, _pool, _forked = threading.Lock(), None, True


os.register_at_fork(after_in_child=forget)
