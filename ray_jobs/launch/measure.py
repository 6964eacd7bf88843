"""Measuring a checkpoint: its size, its speed and its validation accuracy, here or on a GPU of the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mamba.config.schema import RunConfig
from ray_jobs.launch.cluster import on_one_gpu
from ray_jobs.launch.tasks import measured
from ray_jobs.launch.workers import Workers


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

        gpu = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
        return on_one_gpu(gpu, measured, spec)
    return measured(spec)
