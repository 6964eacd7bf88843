"""Clipping, the optimizer's step and the average as torch does them, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mamba.ops.update.average import Average
from mamba.ops.update.muon import Muon


class PlainUpdate:
    """As `mamba.ops.update.triton.FusedUpdate`, on any device. Learning rates are those of the optimizer's groups."""

    def __init__(self, optimizer: torch.optim.Optimizer, average: Average | None, clip: float | None) -> None:
        self.optimizer, self.average, self.clip = optimizer, average, clip
        self.skips = isinstance(optimizer, Muon) or bool(optimizer.defaults.get("fused"))
        """Whether its `step` looks at `found_inf`; others are asked on the host."""
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]

    def norm(self) -> Tensor:
        """The norm of all gradients together."""
        return nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])

    def apply(self, rate: Tensor, norm: Tensor, finite: Tensor) -> None:
        """Clip to the norm, step every parameter at its group's rate and move the average, where `finite`."""
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(self.params, self.clip, norm)
        if self.skips:
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        if self.average:
            self.average.update(finite)

    def fill_in(self) -> None:
        """Nothing is recorded."""
