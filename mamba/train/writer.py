"""Checkpoints written by a thread, from copies, while training goes on.

The copies are made in the order of the device's work, so they hold what was there when they were asked for; the thread
waits for them, not the training. Writes happen one after the other, in the order in which they were asked for.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mamba.errors import ForgeError

WAITING = 2
"""Checkpoints whose copies wait to be written, at most: a best one and a training state."""


class Writer:
    """Does one thing after another in a thread of its own. What goes wrong with one ends all that come after it."""

    def __init__(self) -> None:
        self.jobs: queue.Queue[Callable[[], object] | None] = queue.Queue(WAITING)
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Waits only where WAITING jobs are not done yet."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
            self.thread.start()
        self.jobs.put(job)

    def failure(self) -> str | None:
        """The sentence of what went wrong so far.

        Raises:
            BaseException: what is no ForgeError is raised as it was.
        """
        if self.error is not None and not isinstance(self.error, ForgeError):
            raise self.error
        return None if self.error is None else str(self.error)

    def wait(self) -> None:
        """Until everything is done, well or not."""
        self.jobs.join()

    def finish(self) -> str | None:
        """Wait until everything is done; `failure`."""
        self.wait()
        return self.failure()

    def close(self) -> None:
        """Wait until everything is done, whatever went wrong, and end the thread."""
        if self.thread is not None:
            self.jobs.put(None)
            self.thread.join()
            self.thread = None

    def _work(self) -> None:
        while True:
            job = self.jobs.get()
            try:
                if job is None:
                    return
                if self.error is None:
                    job()
            except BaseException as error:
                self.error = error
            finally:
                del job  # with the copies that it holds
                self.jobs.task_done()


class Copies:
    """Copies of tensors on the CPU: complete once `wait` has returned. From a GPU they are made beside its work, into
    pinned memory."""

    def __init__(self) -> None:
        self.devices: set[torch.device] = set()
        self.ready: list[torch.cuda.Event] = []

    def of(self, value: Any) -> Any:
        """A copy of a tensor, or of containers of tensors and plain values."""
        if isinstance(value, Tensor):
            return self._tensor(value.detach())
        if isinstance(value, dict):
            return {key: self.of(own) for key, own in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.of(own) for own in value)
        return value

    def begun(self) -> None:
        """Every copy has been asked for."""
        for device in self.devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self.ready.append(event)

    def wait(self) -> None:
        for event in self.ready:
            event.synchronize()

    def _tensor(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.cpu().clone(memory_format=torch.contiguous_format)
        self.devices.add(tensor.device)
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)
