"""Measuring a checkpoint: its size, its speed and its test accuracy, here or on a GPU of the cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mamba.config import RunConfig
from mamba.data import load_data
from mamba.trainer import resolve_amp
from mamba.worker import own_device
from pruning import measure as meter
from pruning.store import load_smaller

SECONDS = 0.5
"""How long latency and throughput are timed, each."""


def measure(config: RunConfig, path: Path, batch_size: int | None = None) -> dict[str, float]:
    """Metrics of a checkpoint's best model, the units that its masks take whole removed: model/*, bench/*,
    val/accuracy (where there is a split), test/accuracy. On a GPU of the connected cluster where it has one, else in
    this process.

    Args:
        config: says where the data is, and the precision.
        path: a checkpoint or a run's folder.
        batch_size: of the throughput; None: 1024 on a GPU, 128 on a CPU.
    """
    spec = {"config": config.model_dump(mode="json"), "path": str(path), "batch_size": batch_size}
    if config.scaling.num_workers != 0:
        import ray

        if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0:
            return ray.get(ray.remote(num_gpus=1)(_measure).remote(spec))
    return _measure(spec)


def _measure(spec: dict[str, Any]) -> dict[str, float]:
    config, path = RunConfig(**spec["config"]), Path(spec["path"])
    device = own_device()
    amp = resolve_amp(config.optim.amp, device)
    model = load_smaller(path, device)[0].model
    data = load_data(config.data, config.seed)
    evaluated_at = config.eval.batch_size
    batch_size = spec["batch_size"] or meter.usual_batch(device)
    val: dict[str, float] = {}
    if data.val is not None:
        val["val/accuracy"] = meter.accuracy(model, data, data.val, evaluated_at, amp)
        val["val/images"] = float(len(data.val))
    return {
        **val,
        **meter.size(model),
        **meter.speed(model, batch_size, SECONDS, amp),
        "test/accuracy": meter.accuracy(model, data, data.test, evaluated_at, amp),
    }
