"""How long the device (or, on a CPU, the program) waits for something, without making it wait for the answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time between entering and leaving `running()`.

    On a GPU, events in the stream are timed: what the host does while the device still has work in its queue counts
    nothing, and what keeps the device waiting counts in full.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.pending.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - began

    def read(self) -> float:
        """Seconds since the last reading. Waits for the device to come by, where it has not yet."""
        for start, end in self.pending:
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1e3
        result, self.seconds, self.pending = self.seconds, 0.0, []
        return result
