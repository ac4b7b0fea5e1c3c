"""Losses of the features of paired stages."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor

from lasnn.kernels import attention_map
from lasnn.loss.interface import Pair, check_pairs, over_time
from lasnn.registry import losses

Power = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Weights = list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None


def one_weight_a_pair(pairs: Sequence[Pair], options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Complain of `pair_weights` that are not one a pair."""
    weights = options.get("pair_weights")
    if weights is not None and len(weights) != len(pairs):
        yield "pair_weights", f"{len(weights)} weights for {len(pairs)} pairs; give one a pair"


def equal_channels(pairs: Sequence[Pair], options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Complain of pairs whose features cannot be subtracted."""
    yield from one_weight_a_pair(pairs, options)
    for pair in pairs:
        student, teacher = pair.student_shape, pair.teacher_shape
        if student and teacher and student[0] != teacher[0]:
            yield (
                "name",
                f"'feature-mse' needs equal channels; {pair.student!r} has {student[0]}, the teacher's "
                f"{pair.teacher!r} {teacher[0]}",
            )


@losses.register("attention")
@over_time(
    lambda options: {"rate": "mean", "step": "steps"}.get(options.get("temporal", "rate")),
    fix='temporal = "rate" or "step"',
)
@check_pairs(one_weight_a_pair)
def attention(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    *,
    power: Power = 2.0,
    temporal: Literal["rate", "step", "map"] = "rate",
    pair_weights: Weights = None,
) -> Tensor:
    """Layer-wise attention transfer: squared distance between normalised spatial attention maps, summed over pairs.

    sum over pairs of w * mean over images and pixels of (Q(student) - Q(teacher))^2 with
    Q(A) = vec(sum_c |A_c|^power) / ||.||_2 (Zagoruyko & Komodakis, ICLR 2017). `temporal` says how spikes become one
    map: of the firing rate, of each step (the distance is averaged over steps), or the mean of the steps' maps.
    Channels vanish in the map, so widths may differ; where the sizes differ, the larger feature is average-pooled to
    the smaller. `power = 1` reaches neurons that are silent at every step; `power = 2` gives them no gradient.
    """
    total = torch.zeros((), device=student_features[0].device)
    weights = pair_weights or [1.0] * len(student_features)
    for weight, student, teacher in zip(weights, student_features, teacher_features, strict=True):
        student, teacher = same_size(student, teacher)
        difference = attention_map(student, power, temporal) - attention_map(teacher[None], power)
        total = total + weight * difference.square().mean()
    return total


@losses.register("feature-mse")
@over_time("mean")
@check_pairs(equal_channels)
def feature_mse(
    student_features: list[Tensor], teacher_features: list[Tensor], *, pair_weights: Weights = None
) -> Tensor:
    """Mean squared error between the student's firing rates and the teacher's features, summed over pairs.

    sum over pairs of w * mean (mean_t S - A)^2 (as in KDSNN, Xu et al., CVPR 2023). Paired stages need equal numbers of
    channels; where the sizes differ, the larger feature is average-pooled to the smaller.
    """
    total = torch.zeros((), device=student_features[0].device)
    weights = pair_weights or [1.0] * len(student_features)
    for weight, student, teacher in zip(weights, student_features, teacher_features, strict=True):
        student, teacher = same_size(student, teacher)
        total = total + weight * F.mse_loss(student.float().mean(0), teacher.float())
    return total


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of [T, B, C, H, W] and [B, C, H, W] to the smaller's H x W, each axis on its own."""
    size = tuple(min(pair) for pair in zip(student.shape[-2:], teacher.shape[-2:], strict=True))
    if student.shape[-2:] != size:
        pooled = F.adaptive_avg_pool2d(rearrange(student, "t b c h w -> (t b) c h w"), size)
        student = rearrange(pooled, "(t b) c h w -> t b c h w", t=student.shape[0])
    if teacher.shape[-2:] != size:
        teacher = F.adaptive_avg_pool2d(teacher, size)
    return student, teacher
