"""The terms of the objective: tensors in, one scalar out.

A loss says what it needs by the names of its positional parameters, and a recipe is checked against them:

    logits            [T, B, K]  the student's, at each time step
    targets           [B]        class indices, int64; or [B, K], class probabilities, floats, where an augmentation
                                 mixes images (mixup, cutmix): a loss takes both, as F.cross_entropy does
    teacher_logits    [B, K]
    student_features  one [T, B, C, H, W] for each pair of stages
    teacher_features  one [B, C, H, W] for each pair of stages

Its keyword-only parameters are the recipe's options. A loss sees tensors, never modules.

Where time is computed in chunks (`distill.time_chunk`) the student's features are not kept: `over_time` says what a
loss reads of them.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from pydantic import Field
from torch import Tensor

from lasnn.kernels import attention_map
from lasnn.registry import losses

Fraction = Annotated[float, Field(ge=0, le=1)]
Smoothing = Annotated[float, Field(ge=0, lt=1)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Readout = Literal["mean", "step"]
Power = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Weights = list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None


# "mean": the features only by their mean over time, so that it may be given that, [1, B, C, H, W], in their place;
# "steps": it is the mean over time steps of what it is of each alone; None: neither.
Reading = Literal["mean", "steps"] | None


def over_time(reading: Callable[[dict[str, Any]], Reading] | Reading) -> Callable[[Callable], Callable]:
    """Decorator that says how a loss reads the student's features over time; a function is given the loss's options."""

    def mark(function: Callable) -> Callable:
        function.over_time = reading if callable(reading) else lambda _: reading
        return function

    return mark


def reading_of(loss: Callable, options: dict[str, Any]) -> Reading:
    """How a loss with these options reads the student's features over time; None where it does not say."""
    return getattr(loss, "over_time", lambda _: None)(options)


def _kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """temperature^2 KL(teacher || student) of softened logits, [..., K] -> [...]."""
    student = F.log_softmax(student / temperature, dim=-1)
    teacher = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _every_step(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Fold time: logits [T, B, K] -> [T*B, K], and each image's target at every step."""
    repeated = repeat(targets, "b ... -> (t b) ...", t=logits.shape[0])
    return rearrange(logits, "t b k -> (t b) k"), repeated


@losses.register("cross-entropy")
def cross_entropy(
    logits: Tensor, targets: Tensor, *, readout: Readout = "mean", label_smoothing: Smoothing = 0.0
) -> Tensor:
    """Cross-entropy of the logits averaged over the time steps, or the mean of each step's.

    `readout = "step"` is the mean over steps of CE(z_t), as in TET, ELKD and TSER.
    """
    logits = logits.float()
    if readout == "mean":
        logits = logits.mean(0)
    else:
        logits, targets = _every_step(targets, logits)
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


@losses.register("tet")
def tet(
    logits: Tensor,
    targets: Tensor,
    *,
    mse_weight: Fraction = 0.05,
    target_logit: float = 1.0,
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """Temporal efficient training: cross-entropy at every step, and MSE of the logits to a constant.

    (1 - l) mean_t CE(o[t], y) + l MSE(o, target_logit) with l = `mse_weight` (Deng et al., ICLR 2022, eq. 12).
    """
    logits = logits.float()
    mse = (logits - target_logit).square().mean()
    logits, targets = _every_step(targets, logits)
    ce = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return (1 - mse_weight) * ce + mse_weight * mse


@losses.register("logit-kd")
def logit_kd(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Temperature = 4.0,
    readout: Readout = "mean",
) -> Tensor:
    """Knowledge distillation from the teacher's softened logits, of the mean over time or at each step.

    temperature^2 KL(teacher || student), both softened (Hinton et al., arXiv 1503.02531), averaged over images and, for
    `readout = "step"`, over time steps: the teacher's term of ELKD (temperature 3) and of TSER.
    """
    logits = logits.float()
    student = logits.mean(0, keepdim=True) if readout == "mean" else logits
    return _kl(teacher_logits.float().expand_as(student), student, temperature).mean()


@losses.register("ensemble-kd")
def ensemble_kd(logits: Tensor, targets: Tensor, *, temperature: Temperature = 3.0) -> Tensor:
    """Self-distillation of each step from the mean logits of the steps that are right (ELKD's second term).

    mean_t temperature^2 KL(ensemble || z_t), the ensemble without gradient: an image's logits averaged over the steps
    whose arg-max is the target's (Yu et al., "Efficient Logit-based Knowledge Distillation of Deep Spiking Neural
    Networks for Full-Range Timestep Deployment", ICML 2025). For an image on which no step is right the ensemble's
    logits are 0, the uniform distribution, as in the authors' code: wrong steps lose confidence, not only gain from the
    label. Of class probabilities, the target is the largest (the first of several).
    """
    logits = logits.float()
    if targets.ndim == 2:
        targets = targets.argmax(-1)
    with torch.no_grad():
        right = (logits.argmax(-1) == targets)[..., None]
        ensemble = (logits * right).sum(0) / right.sum(0).clamp(min=1)
    return _kl(ensemble.expand_as(logits), logits, temperature).mean()


@losses.register("entropy")
def entropy(logits: Tensor) -> Tensor:
    """Minus the mean entropy of each step's prediction: a weight above 0 keeps the steps from over-confidence.

    - mean_t H(softmax(z_t)), the regularisation of TSER (Yu et al., "Temporal Separation with Entropy Regularization
    for Knowledge Distillation in Spiking Neural Networks", CVPR 2025), known as the confidence penalty (Pereyra et al.,
    arXiv 1701.06548). It is 0 for a certain prediction and -ln K for a uniform one. It knows no labels: it goes with
    other losses.
    """
    logs = F.log_softmax(logits.float(), dim=-1)
    return (logs.exp() * logs).sum(-1).mean()


@losses.register("attention")
@over_time(lambda options: {"rate": "mean", "step": "steps"}.get(options.get("temporal", "rate")))
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
