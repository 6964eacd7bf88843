"""What the trials of an experiment share, whatever their kind: config, data, the trained model, the way to report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mamba.config.schema import DataConfig, RunConfig
from mamba.data.images import ImageData
from mamba.data.registry import load_data
from mamba.errors import ForgeError
from mamba.runs.folder import finished_result
from mamba.runs.provenance import with_split
from mamba.train.distributed import Process
from ray_jobs.sweep.checks import data_identity

Report = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True)
class Shared:
    """What every trial of an experiment needs, put on each node once."""

    kind: str
    folder: Path
    config: dict[str, Any]
    """The experiment's config, as plain values."""
    checkpoint: Path | None
    """The trained model that measure trials cut."""
    threads: int
    """CPU threads of a trial."""
    workers: int
    """DDP workers of a training trial; 1: the trial trains by itself."""
    gpu: bool
    """Whether the cluster has GPUs."""
    compared: tuple[str, ...] = ()
    """The keys in which trials differ: TensorBoard's first columns."""
    objectives: tuple[str, ...] = ()
    """Metrics without which a trial has failed."""


class TrialProcess(Process):
    """Trains in the trial's own process and reports each epoch to Tune."""

    def __init__(self, device: torch.device, threads: int, report: Report) -> None:
        super().__init__(device=device)
        self.threads, self.report_to_tune = threads, report

    @property
    def cpus(self) -> int:
        return self.threads

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        self.report_to_tune(metrics)


def trial_config(shared: Shared, name: str, values: Mapping[str, Any]) -> RunConfig:
    """A trial's whole config; raises ForgeError where its values do not go together."""
    base = RunConfig(**shared.config)
    own = {"out": shared.folder.parent, "name": shared.folder.name, "trial": name}
    config = base.with_values({**values, **own}).resolve()
    if shared.kind != "measure":  # so that workers of its own, and who repeats it alone, validate on the same images
        config = with_split(config)
        if config.data.split_seed is None and config.data.split_from is None:
            config = config.with_values({"data.split_seed": base.seed})
    return config


def data_of(shared: Shared, config: RunConfig) -> ImageData:
    """The images that a trial's config asks for, loaded once a process. The validation split is the experiment's: of
    trials that differ in their seed all are validated on the same images."""
    config = with_split(config, shared.checkpoint)
    return _loaded(data_identity(config.data), RunConfig(**shared.config).seed)


@lru_cache(maxsize=2)
def _loaded(config: DataConfig, seed: int) -> ImageData:
    return load_data(config, seed)


def finished_run(folder: Path) -> dict[str, Any] | None:
    """What the training in a trial's folder left, if the trial was ended between it and its own result."""
    try:
        return finished_result(folder)
    except ForgeError:  # damaged: the trainer writes it again, from its last checkpoint
        return None
