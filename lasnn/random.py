"""Random numbers keyed by what they are for, never streamed from one generator.

A cached teacher, a resumed run or a second process must not change what the student sees, so each draw has a
generator of its own, seeded by (seed, purpose, epoch, step).
"""

import hashlib
from contextlib import contextmanager

import torch


def key_to_seed(*key: object) -> int:
    """A 63-bit seed for a key such as `(seed, "order", epoch)`; equal keys give equal seeds on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded by the key."""
    return torch.Generator(device=device).manual_seed(key_to_seed(*key))


@contextmanager
def keyed(*key: object):
    """Seed PyTorch's global CPU generator by the key inside the block (layer initialisation uses no other)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_to_seed(*key))
        yield
