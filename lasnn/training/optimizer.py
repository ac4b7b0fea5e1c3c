"""The optimiser and the learning rate's schedule."""

import math

import torch
from torch import nn

from lasnn.recipe.check import DECAY_SHARE, GAMMA, MILESTONES
from lasnn.recipe.schema import Training


def make_optimizer(module: nn.Module, config: Training, fused: bool = False) -> torch.optim.Optimizer:
    """SGD or AdamW; one-dimensional parameters (batch norm, biases, tau) do not decay."""
    learnt = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learnt if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in learnt if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=fused)


def learning_rate(config: Training, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up from 0 to `lr`, then the schedule.

    "cosine" is half a cosine down to `min_lr` (Loshchilov & Hutter, ICLR 2017). "step" multiplies by `gamma` at each of
    the milestones, shares of all steps (He et al., CVPR 2016). "warmup-stable-decay" stays at `lr` until the last
    `decay_share` of all steps, in which it falls linearly towards `min_lr` (Hu et al., MiniCPM, COLM 2024; linear as in
    Haegele et al., NeurIPS 2024).
    """
    total, warm = config.epochs * steps_per_epoch, config.warmup_epochs * steps_per_epoch
    if step < warm:
        return config.lr * min(1.0, (step + 1) / warm)
    if config.schedule == "step":
        # 0.1 of 30 steps is 3.0000000000000004.
        shares = MILESTONES if config.milestones is None else config.milestones
        milestones = [math.ceil(share * total - 1e-6) for share in shares]
        passed = sum(step >= milestone for milestone in milestones)
        return max(config.min_lr, config.lr * (config.gamma or GAMMA) ** passed)
    if config.schedule == "warmup-stable-decay":
        left = (total - step) / ((config.decay_share or DECAY_SHARE) * total)
        return config.min_lr + (config.lr - config.min_lr) * min(1.0, left)
    share = (step - warm) / max(1.0, total - warm)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * share)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The same rate for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = value
