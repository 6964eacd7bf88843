"""The seam between the trainer and whatever launched it: one process, torchrun, or Ray Train.

The trainer talks to torch.distributed for collectives; a launcher has to set up its process group and to provide a
`Process`. Nothing else of a launcher is known here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Pending(Protocol):
    """Something begun on the device that later work may have to wait for."""

    def wait(self) -> object: ...


class Done:
    """Nothing to wait for."""

    def wait(self) -> None:
        return None


@dataclass
class Process:
    """One training process among `world_size`. Alone by default; launchers subclass or construct it."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def cpus(self) -> int:
        """CPUs this process may use for itself and its loader processes."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """Called on every rank after each epoch, with the same metrics; their `epoch` is how many are completed.
        `checkpoint` is the folder of the training state, where one was saved."""

    def leaving(self) -> bool:
        """Whether this process was told that a machine of the run is about to go away: the run is to save and end."""
        return False

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all ranks."""
        self.begin_sum(values).wait()
        return values

    def begin_sum(self, values: Tensor) -> Pending:
        """`sum`, in place, under way: its tensor must not be read or changed before `wait()` of what is returned.

        All ranks must begin the same sums in the same order.
        """
        return dist.all_reduce(values, async_op=True) if self.world_size > 1 else Done()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def own_device() -> torch.device:
    """This process's first GPU if it has one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def local_process() -> Process:
    """This process alone, on its own device."""
    return Process(device=own_device())


def torchrun_process() -> Process:
    """A process started by torchrun; joins the process group (NCCL on GPUs, gloo on CPUs)."""
    gpu = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    return Process(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"]), device)
