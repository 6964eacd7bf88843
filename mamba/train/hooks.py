"""The seam through which others take part in training (masks, penalties); `mamba` knows nothing of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mamba.train.ema import ModelEma


class TrainHook:
    """Called by the trainer on every rank. Override what is needed; each method does nothing here."""

    def attach(self, model: nn.Module, ema: ModelEma | None, optimizer: torch.optim.Optimizer, seed: int) -> None:
        """Once, after the weights were restored and before they are first used."""

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Before the first step of epoch `epoch` (from 0), also of a resumed one. Host code: a value that `gradients`
        reads must be written into a tensor that already exists, since `gradients` may have been recorded."""

    def gradients(self) -> None:
        """After every backward pass, with gradients averaged over ranks and unscaled, before they are clipped.

        May change gradients and weights in place. Must not read a value back to the host nor depend on one: the trainer
        may record the step once (CUDA graph) and replay it.
        """

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """After an epoch; returns metrics to write beside the trainer's own. Host code."""
        return {}

    def may_be_best(self, epoch: int) -> bool:
        """Whether the weights after this epoch (from 0) may be kept as the run's best. Host code."""
        return True

    def pictures(self) -> dict[str, Tensor]:
        """What the run's backends are shown once, in the first step of a run: tag -> picture of shape (3, height,
        width), values from 0 to 1. Asked on rank 0. Host code."""
        return {}

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Tensors to keep with each checkpoint: file name (ending in .safetensors) -> name -> tensor."""
        return {}
