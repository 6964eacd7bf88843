"""A moving average of tensors (https://arxiv.org/abs/1703.01780), without the host knowing whether a step counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Average:
    """Moves `averaged` pairs (mine, theirs) and copies `copied` ones.

    The decay of update t (from 0) is min(decay, (1 + t) / (10 + t)): early updates follow the weights closely, so a
    short run is not stuck at its initial ones.
    """

    def __init__(
        self, averaged: list[tuple[Tensor, Tensor]], copied: list[tuple[Tensor, Tensor]], decay: float
    ) -> None:
        self.averaged, self.copied, self.decay = averaged, copied, decay
        device = (averaged or copied)[0][1].device
        self.updates = torch.zeros((), device=device)  # on the device, where a skipped step is known

    def decay_now(self) -> Tensor:
        return ((1 + self.updates) / (10 + self.updates)).clamp_max(self.decay)

    @torch.no_grad()
    def update(self, counts: Tensor | bool = True) -> None:
        """Move towards their values; where `counts` (a value on the device) is false, nothing moves nor is counted."""
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
