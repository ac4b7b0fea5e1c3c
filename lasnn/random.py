"""Random numbers keyed by what they are for, never streamed from one generator.

A cached teacher, a resumed run or a second process must not change what the student sees, so each draw has a
generator of its own, seeded by (seed, purpose, epoch, step).
"""

import hashlib
import os
import random
from contextlib import contextmanager

import numpy as np
import torch

from lasnn.errors import UserError


def key_to_seed(*key: object) -> int:
    """A 63-bit seed for a key such as `(seed, "order", epoch)`; equal keys give equal seeds on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded by the key."""
    return torch.Generator(device=device).manual_seed(key_to_seed(*key))


def seed_globals(*key: object) -> None:
    """Seed the global generators of PyTorch (on every device), NumPy and Python, for code that draws of its own accord:
    a layer as dropout, a user's loss or augmentation.
    """
    seed = key_to_seed(*key)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def globals_kept(device: torch.device | None = None):
    """Give the global generators, and that of a CUDA `device` (left out: the current one, if CUDA is in use), their
    states back at the end of the block.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [device] if device is not None and device.type == "cuda" else []
    if device is None and torch.cuda.is_initialized():
        devices = [torch.cuda.current_device()]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def keyed(*key: object):
    """Seed the global generators by the key inside the block (layer initialisation draws from no other)."""
    with globals_kept():
        seed_globals(*key)
        yield


@contextmanager
def deterministic(wanted: bool = True):
    """Within the block PyTorch takes only operations that repeat to the last bit, where that is `wanted`.

    Raises:
        UserError: an operation that cannot.
    """
    if not wanted:
        yield
        return
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition(", but you set")[0].partition("\n")[0]
        if "determinis" not in reason:
            raise
        raise UserError(f"deterministic = true: {reason}; use another layer, or set deterministic = false") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
