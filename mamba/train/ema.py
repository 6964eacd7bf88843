"""An exponential moving average of weights and buffers (https://arxiv.org/abs/1703.01780), as a second model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class ModelEma(Generic[Model]):
    """`model` holds the average of `source`: evaluate it like any other.

    The decay of update t (from 0) is min(decay, (1 + t) / (10 + t)): early updates follow the weights closely, so a
    short run is not stuck at its initial ones.
    """

    def __init__(self, source: Model, decay: float) -> None:
        self.model: Model = copy.deepcopy(source).eval().requires_grad_(False)
        self.decay = decay
        device = next(source.parameters()).device
        self.updates = torch.zeros((), device=device)  # on the device, where a skipped step is known
        pairs = list(zip(self.model.state_dict().values(), source.state_dict().values(), strict=True))
        self.averaged = [(mine, theirs) for mine, theirs in pairs if mine.is_floating_point()]
        self.copied = [(mine, theirs) for mine, theirs in pairs if not mine.is_floating_point()]

    def decay_now(self) -> Tensor:
        return ((1 + self.updates) / (10 + self.updates)).clamp_max(self.decay)

    @torch.no_grad()
    def update(self, counts: Tensor | bool = True) -> None:
        """Move towards the source's weights and floating-point buffers; other buffers (counters) are copied.

        Where `counts` (a value on the device) is false, nothing moves and the update is not counted.
        """
        self.move(self.averaged, counts)
        self.count(counts)

    @torch.no_grad()
    def move(self, pairs: Sequence[tuple[Tensor, Tensor]], counts: Tensor | bool) -> None:
        """Move the first of each pair towards the second by this update's share."""
        if pairs:
            mine, theirs = zip(*pairs, strict=True)
            way = torch._foreach_sub(theirs, mine)
            torch._foreach_mul_(way, (1 - self.decay_now()) * counts)
            torch._foreach_add_(mine, way)

    @torch.no_grad()
    def count(self, counts: Tensor | bool) -> None:
        """End an update: copy what is not averaged, and count it."""
        for a, b in self.copied:
            a.copy_(b)
        self.updates += counts
