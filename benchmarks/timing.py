"""How a number is taken: medians with their range, CUDA graphs, the most memory that a pass takes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Row = dict[str, Any]
GROUPS = 5
"""Into which the calls of a measurement fall; their medians make its range."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    call: Callable[[], object],
    device: torch.device,
    seconds: float,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of each call by the clock, at least three of them, for about so many seconds."""
    for _ in range(warm_up):
        call()
    times: list[float] = []
    ends = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < ends:
        synchronize(device)
        began = clock()
        call()
        synchronize(device)
        times.append(clock() - began)
    return times


def with_range(key: str, times: list[float], scale: Callable[[float], float]) -> Row:
    """`key`, the median of all calls, and the range of the medians of `GROUPS` parts of them, as `key_low` and
    `key_high`; each time goes through `scale`."""
    size = max(1, len(times) // GROUPS)
    parts = [statistics.median(times[i : i + size]) for i in range(0, len(times), size)]
    values = [scale(part) for part in parts]
    return {key: scale(statistics.median(times)), f"{key}_low": min(values), f"{key}_high": max(values)}


def replayed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On a GPU the replay of a CUDA graph of the call, so that what is timed is not Python; else the call."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """What a call takes beyond what was there before it, in MiB; None on a CPU, which does not count it."""
    if device.type != "cuda":
        return None
    call()  # the first one also sets up libraries
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def fitting(measure: Callable[[int], Row], batch: int, key: str) -> Row:
    """`measure` of the largest of batch, batch / 2, ... that fits into memory; `key` says that where none does."""
    while batch >= 1:
        try:
            return measure(batch)
        except torch.OutOfMemoryError:
            batch //= 2
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return {key: "out of memory"}


def forward(model: nn.Module, images: Tensor) -> Tensor:
    """bf16 on a GPU, float32 on a CPU."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.is_cuda):
        return model(images).float()
