"""An exponential moving average of weights and buffers (https://arxiv.org/abs/1703.01780), as a second model."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class ModelEma(Generic[Model]):
    """`model` holds the average: evaluate it like any other.

    The decay of update t (from 0) is min(decay, (1 + t) / (10 + t)): early updates follow the weights closely, so a
    short run is not stuck at its initial ones.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    def decay_now(self) -> float:
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Move towards the model's weights and floating-point buffers; other buffers (counters) are copied."""
        weight = 1 - self.decay_now()
        mine, theirs = [], []
        for a, b in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if a.is_floating_point():
                mine.append(a)
                theirs.append(b)
            else:
                a.copy_(b)
        torch._foreach_lerp_(mine, theirs, weight)
        self.updates += 1
