"""What the losses of paired stages share: weights, a check of them, features of one size."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor

from lasnn.loss.interface import Pair

Weights = list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None


def one_weight_a_pair(pairs: Sequence[Pair], options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Complain of `pair_weights` that are not one a pair."""
    weights = options.get("pair_weights")
    if weights is not None and len(weights) != len(pairs):
        yield "pair_weights", f"{len(weights)} weights for {len(pairs)} pairs; give one a pair"


def weighted(
    weights: Weights, students: Sequence[Tensor], teachers: Sequence[Tensor]
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """(weight, student, teacher) of each pair; weights that are left out are 1."""
    yield from zip(weights or [1.0] * len(students), students, teachers, strict=True)


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of [T, B, C, H, W] and [B, C, H, W] to the smaller's H x W, each axis on its own."""
    size = tuple(min(pair) for pair in zip(student.shape[-2:], teacher.shape[-2:], strict=True))
    if student.shape[-2:] != size:
        pooled = F.adaptive_avg_pool2d(rearrange(student, "t b c h w -> (t b) c h w"), size)
        student = rearrange(pooled, "(t b) c h w -> t b c h w", t=student.shape[0])
    if teacher.shape[-2:] != size:
        teacher = F.adaptive_avg_pool2d(teacher, size)
    return student, teacher
