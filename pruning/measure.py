"""What a model costs and what it scores: parameters, MACs, sparsity, latency, throughput, peak memory, accuracy.

Keys are those of a run's metrics. Nothing is estimated: what cannot be measured here (peak memory on a CPU) is absent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from mamba.data.images import ImageData, ImageSet
from mamba.models.model import MambaModel, count_parameters
from mamba.train.distributed import Process
from mamba.train.evaluate import evaluate
from pruning.masks import check_sparsity_mamba

TURNS = 5
"""Of models whose speeds are compared on a CPU."""


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

    On a GPU both replay a CUDA graph, so that what is timed is the GPU's work and not Python's, and
    `bench/peak_memory_mib` is the most that a forward pass of the batch held, its weights and images included.

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
        taken = _median_seconds(forward(images), seconds, device)
        results[key] = 1000 * taken if count == 1 else count / taken
    return results


def speeds(
    models: Sequence[MambaModel], batch_size: int = 1024, seconds: float = 1.0, amp: torch.dtype | None = None
) -> list[dict[str, float]]:
    """`speed` of models that are to be compared. On a CPU they take `TURNS` turns and medians are returned, so that
    what else the machine does hits all alike; a GPU that nothing else uses needs no turns."""
    turns = TURNS if models[0].head.weight.device.type == "cpu" else 1
    found = [[speed(model, batch_size, seconds / turns, amp) for model in models] for _ in range(turns)]
    return [{key: median(row[key] for row in of_model) for key in of_model[0]} for of_model in zip(*found, strict=True)]


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
