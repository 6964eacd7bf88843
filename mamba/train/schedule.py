"""The learning rate as a pure function of the step, so that there is no state to save or to lose."""

from __future__ import annotations

import math

import torch

from mamba.config.schema import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """Peak rate at an optimizer step (counted from 0): warm-up to `lr`, then a cosine to `min_lr`.

    The cosine: https://arxiv.org/abs/1608.03983, without restarts. The exponential warm-up is
    (1 - e^(-5p)) / (1 - e^-5) at progress p, which rises early and arrives gently.
    """
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        progress = (step + 1) / warmup  # the first step already moves
        if config.warmup == "exponential":
            progress = (1 - math.exp(-5 * progress)) / (1 - math.exp(-5))
        return config.lr * progress
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate times its own scale (layer-wise decay)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
