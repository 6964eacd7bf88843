"""One training run: in this process, or under Ray Train with one worker per GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from mamba.config.schema import RunConfig
from mamba.data.loader import check_batch_size
from mamba.data.registry import load_data
from mamba.errors import ForgeError, TrainingError
from mamba.runs.checkpoint import newest_checkpoint
from mamba.runs.hparams import write_hparams
from mamba.runs.provenance import check_resume, with_split
from mamba.runs.start import check_models, start_of
from mamba.train.distributed import local_process
from mamba.train.trainer import fit
from pruning.rounds import hooks_for
from ray_jobs.launch.elastic import possible_counts
from ray_jobs.launch.workers import Workers, await_orphans


def preflight(config: RunConfig, folder: Path | None = None) -> None:
    """Find what is wrong before anything is started or written; downloads or decodes the data set once. `folder` is
    that of a run that goes on, which needs nothing of the place where it started from.

    Raises:
        ForgeError: with a sentence for the user.
    """
    check_early(config)
    start = config.model.checkpoint if folder is None else start_of(config, folder)
    data = load_data(with_split(config, start).data, config.seed)
    newest = None if folder is None else newest_checkpoint(folder)
    if newest is not None:  # before anything of the run is changed
        check_resume(newest, data)
    check_batch_size(len(data.train), config.data)
    for remark in [*data.remarks(), *check_models(config, data, start)]:
        print(f"data: {remark}", file=sys.stderr)


def check_early(config: RunConfig) -> None:
    """What can be said without the data and without the cluster; raises ConfigError."""
    workers = config.scaling.num_workers
    gpu = workers != 0 or torch.cuda.is_available()
    if workers:
        possible_counts(config, workers, gpu)
    config.check_workers(workers or 1, gpu)


def run(
    config: RunConfig, folder: Path, announce: Callable[[str], None], workers: Workers | None = None
) -> dict[str, Any]:
    """Train a resolved config in its run's folder, from its newest checkpoint if there is one.

    `announce` gets a line about where the run goes. `workers`: those that a series keeps; else the run has its own.
    Returns the result (see `mamba.train.trainer.fit`). Signals are the caller's: `mamba.runs.folder.request_stop` ends
    the run in order.

    Raises:
        ForgeError: with a sentence for the user; before workers start where the cluster is too small.
    """
    await_orphans(folder)
    try:
        result = _run(config, folder, announce, workers)
    except ForgeError:
        with suppress(ForgeError, OSError):  # of a full disk the first sentence counts
            if any(folder.glob("events*")):  # it began
                write_hparams(folder, config, "failed")
        raise
    if result["status"] == "interrupted":
        write_hparams(folder, config, "interrupted")
    return result


def _run(config: RunConfig, folder: Path, announce: Callable[[str], None], workers: Workers | None) -> dict[str, Any]:
    if workers is not None:
        return workers.train(config, folder, announce)
    with workers_for(config, folder, announce) as own:
        if own is not None:
            return own.train(config, folder, announce)
    process = local_process()
    announce(f"training in this process on {process.device}")
    return fit(config, process, folder, hooks=hooks_for(config, folder=folder))


@contextmanager
def workers_for(config: RunConfig, folder: Path, announce: Callable[[str], None]) -> Iterator[Workers | None]:
    """The workers that a config asks for, for the length of a block, on the cluster; None where it asks for none, so
    that this process trains. Ray's own files go to `.ray` in the folder; `announce` gets a line about where it goes.

    Raises:
        ConfigError, TrainingError: before workers start where the cluster is too small.
    """
    if config.scaling.num_workers == 0:
        yield None
        return

    from ray_jobs.launch.cluster import connected

    with connected(announce) as cluster:
        gpu = cluster.gpus > 0
        workers = config.scaling.num_workers or max(1, cluster.gpus)
        counts = possible_counts(config, workers, gpu)
        if gpu and counts[0] > cluster.gpus:
            key = "num_workers" if len(counts) == 1 else "min_workers"
            raise TrainingError(
                f"scaling.{key} {counts[0]} needs {counts[0]} GPUs and the cluster has {cluster.gpus}; "
                f"valid: 0 to {cluster.gpus}"
            )
        cpus = config.scaling.cpus_per_worker or max(1, cluster.cpus // workers)
        if cpus * counts[0] > cluster.cpus:
            raise TrainingError(
                f"{counts[0]} workers with {cpus} CPUs each need {cpus * counts[0]} CPUs and the cluster has "
                f"{cluster.cpus}; lower scaling.num_workers or scaling.cpus_per_worker"
            )
        kind = "GPU" if gpu else f"x {cpus} CPU"
        fewer = f", or {' or '.join(map(str, reversed(counts[:-1])))} where nodes are lost" if len(counts) > 1 else ""
        announce(f"training on {cluster.where}: {workers} worker{'s'[: workers > 1]} ({kind}){fewer}")
        failures = config.scaling.max_failures
        with Workers(workers, gpu, cpus, folder / ".ray", failures, cluster.private, counts) as group:
            yield group


def train_with_workers(config: RunConfig, folder: Path, workers: int, gpu: bool, cpus: int) -> dict[str, Any]:
    """A training by several workers of its own, on the cluster that this process is connected to.

    Raises:
        TrainingError: what ended it, in a sentence; the whole traceback is in error.log.
    """
    with Workers(workers, gpu, cpus, folder / ".ray", config.scaling.max_failures) as group:
        return group.train(config, folder, lambda line: None)  # a trial's line tells how it goes
