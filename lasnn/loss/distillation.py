"""Losses of softened logits: from a teacher's, or from the student's own steps together."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lasnn.errors import UserError
from lasnn.loss.interface import Readout, at_one_step
from lasnn.registry import losses

Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """temperature^2 KL(teacher || student) of softened logits, [..., K] -> [...]."""
    student = F.log_softmax(student / temperature, dim=-1)
    teacher = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _standardised(logits: Tensor) -> Tensor:
    """Logits [..., K] less their mean over the classes, over their deviation."""
    # Of logits that are all equal the gradient stays bounded, which 1e-7 alone would not keep.
    deviation = logits.std(-1, keepdim=True).clamp_min(1e-3) + 1e-7
    return (logits - logits.mean(-1, keepdim=True)) / deviation


@losses.register("logit-kd")
def logit_kd(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Temperature = 4.0,
    readout: Readout = "mean",
    standardize: bool = False,
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
) -> Tensor:
    """Knowledge distillation from the teacher's softened logits, of the mean over time or at each step.

    temperature^2 KL(teacher || student), both softened (Hinton et al., arXiv 1503.02531), averaged over images and, for
    `readout = "step"`, over time steps: the teacher's term of ELKD (temperature 3) and of TSER.

    Args:
        standardize: take (z - mean) / (deviation + 1e-7) over the classes for the logits z of both (Sun et al., "Logit
            Standardization in Knowledge Distillation", CVPR 2024; temperature 2 and weight 9 beside 0.1 of the
            cross-entropy in its authors' code), the deviation at least 1e-3.
        noise: smooth the student's logits by so much of normal noise that has their own deviation over the classes,
            drawn at each step of the training, before anything else (NLD of CKDSNN, arXiv 2511.06902, with 0.1 and
            temperature 2). The noise is a constant of the gradient. Theirs has the logits' mean too, which a softmax
            does not see.

    Raises:
        UserError: `standardize` with fewer than three classes.
    """
    if standardize and logits.shape[-1] < 3:
        raise UserError(
            "standardize leaves nothing to learn of two classes: any two logits become 0.71 and -0.71; set "
            "standardize = false"
        )
    logits, teacher = logits.float(), teacher_logits.float()
    student = logits.mean(0, keepdim=True) if readout == "mean" else logits
    if noise > 0:
        student = student + noise * student.detach().std(-1, keepdim=True) * torch.randn_like(student)
    if standardize:
        student, teacher = _standardised(student), _standardised(teacher)
    return _kl(teacher.expand_as(student), student, temperature).mean()


@losses.register("ensemble-kd")
@at_one_step("it is 0 for images that the student gets right, and only lowers its confidence in the others")
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
