"""Loss and accuracy of a model on a split: the one place that counts them, for validation, the test and pruning."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mamba.data.augment import tta_views
from mamba.data.images import ImageData, ImageSet
from mamba.data.loader import eval_batches
from mamba.train.distributed import Process


class Score(NamedTuple):
    """Mean cross-entropy and accuracy in percent; both NaN where the model's outputs are, which rank nowhere."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ImageData,
    split: ImageSet,
    process: Process,
    batch_size: int = 512,
    amp: torch.dtype | None = None,
    views: int = 1,
) -> Score:
    """Score a model on its process's device, counted exactly over all ranks. Leaves it in eval mode.

    Args:
        model: images (batch, 3, side, side) -> logits (batch, classes).
        data: whose statistics normalise the images.
        split: one of data's.
        process: this rank; all ranks call with equal weights.
        batch_size: images of a forward pass.
        amp: autocast type, or None.
        views: of each image whose class probabilities are averaged; 1: the image as it is.
    """
    model.eval()
    device = process.device
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in eval_batches(data, split, batch_size, process.rank, process.world_size, device):
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            seen = [model(view).float().softmax(-1) for view in tta_views(images, views)]
        log_probabilities = torch.stack(seen).mean(0).clamp_min(1e-12).log()
        loss = F.nll_loss(log_probabilities, labels, reduction="sum")
        correct = (log_probabilities.argmax(-1) == labels).sum()
        totals += torch.stack((loss.double(), correct.double(), torch.tensor(float(len(labels)), device=device)))
    loss_sum, correct_sum, count = process.sum(totals).tolist()
    if not math.isfinite(loss_sum):  # argmax takes NaN for the largest
        return Score(math.nan, math.nan)
    return Score(loss_sum / count, 100 * correct_sum / count)
