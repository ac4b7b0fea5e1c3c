"""The optimiser and the learning rate's schedule."""

import math

import torch
from torch import nn

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
    """Linear warm-up from 0 to `lr`, then half a cosine down to `min_lr` (Loshchilov & Hutter, ICLR 2017)."""
    total, warm = config.epochs * steps_per_epoch, config.warmup_epochs * steps_per_epoch
    if step < warm:
        return config.lr * min(1.0, (step + 1) / warm)
    share = (step - warm) / max(1.0, total - warm)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * share)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The same rate for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = value
