"""The optimizer's update: clipping, AdamW or Muon, and the average of the weights, without the host knowing whether a
step counted."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mamba.ops.update.average import Average
from mamba.ops.update.muon import Muon
from mamba.ops.update.reference import PlainUpdate


class Update(Protocol):
    """A step is `norm()`, then `apply()`; gradients are left as they are or clipped."""

    def norm(self) -> Tensor:
        """The norm of all gradients together, a scalar on their device."""
        ...

    def apply(self, rate: Tensor, norm: Tensor, finite: Tensor) -> None:
        """Clip to the norm, step at `rate` times each group's scale, move the average: all where `finite` is true."""
        ...

    def fill_in(self) -> None:
        """Before recorded launches run that followed a plain step."""
        ...


def is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `FusedUpdate` computes what its `step` would; of any other its own `step` is called."""
    groups = optimizer.param_groups
    same = all(g.get(key) == groups[0].get(key) for g in groups for key in ("betas", "eps"))
    plain = not any(g.get("amsgrad") or g.get("maximize") for g in groups)
    return type(optimizer) in (torch.optim.AdamW, Muon) and same and plain


def make_update(optimizer: torch.optim.Optimizer, average: Average | None, clip: float | None, fused: bool) -> Update:
    """Of an optimizer whose state has been restored.

    Args:
        optimizer: whose groups say `lr_scale` and `weight_decay`.
        average: of its parameters and of other tensors, or None.
        clip: largest norm of all gradients, or None.
        fused: in two kernel launches (needs triton and float32), of which each may be recorded.
    """
    if not fused:
        return PlainUpdate(optimizer, average, clip)
    if not is_known(optimizer):
        raise TypeError(f"{type(optimizer).__name__} has no fused update; valid: AdamW (one for all its groups), Muon")
    from mamba.ops.update.triton import FusedUpdate

    return FusedUpdate(optimizer, average, clip)
