"""Gradients averaged over ranks while backward still runs, behind one interface.

`Gradients` is a process alone. `DdpGradients` is DistributedDataParallel. `FlatGradients` is a sum of our own for steps
that are recorded: DistributedDataParallel rebuilds its buckets in its first steps, keeps a logger and wants eleven
steps of warm-up before it can be recorded; here buckets are fixed and nothing has to be warmed up.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mamba.train.distributed import Pending, Process

ALIGN = 64  # elements: each view starts at a 256-byte boundary
BUCKET = 2**22  # elements, 16 MB: four or five for mamba_small; other sizes were not measured
CHOICE = "MAMBA_FORGE_GRADIENTS"
"""Environment variable for benchmarks and tests: `ddp` or `flat` instead of the rule of `average_gradients`."""


class Gradients:
    """One process: its gradients are the average already.

    Call `module` for a forward pass. Run each micro-batch, forward and backward, inside `micro_batch(last)`, its loss
    multiplied by `share`; after the last one and `wait()`, every `grad` is the average over ranks. All ranks must run
    the same backward and start from equal weights; they do, from the same seed or the same checkpoint.
    """

    share = 1.0
    """What a rank's loss is multiplied by."""
    warm_up = 3
    """Steps before one can be recorded: the first compiles, communicators are set up, and the allocator settles."""

    def __init__(self, model: nn.Module) -> None:
        self.module = model

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """Around a forward and a backward pass; only the last one of a step is followed by `wait`."""
        return nullcontext()

    def wait(self) -> None:
        """Let later work wait for the averages."""


class DdpGradients(Gradients):
    """DistributedDataParallel. Buffers are not its business: see `mamba.train.step.RunningStatistics`.

    To be recorded it has to be made in the stream that records (https://docs.pytorch.org/docs/stable/notes/cuda.html,
    "Usage with DistributedDataParallel").
    """

    warm_up = 11

    def __init__(self, model: nn.Module, process: Process, static: bool) -> None:
        device_ids = [process.device.index] if process.device.type == "cuda" else None
        self.module = DistributedDataParallel(
            model, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=static
        )

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        assert isinstance(self.module, DistributedDataParallel)
        return nullcontext() if last else self.module.no_sync()


class FlatGradients(Gradients):
    """Every parameter's `grad` becomes a view of one tensor that is summed over ranks.

    Buckets go out as soon as backward has their last gradient, the last layers' first. A parameter without a gradient
    has none afterwards either; it must be the same ones on all ranks.
    """

    def __init__(self, model: nn.Module, process: Process) -> None:
        super().__init__(model)
        self.process, self.share = process, 1 / process.world_size
        self.parameters = [p for p in reversed(list(model.parameters())) if p.requires_grad]
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

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if last:  # what a backward pass that failed has left is forgotten
            self.missing, self.pending = [len(members) for members, _ in self.buckets], {}
        yield

    def wait(self) -> None:
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


def average_gradients(
    model: nn.Module, process: Process, accumulate: int, recording: torch.cuda.Stream | None = None
) -> Gradients:
    """DistributedDataParallel over several processes; sums of our own where steps are recorded.

    Args:
        model: restored and compiled.
        process: this rank.
        accumulate: micro-batches of a step.
        recording: the stream in which steps are recorded, or None.
    """
    if process.world_size == 1:
        return Gradients(model)
    if os.environ.get(CHOICE, "flat" if recording else "ddp") == "flat":
        return FlatGradients(model, process)
    with torch.cuda.stream(recording):  # of None: as it is
        return DdpGradients(model, process, static=recording is not None and accumulate == 1)


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
