"""Gradients summed over ranks while backward still runs, for a step that is recorded.

DistributedDataParallel does that too, but rebuilds buckets in its first steps, keeps a logger and wants eleven steps of
warm-up before it can be recorded. Here buckets are fixed and nothing has to be warmed up.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mamba.train.distributed import Pending, Process

ALIGN = 64  # elements: each view starts at a 256-byte boundary
BUCKET = 2**22  # elements, 16 MB: four or five for mamba_small; other sizes were not measured


class FlatGradients:
    """`expect()` before backward, `sum()` after it: every parameter's `grad` is a view of one tensor summed over ranks.

    Buckets go out as soon as backward has their last gradient, the last layers' first. All ranks must run the same
    backward, and start from equal weights; they do, from the same seed or the same checkpoint.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], process: Process) -> None:
        self.parameters, self.process = [p for p in reversed(parameters) if p.requires_grad], process
        sizes = [-(-p.numel() // ALIGN) * ALIGN for p in self.parameters]
        self.flat = torch.zeros(sum(sizes), device=process.device)
        parts = self.flat.split(sizes)
        self.views = [part[: p.numel()].view_as(p) for part, p in zip(parts, self.parameters, strict=True)]
        self.buckets = _buckets(sizes)
        self.missing: list[int] = []  # gradients that each bucket still waits for; none are counted unless expected
        self.pending: dict[int, Pending] = {}
        mine = weakref.ref(self)  # or the parameters would keep this, and this the parameters
        for bucket, (members, _) in enumerate(self.buckets):
            for i in members:
                self.parameters[i].register_post_accumulate_grad_hook(partial(_arrived, mine, bucket))

    def expect(self) -> None:
        """The coming backward is the last one before `sum`. What one that failed has left is forgotten."""
        self.missing, self.pending = [len(members) for members, _ in self.buckets], {}

    def sum(self) -> None:
        """The sum, not the average: divide the loss. A parameter without a gradient has none afterwards either; it must
        be the same ones on all ranks."""
        for bucket in range(len(self.buckets)):
            if bucket not in self.pending:
                self._send(bucket)
        for pending in self.pending.values():
            pending.wait()
        for view, p in zip(self.views, self.parameters, strict=True):
            if p.grad is not None:
                p.grad = view
        self.missing, self.pending = [], {}

    def _ready(self, bucket: int) -> None:
        if self.missing:
            self.missing[bucket] -= 1
            if self.missing[bucket] == 0:
                self._send(bucket)

    @torch.no_grad()
    def _send(self, bucket: int) -> None:
        members, part = self.buckets[bucket]
        there: list[tuple[Tensor, Tensor]] = []
        for i in members:
            grad = self.parameters[i].grad
            if grad is not None:
                there.append((self.views[i], grad))
        if there:
            torch._foreach_copy_([view for view, _ in there], [grad for _, grad in there])
        self.pending[bucket] = self.process.begin_sum(self.flat[part])


def _arrived(flat: weakref.ref[FlatGradients], bucket: int, _: Tensor) -> None:
    waiting = flat()
    if waiting:
        waiting._ready(bucket)


def _buckets(sizes: Sequence[int]) -> list[tuple[range, slice]]:
    """Neighbours of at least `BUCKET` elements together: their numbers, and where they lie."""
    buckets: list[tuple[range, slice]] = []
    first = start = end = 0
    for i, size in enumerate(sizes):
        end += size
        if end - start >= BUCKET or i == len(sizes) - 1:
            buckets.append((range(first, i + 1), slice(start, end)))
            first, start = i + 1, end
    return buckets
