"""Losses of the features of paired stages, value by value."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasnn.kernels import BatchNorm2d
from lasnn.loss.interface import Pair, check_pairs, over_time
from lasnn.loss.pairs import Weights, one_weight_a_pair, same_size, weighted
from lasnn.registry import losses


def equal_channels(pairs: Sequence[Pair], options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Complain of pairs whose features cannot be subtracted."""
    yield from one_weight_a_pair(pairs, options)
    for pair in pairs:
        student, teacher = pair.student_shape, pair.teacher_shape
        if student and teacher and student[0] != teacher[0]:
            yield (
                "name",
                f"'feature-mse' needs equal channels; {pair.student!r} has {student[0]}, the teacher's "
                f"{pair.teacher!r} {teacher[0]}; 'feature-regressor' learns to match them",
            )


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
    for weight, student, teacher in weighted(pair_weights, student_features, teacher_features):
        student, teacher = same_size(student, teacher)
        total = total + weight * F.mse_loss(student.float().mean(0), teacher.float())
    return total


@losses.register("feature-regressor")
@over_time("mean")
@check_pairs(one_weight_a_pair)
class FeatureRegressor(nn.Module):
    """Mean squared error between learnt regressors of the student's firing rates and the teacher's features.

    sum over pairs of w * mean (BN(conv3x3(mean_t S)) - A)^2, the feature loss of SAKD (self-architectural knowledge
    distillation; weight 100 in its authors' code, without bias in the convolution). Channels may differ; where the
    sizes differ, the larger feature is average-pooled to the smaller. The regressors are trained with the student.

    Args:
        student_shapes, teacher_shapes: (C, H, W) of each pair.
        pair_weights: one a pair; left out, all 1.
    """

    def __init__(
        self,
        student_shapes: list[tuple[int, int, int]],
        teacher_shapes: list[tuple[int, int, int]],
        *,
        pair_weights: Weights = None,
    ):
        super().__init__()
        self.pair_weights = pair_weights
        self.regressors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(student[0], teacher[0], 3, padding=1, bias=False), BatchNorm2d(teacher[0]))
            for student, teacher in zip(student_shapes, teacher_shapes, strict=True)
        )

    def forward(self, student_features: list[Tensor], teacher_features: list[Tensor]) -> Tensor:
        total = torch.zeros((), device=student_features[0].device)
        pairs = zip(self.regressors, weighted(self.pair_weights, student_features, teacher_features), strict=True)
        with torch.autocast(total.device.type, enabled=False):
            for regressor, (weight, student, teacher) in pairs:
                student, teacher = same_size(student, teacher)
                total = total + weight * F.mse_loss(regressor(student.float().mean(0)), teacher.float())
        return total
