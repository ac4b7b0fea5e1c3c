"""What the probes share: small inputs, whether two answers are one, and returned values in words."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lasnn.data import Dataset
from lasnn.random import generator, globals_kept, seed_globals

# Two, so that a part that mixes images up is seen.
IMAGES = 2
# Time steps of a probe on the CPU: enough for what is kept from one to the next.
STEPS = 4


def random_images(data: Dataset) -> Tensor:
    """Images of a data set's shape, in [0, 1]."""
    return torch.rand(IMAGES, data.channels, data.height, data.width, generator=generator("probe", "images"))


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two answers are one, up to what threads may round otherwise."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def two_answers(ask: Callable[[], Tensor]) -> str:
    """Why a part gives two answers to one question, with the fix."""
    found = []
    with globals_kept():
        for _ in range(2):
            seed_globals("probe")
            found.append(ask())
    if same(*found):
        fix = "draw in training only, as F.dropout(x, p, self.training) does"
        return f"gives two answers to one question, for it draws random numbers in evaluation: {fix}"
    fix = "start from rest in each forward() and keep nothing"
    return f"gives two answers to one question, for it keeps its state from call to call: {fix}"


def kind(x: Any) -> str:
    """What is no tensor, in words."""
    if x is None:
        return "nothing"
    if isinstance(x, Mapping):
        return f"a {type(x).__name__} of {', '.join(map(repr, x))}"
    return f"a {type(x).__name__} of {len(x)}" if isinstance(x, (tuple, list)) else f"a {type(x).__name__}"


def said(x: Any) -> str:
    """What a stage, a head or a neuron returned, in words."""
    if not isinstance(x, Tensor):
        return kind(x)
    shape = f"[{', '.join(['N', *map(str, x.shape[1:])])}]"
    numbers = "" if x.is_floating_point() else f" of {str(x.dtype).removeprefix('torch.')}"
    return f"tokens {shape}{numbers}" if x.ndim == 3 else f"{shape}{numbers}"
