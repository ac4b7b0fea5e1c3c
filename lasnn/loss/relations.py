"""Losses of how the images of a batch lie to each other in the paired stages; sizes and channels may differ.

Shapes: B images, D = C*H*W values of each.
"""

from typing import Literal

import torch
from torch import Tensor

from lasnn.loss.interface import check_pairs, couples_images, over_time
from lasnn.loss.pairs import Weights, one_weight_a_pair, weighted
from lasnn.registry import losses

# What a norm is never divided below: the gradient of a silent image stays bounded.
EPS = 1e-3


@losses.register("similarity")
@over_time("mean")
@couples_images
@check_pairs(one_weight_a_pair)
def similarity(
    student_features: list[Tensor], teacher_features: list[Tensor], *, pair_weights: Weights = None
) -> Tensor:
    """Similarity-preserving distillation: which images of the batch are alike, summed over pairs.

    sum over pairs of w * ||R(F_S F_S^T) - R(F_T F_T^T)||_F^2 / B^2, where R divides each row by its norm, F_S are the
    images' firing rates [B, D] and F_T the teacher's features (Tung & Mori, ICCV 2019; weight 3000 there).
    """
    total = torch.zeros((), device=student_features[0].device)
    for weight, student, teacher in weighted(pair_weights, student_features, teacher_features):
        ours, theirs = (_rows(_gram(one.float().flatten(1))) for one in (student.float().mean(0), teacher))
        total = total + weight * (ours - theirs).square().mean()
    return total


@losses.register("cka")
@over_time(lambda options: {"rate": "mean", "step": "steps"}[options.get("temporal", "step")])
@couples_images
@check_pairs(one_weight_a_pair)
def cka(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    *,
    temporal: Literal["rate", "step"] = "step",
    pair_weights: Weights = None,
) -> Tensor:
    """Linear centred kernel alignment with the teacher's features, 1 - CKA, summed over pairs.

    sum over pairs of w * mean_t (1 - CKA(S_t, A)) with CKA(X, Y) = <K, L>_F / (||K||_F ||L||_F), K and L the Gram
    matrices X X^T and Y Y^T of features [B, D] centred over the batch (Kornblith et al., ICML 2019). `temporal` is of
    each step, or of the firing rate.
    """
    total = torch.zeros((), device=student_features[0].device)
    for weight, student, teacher in weighted(pair_weights, student_features, teacher_features):
        student = student.float() if temporal == "step" else student.float().mean(0, keepdim=True)
        ours, theirs = (_aligned(one.flatten(2)) for one in (student, teacher.float()[None]))
        total = total + weight * (1 - (ours * theirs).sum(-1).mean())
    return total


def _gram(x: Tensor) -> Tensor:
    """x x^T of [..., B, D], in x's own precision under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ x.transpose(-1, -2)


def _rows(matrix: Tensor) -> Tensor:
    return matrix / torch.linalg.vector_norm(matrix, dim=-1, keepdim=True).clamp_min(EPS)


def _aligned(x: Tensor) -> Tensor:
    """The Gram matrix of [T, B, D], centred over the images, as a vector of unit norm: [T, B*B]."""
    return _rows(_gram(x - x.mean(-2, keepdim=True)).flatten(1))
