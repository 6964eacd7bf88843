"""A training step recorded as a CUDA graph: launched by one call, whatever it consists of."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from mamba.errors import TrainingError
from mamba.ops.conv import HAS_TRITON

Batches = list[tuple[Tensor, Tensor]]
"""Micro-batches of a step: images and targets, on the device."""


def can_record(setting: bool | str, device: torch.device, fp16: bool, foreign: str | None = None) -> bool:
    """What `optim.cuda_graph` means here; a warning where it is asked for and not possible. `foreign`: the name of an
    optimizer that is none of ours."""
    if not setting or device.type != "cuda":
        return False
    obstacle = "fp16 cannot be recorded" if fp16 else None if HAS_TRITON else "triton is missing"
    if foreign:
        obstacle = f"a step of {foreign} is not known to be recordable"
    if obstacle and setting is True:
        warnings.warn(f"optim.cuda_graph: {obstacle}, steps are launched one by one", stacklevel=2)
    return obstacle is None


class RecordedStep:
    """Calls `step`, at first as it is, then from a recording of it that reads its inputs from fixed memory.

    Steps before the recording are steps like any other, so nothing has to be undone; recording itself changes nothing
    on the device. What `step` reads and changes must be tensors that stay where they are, and it must not look at their
    values. Random numbers continue those of the generator, as in a plain step. Inputs of other shapes than the recorded
    ones are run as they are. `refresh` is called before a replay that follows a plain step. `warm_up`: steps taken as
    they are before one is recorded (`mamba.train.gradients`).
    """

    warm_up = 3

    def __init__(self, step: Callable[[Batches], tuple[Tensor, Tensor]], refresh: Callable[[], None]) -> None:
        self.step, self.refresh = step, refresh
        self.plain_steps = 0
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.fresh = False  # whether `refresh` was called since the last plain step
        self.inputs: Batches = []
        self.outputs: tuple[Tensor, Tensor]

    def __call__(self, batches: Batches) -> tuple[Tensor, Tensor]:
        if self.graph is None and self.plain_steps >= self.warm_up:
            self._record(batches)
        if self.graph is None or [i.shape for i, _ in batches] != [i.shape for i, _ in self.inputs]:
            self.plain_steps += 1
            self.fresh = False
            return self._plain(batches)
        for mine, theirs in zip(self.inputs, batches, strict=True):
            torch._foreach_copy_(mine, theirs)
        if not self.fresh:
            self.refresh()
            self.fresh = True
        self.graph.replay()
        return self.outputs

    def _plain(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """On the stream that will record: autograd and cuBLAS keep something for each stream that they have seen."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.step(batches)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _record(self, batches: Batches) -> None:
        self.inputs = [(images.clone(), targets.clone()) for images, targets in batches]
        graph = torch.cuda.CUDAGraph()
        try:
            self._capture(graph)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the process cannot go on: its random numbers are in the middle of a recording
            cause = str(error.__context__ or error).splitlines()[0]
            raise TrainingError(
                f"the optimizer step could not be recorded ({cause}); turn optim.cuda_graph off", every_rank=True
            ) from error
        self.graph = graph

    def _capture(self, graph: torch.cuda.CUDAGraph) -> None:
        # thread_local: NCCL's watchdog and the loader's pinning thread may call CUDA meanwhile
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.outputs = self.step(self.inputs)
