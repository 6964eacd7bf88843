"""Loss and accuracy of a model on a split: the one place that counts them, for validation, the test and pruning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba.data.images import ImageData, ImageSet
from mamba.data.loader import eval_batches
from mamba.data.views import ONE, Views
from mamba.runs.confusion import FROM_CLASSES, Confusion
from mamba.train.distributed import Process

STOP_EVERY = 8
"""Batches between two moments at which several ranks agree whether to stop."""


class Stopped(Exception):
    """The run was asked to stop while a model was being scored."""


class Score(NamedTuple):
    """Mean cross-entropy and accuracy in percent; both NaN where the model's outputs are, which rank nowhere."""

    loss: float
    accuracy: float


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor, views: Views = ONE) -> Tensor:
    """Class probabilities of normalised images (batch, 3, side, side), the mean over their views: (batch, classes)
    float32. The model is used in the mode that it is in."""
    return torch.stack([model(view).float().softmax(-1) for view in views(images)]).mean(0)


def best_views(asked: Views, score: Callable[[Views], Score] | None, always: bool) -> tuple[Views, dict[str, Any]]:
    """Whether to average over views: only where that scores better than the image as it is on the validation split.

    Args:
        asked: what fits the data.
        score: on the validation split; None without one.
        always: use them without comparing.

    Returns:
        the views to test with, and what result.json says of the choice.
    """
    said: dict[str, Any] = {"asked": asked.to_dict()}
    if asked.count == 1:
        return ONE, said | {"used": False, "why": "training shows each image in one way"}
    if score is not None:
        plain, several = score(ONE), score(asked)
        said |= {"val/accuracy": plain.accuracy, "val/accuracy with views": several.accuracy}
        better = (several.accuracy, -several.loss) > (plain.accuracy, -plain.loss)
        used, why = (
            better or always,
            "better on the validation split" if better else "no better on the validation split",
        )
    else:
        used, why = always, "no validation split to compare them on"
    if always:
        why += ", and eval.tta_always"
    return (asked if used else ONE), said | {"used": used, "why": why}


class ClassCounts:
    """Which classes are taken for which, summed on the device; and how many are right among the five most probable."""

    def __init__(self, classes: tuple[str, ...], device: torch.device) -> None:
        self.classes, n = classes, len(classes)
        self.sums = torch.zeros(n * n + 1, dtype=torch.int64, device=device)

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Of some images: (n, classes), in any form with the same order, and (n,)."""
        n = len(self.classes)
        pairs = labels * n + probabilities.argmax(-1)
        self.sums[:-1] += torch.bincount(pairs, minlength=n * n)
        five = probabilities.topk(min(5, n), dim=-1).indices
        self.sums[-1] += (five == labels[:, None]).any(-1).sum()

    def result(self) -> Confusion:
        n, (*counts, five) = len(self.classes), self.sums.tolist()
        return Confusion(np.array(counts).reshape(n, n), self.classes, five if n >= FROM_CLASSES else None)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ImageData,
    split: ImageSet,
    process: Process,
    batch_size: int = 512,
    amp: torch.dtype | None = None,
    views: Views = ONE,
    counts: ClassCounts | None = None,
    stop: Callable[[], bool] | None = None,
) -> Score:
    """Score a model on its process's device, counted exactly over all ranks. Leaves it in eval mode.

    Args:
        model: images (batch, 3, side, side) -> logits (batch, classes).
        data: whose statistics normalise the images.
        split: one of data's.
        process: this rank; all ranks call with equal weights.
        batch_size: images of a forward pass.
        amp: autocast type, or None.
        views: of each image whose class probabilities are averaged.
        counts: filled with all ranks' images, if given; meaningless where the score is NaN.
        stop: whether to stop, asked between batches; None: score to the end.

    Raises:
        Stopped: on all ranks together.
    """
    model.eval()
    device = process.device
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    asked_by_all = len(split) // process.world_size // batch_size  # batches that every rank has
    batches = eval_batches(data, split, batch_size, process.rank, process.world_size, device)
    for number, (images, labels) in enumerate(batches):
        if stop is not None and _stopped(process, stop, number, asked_by_all):
            raise Stopped
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            log_probabilities = probabilities(model, images, views).clamp_min(1e-12).log()
        loss = F.nll_loss(log_probabilities, labels, reduction="sum")
        correct = (log_probabilities.argmax(-1) == labels).sum()
        if counts is not None:
            counts.add(log_probabilities, labels)
        totals += torch.stack((loss.double(), correct.double(), torch.tensor(float(len(labels)), device=device)))
    loss_sum, correct_sum, count = process.sum(totals).tolist()
    if counts is not None:
        process.sum(counts.sums)
    if not math.isfinite(loss_sum):  # argmax takes NaN for the largest
        return Score(math.nan, math.nan)
    return Score(loss_sum / count, 100 * correct_sum / count)


def _stopped(process: Process, stop: Callable[[], bool], number: int, common: int) -> bool:
    """Whether to stop before a batch. A process alone asks each time; several agree, at batches that all of them have,
    and seldom, since the host has to wait for the device."""
    if process.world_size == 1:
        return stop()
    if number % STOP_EVERY or number >= common:
        return False
    return bool(process.sum(torch.tensor(float(stop()), device=process.device)).item())
