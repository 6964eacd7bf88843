"""An exponential moving average of weights and buffers (https://arxiv.org/abs/1703.01780), as a second model."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class ModelEma(Generic[Model]):
    """`model` holds the average of `source`: evaluate it like any other.

    The decay of update t (from 0) is min(decay, (1 + t) / (10 + t)): early updates follow the weights closely, so a
    short run is not stuck at its initial ones.
    """

    def __init__(self, source: Model, decay: float) -> None:
        self.model: Model = copy.deepcopy(source).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0
        pairs = list(zip(self.model.state_dict().values(), source.state_dict().values(), strict=True))
        self.averaged = [(mine, theirs) for mine, theirs in pairs if mine.is_floating_point()]
        self.copied = [(mine, theirs) for mine, theirs in pairs if not mine.is_floating_point()]

    def decay_now(self) -> float:
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the source's weights and floating-point buffers; other buffers (counters) are copied."""
        mine, theirs = zip(*self.averaged, strict=True)
        torch._foreach_lerp_(mine, theirs, 1 - self.decay_now())
        for a, b in self.copied:
            a.copy_(b)
        self.updates += 1
