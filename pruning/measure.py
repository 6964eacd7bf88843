"""What a model costs and what it scores: parameters, MACs, sparsity, latency, throughput, peak memory, accuracy.

Keys are those of a run's metrics. Nothing is estimated: what cannot be measured here (peak memory on a CPU of a system
that does not say it) is absent.
"""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mamba.data.images import ImageData, ImageSet
from mamba.models.model import MambaModel, count_parameters
from mamba.train.distributed import Process
from mamba.train.evaluate import evaluate
from pruning.masks import check_sparsity_mamba

TURNS = 5
"""In which speeds that are to be compared are taken."""
SECONDS = 0.5
"""How long latency and throughput are timed, each, wherever models are compared."""
TIMED = ("bench/latency_ms", "bench/images_per_s")


def size(model: MambaModel) -> dict[str, float]:
    """`model/params`, of them `model/nonzero`, `model/macs` of one image, `model/sparsity` in percent."""
    return {
        "model/params": float(count_parameters(model)),
        "model/nonzero": float(sum(int((p != 0).sum()) for p in model.parameters())),
        "model/macs": float(model.architecture.macs()),
        "model/sparsity": check_sparsity_mamba(model)["total"],
    }


def accuracy(
    model: MambaModel, data: ImageData, split: ImageSet, batch_size: int = 512, amp: torch.dtype | None = None
) -> float:
    """Percent of a split that the model classifies rightly, on the model's device; NaN where its outputs are."""
    return evaluate(model, data, split, Process(device=model.head.weight.device), batch_size, amp).accuracy


def usual_batch(device: torch.device) -> int:
    """Images of a throughput's batch unless told otherwise: 1024 on a GPU, 128 on a CPU."""
    return 1024 if device.type == "cuda" else 128


@torch.no_grad()
def speed(
    model: MambaModel, batch_size: int = 1024, seconds: float = 1.0, amp: torch.dtype | None = None
) -> dict[str, float]:
    """Inference speed on the model's device: `bench/latency_ms` of one image, `bench/images_per_s` of a batch.

    On a GPU both replay a CUDA graph, so that what is timed is the GPU's work and not Python's.
    `bench/peak_memory_mib` is the most that a forward pass of the batch held, its weights and images included; on a CPU
    from the highest resident memory of this process (Linux), to some MiB: it holds pages, not tensors.

    Args:
        model: put in eval mode.
        batch_size: images of the throughput's batch.
        seconds: how long each of the two is timed, after a warm-up; medians are returned.
        amp: autocast type, or None.
    """
    device, a = model.head.weight.device, model.architecture
    model.eval()

    def forward(images: Tensor) -> Callable[[], object]:
        def step() -> object:
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                return model(images)

        return step

    results: dict[str, float] = {}
    for key, count in (("bench/latency_ms", 1), ("bench/images_per_s", batch_size)):
        images = torch.randn(count, a.in_chans, a.img_size, a.img_size, device=device)
        if device.type == "cuda" and count > 1:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            others = torch.cuda.memory_allocated(device) - _bytes(model) - images.nbytes
            forward(images)()
            torch.cuda.synchronize(device)
            results["bench/peak_memory_mib"] = (torch.cuda.max_memory_allocated(device) - others) / 2**20
        elif device.type == "cpu" and count > 1:
            more = resident_peak(forward(images))
            if more is not None:
                results["bench/peak_memory_mib"] = (_bytes(model) + images.nbytes + more) / 2**20
        taken = _median_seconds(forward(images), seconds, device)
        results[key] = 1000 * taken if count == 1 else count / taken
    return results


def speeds(
    models: Sequence[MambaModel],
    batch_size: int = 1024,
    seconds: float = 1.0,
    amp: torch.dtype | None = None,
    device: torch.device | None = None,
) -> list[dict[str, float]]:
    """`speed` of models that are to be compared, taken in `TURNS` turns so that what else the machine does hits all
    alike: of each key the median over turns, of TIMED ones also the range, as `KEY_low` and `KEY_high`.

    Args:
        models: on any device; each is on `device` for its turn alone.
        batch_size: as in `speed`.
        seconds: of all turns of a model together.
        amp: as in `speed`.
        device: where they are timed; None: where each is.
    """
    found: list[list[dict[str, float]]] = [[] for _ in models]
    for _ in range(TURNS):
        for model, turns in zip(models, found, strict=True):
            home = model.head.weight.device
            turns.append(speed(model.to(device or home), batch_size, seconds / TURNS, amp))
            model.to(home)
    return [_over_turns(turns) for turns in found]


def _over_turns(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    result = {key: median(turn[key] for turn in turns) for key in turns[0]}
    for key in TIMED:
        values = [turn[key] for turn in turns]
        result |= {f"{key}_low": min(values), f"{key}_high": max(values)}
    return result


@dataclass(frozen=True)
class Ratio:
    """One measurement over another: of medians, and between the far ends of their ranges where those are known."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def within_noise(self) -> bool:
        """Whether the two ranges overlap: the turns do not tell which is more."""
        return self.low is not None and self.high is not None and self.low <= 1 <= self.high

    @property
    def note(self) -> str:
        """What is said behind the value."""
        if self.low is None or self.high is None:
            return ""
        return ", within the noise" if self.within_noise else f" ({self.low:.2f} to {self.high:.2f})"


def ratio(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> Ratio | None:
    """A metric of one model over that of another; None where one of the two is missing or 0."""

    def known(metrics: Mapping[str, Any], name: str) -> float:
        value = metrics.get(name)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0

    over, under = known(after, key), known(before, key)
    if not over or not under:
        return None
    ends = [known(metrics, f"{key}_{end}") for metrics in (after, before) for end in ("low", "high")]
    return Ratio(over / under, ends[0] / ends[3], ends[1] / ends[2]) if all(ends) else Ratio(over / under)


def resident_peak(step: Callable[[], object]) -> int | None:
    """Bytes by which a step raises this process's resident memory at its highest, after one that warms it up; None
    where the system does not say it (Linux does)."""
    step()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of earlier steps would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
        before = _status("VmRSS")
        step()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, ValueError):
        return None


def _status(key: str) -> int:
    """A figure of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return 1024 * int(value.split()[0])
    raise ValueError(key)


def _bytes(model: MambaModel) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _median_seconds(step: Callable[[], object], seconds: float, device: torch.device) -> float:
    gpu = device.type == "cuda"
    if gpu:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        step = graph.replay
    for _ in range(2):
        step()
    times: list[float] = []
    ends = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < ends:
        if gpu:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return median(times)
