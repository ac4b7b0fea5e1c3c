"""Threads for the compiled loops: as many as `torch.get_num_threads()` says at each call, one's own among them.

The loops hold no lock while they run. Numba's own pool would not know PyTorch's number, nor outlive a fork.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# Elements below which a thread is not worth waking.
SHARE = 32768
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0


def run(work: Callable[[int, int], None], parts: int, elements: int) -> None:
    """Call work(first, last) on several threads at once, each of the parts 0 to `parts` - 1 in one of the calls.

    Args:
        work: may raise; the first error is raised here, once all calls are over.
        parts: into how many the work is cut.
        elements: how many elements all of it goes through.
    """
    count = max(1, min(torch.get_num_threads(), parts, elements // SHARE))
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


def submit(work: Callable[[int, int], None], first: int, last: int):
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
    global _lock, _pool
    _lock, _pool = threading.Lock(), None


os.register_at_fork(after_in_child=forget)
