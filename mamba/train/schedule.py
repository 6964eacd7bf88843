"""The learning rate as a pure function of the step, so that there is no state to save or to lose."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from mamba.config.choices import Registry
from mamba.config.schema import OptimConfig
from mamba.errors import ConfigError


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """The rate at an optimizer step (counted from 0): warm-up to `lr`, then `optim.schedule`.

    The exponential warm-up is (1 - e^(-5p)) / (1 - e^-5) at progress p, which rises early and arrives gently.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        progress = (step + 1) / warmup  # the first step already moves
        if config.warmup == "exponential":
            progress = (1 - math.exp(-5 * progress)) / (1 - math.exp(-5))
        return config.lr * progress
    share = SCHEDULES[config.schedule](config, step, steps_per_epoch)
    if not isinstance(share, float | int) or not 0 <= share <= 1:  # NaN neither
        raise ConfigError(
            f"optim.schedule '{config.schedule}' gives {share!r:.40} at step {step}; valid: a number from 0, which is "
            "optim.min_lr, to 1, which is optim.lr"
        )
    return config.min_lr + (config.lr - config.min_lr) * share


def _progress(first: int, step: int, last: int) -> float:
    """0 at the first step, 1 at the last."""
    return min(1.0, max(0.0, (step - first) / max(1, last - first)))


def cosine(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """Half a cosine from the end of the warm-up on (https://arxiv.org/abs/1608.03983, without restarts)."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    return 0.5 * (1 + math.cos(math.pi * _progress(warmup, step, config.epochs * steps_per_epoch - 1)))


def warmup_stable_decay(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """Constant, then linear over the last `decay_epochs` (https://arxiv.org/abs/2405.18392). Before the decay nothing
    depends on the run's length, so that a longer run begins as a shorter one does."""
    total = config.epochs * steps_per_epoch
    return 1 - _progress(total - round(config.decay_epochs * steps_per_epoch) - 1, step, total - 1)


SCHEDULES: Registry[Callable[[OptimConfig, int, int], float]] = Registry(
    "optim.schedule", {"cosine": cosine, "wsd": warmup_stable_decay}
)
"""`optim.schedule`: (config, step, steps an epoch) -> 1 at `lr`, 0 at `min_lr`; called after the warm-up."""


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate times its own scale (layer-wise decay)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
