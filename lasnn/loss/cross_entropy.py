"""Losses of the student's logits and the labels."""

from typing import Annotated

import torch.nn.functional as F
from einops import rearrange, repeat
from pydantic import Field
from torch import Tensor

from lasnn.loss.interface import Readout
from lasnn.registry import losses

Fraction = Annotated[float, Field(ge=0, le=1)]
Smoothing = Annotated[float, Field(ge=0, lt=1)]


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
