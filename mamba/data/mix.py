"""Mixup and cutmix: pictures of two images, and targets that say so."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba.config.schema import RunConfig


class BatchMix:
    """Mixup (https://arxiv.org/abs/1710.09412) and cutmix (https://arxiv.org/abs/1905.04899) on part of the batches.

    Partners are neighbours in the (shuffled) batch: 0 with 1, 2 with 3, ..., an odd last image with itself. Unlike a
    permutation of the whole batch this gives the same pairs however the batch is shared out over workers.

    Args:
        mixup: alpha of its Beta distribution; 0: off.
        cutmix: likewise; with both on, each mixed batch takes one of them at random.
        prob: part of the batches that is mixed, up to 1: all.
        num_classes: width of the targets.
        seed: of the run; what a batch gets is a function of it, the epoch and the step.
        end: the epoch (from 0) from which on nothing is mixed; None: never.
    """

    def __init__(
        self, mixup: float, cutmix: float, prob: float, num_classes: int, seed: int, end: int | None = None
    ) -> None:
        self.alphas = {"mixup": mixup, "cutmix": cutmix}
        self.kinds = [kind for kind, alpha in self.alphas.items() if alpha > 0]
        self.prob, self.num_classes, self.seed, self.end = prob, num_classes, seed, end

    @classmethod
    def from_config(cls, config: RunConfig, num_classes: int) -> BatchMix:
        data = config.data
        end = config.optim.epochs - data.mix_off_epochs if data.mix_off_epochs else None
        return cls(data.mixup, data.cutmix, data.mix_prob, num_classes, config.seed, end)

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """(n, c, side, side) and (n,) -> images, and targets (n, num_classes) as probabilities."""
        targets = F.one_hot(labels, self.num_classes).to(images.dtype)
        rng = np.random.default_rng([self.seed, epoch, step, 1])
        over = self.end is not None and epoch >= self.end
        if not self.kinds or over or rng.random() >= self.prob:
            return images, targets
        kind = self.kinds[int(rng.integers(len(self.kinds)))]
        keep = float(rng.beta(self.alphas[kind], self.alphas[kind]))
        partner = _neighbour(len(images), images.device)
        if kind == "mixup":
            images = keep * images + (1 - keep) * images[partner]
        else:
            side = images.shape[-1]
            half = 0.5 * side * (1 - keep) ** 0.5
            cy, cx = rng.integers(side, size=2).tolist()
            y0, y1, x0, x1 = (int(np.clip(round(v), 0, side)) for v in (cy - half, cy + half, cx - half, cx + half))
            images = images.clone()
            images[:, :, y0:y1, x0:x1] = images[partner][:, :, y0:y1, x0:x1]
            keep = 1 - (y1 - y0) * (x1 - x0) / side**2  # the area that was really kept
        return images, keep * targets + (1 - keep) * targets[partner]


def _neighbour(n: int, device: torch.device) -> Tensor:
    """0 <-> 1, 2 <-> 3, ...; an odd last one stays."""
    return (torch.arange(n, device=device) ^ 1).clamp_max(n - 1)
