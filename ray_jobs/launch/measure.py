"""Measuring a checkpoint: its size, its speed and its validation accuracy, here or on a GPU of the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamba.config.schema import RunConfig
from mamba.data.registry import load_data
from mamba.train.distributed import own_device
from mamba.train.trainer import resolve_amp
from pruning import measure as meter
from pruning.store import load_smaller
from ray_jobs.launch.workers import Workers

SECONDS = 0.5
"""How long latency and throughput are timed, each."""


def measure(
    config: RunConfig, path: Path, batch_size: int | None = None, workers: Workers | None = None
) -> dict[str, float]:
    """Metrics of a checkpoint's best model, the units that its masks take whole removed: model/*, bench/*,
    val/accuracy; test/accuracy only where there is no validation split, so that nothing is chosen by it. On a GPU of
    the connected cluster where it has one, else in this process.

    Args:
        config: says where the data is, and the precision.
        path: a checkpoint or a run's folder.
        batch_size: of the throughput; None: 1024 on a GPU, 128 on a CPU.
        workers: those that hold the cluster's GPUs, which do it then.
    """
    return compare(config, [path], batch_size, workers)[0]


def compare(
    config: RunConfig, paths: Sequence[Path], batch_size: int | None = None, workers: Workers | None = None
) -> list[dict[str, float]]:
    """`measure` of several checkpoints, their speeds comparable."""
    spec = {"config": config.model_dump(mode="json"), "paths": [str(p) for p in paths], "batch_size": batch_size}
    if workers is not None and workers.gpu:
        return workers.measure(spec, print)
    if config.scaling.num_workers != 0:
        import ray

        if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0:
            return ray.get(ray.remote(num_gpus=1)(measured).remote(spec))
    return measured(spec)


def measured(spec: dict[str, Any]) -> list[dict[str, float]]:
    """`compare`, in this process, whose first GPU is used if it has one."""
    config = RunConfig(**spec["config"])
    device = own_device()
    amp = resolve_amp(config.optim.amp, device)
    models = [load_smaller(Path(path), device)[0].model for path in spec["paths"]]
    data = load_data(config.data, config.seed)
    batch_size = spec["batch_size"] or meter.usual_batch(device)
    rows = meter.speeds(models, batch_size, SECONDS, amp)
    for model, row in zip(models, rows, strict=True):
        row |= meter.size(model)
        if data.val is None:
            row["test/accuracy"] = meter.accuracy(model, data, data.test, config.eval.batch_size, amp)
        else:
            row["val/accuracy"] = meter.accuracy(model, data, data.val, config.eval.batch_size, amp)
            row["val/images"] = float(len(data.val))
    return rows
