"""Gradients averaged over ranks in one piece, for a step that is recorded.

DistributedDataParallel overlaps its all-reduce with the backward pass, but rebuilds buckets in its first steps, keeps a
logger and wants eleven steps of warm-up before it can be recorded. One all-reduce of 66 MB adds 1.1 ms on two H200
(docs/BENCHMARKS.md) to a step of 12 ms and more, so nothing is overlapped here, and nothing has to be warmed up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mamba.worker import Worker

ALIGN = 64  # elements: each view starts at a 256-byte boundary


class FlatGradients:
    """`average()` after backward: every parameter's `grad` becomes a view of one tensor that all ranks have averaged.

    The ranks must start from equal weights; they do, from the same seed or the same checkpoint.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], worker: Worker) -> None:
        self.parameters, self.worker = [p for p in parameters if p.requires_grad], worker
        sizes = [-(-p.numel() // ALIGN) * ALIGN for p in self.parameters]
        self.flat = torch.zeros(sum(sizes), device=worker.device)
        parts = self.flat.split(sizes)
        self.views = [part[: p.numel()].view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    @torch.no_grad()
    def average(self) -> None:
        """A parameter without a gradient has none afterwards either; it must be the same ones on all ranks."""
        there = [(view, p) for view, p in zip(self.views, self.parameters, strict=True) if p.grad is not None]
        torch._foreach_copy_([view for view, _ in there], [p.grad for _, p in there if p.grad is not None])
        self.worker.sum(self.flat).div_(self.worker.world_size)
        for view, p in there:
            p.grad = view
