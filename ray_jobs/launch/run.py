"""One training run: in this process, or under Ray Train with one worker per GPU."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mamba.config.schema import RunConfig
from mamba.data.loader import check_batch_size
from mamba.data.registry import load_data
from mamba.errors import FolderError, ForgeError, TrainingError
from mamba.runs.files import read_json, write_json, write_text
from mamba.runs.folder import ERROR_LOG, stop_requested
from mamba.runs.provenance import check_data, with_split
from mamba.runs.start import check_start, start_of
from mamba.runs.tracking import write_hparams
from mamba.train.distributed import Process, local_process
from mamba.train.trainer import fit
from pruning.rounds import hooks_for
from ray_jobs.launch.waiting import Wait

ORPHANS_S = 30.0
"""How long the workers of a killed driver are waited for."""


def preflight(config: RunConfig, folder: Path | None = None) -> None:
    """Find what is wrong before anything is started or written; downloads or decodes the data set once. `folder` is
    that of a run that goes on, which needs nothing of the place where it started from.

    Raises:
        ForgeError: with a sentence for the user.
    """
    check_early(config)
    own = config.model
    start = own.checkpoint if folder is None else start_of(config, folder)
    data = load_data(with_split(config, start).data, config.seed)
    check_batch_size(len(data.train), config.data)
    for remark in data.remarks():
        print(f"data: {remark}", file=sys.stderr)
    classes, side = len(data.classes), data.side
    if start is not None:
        check_start(start, classes, side, "model.checkpoint", own.new_head, own.new_size)
        _say(check_data(start, data, new_head=own.new_head))
    if config.distill.teacher is not None:
        check_start(config.distill.teacher, classes, side, "distill.teacher")
        _say(check_data(config.distill.teacher, data, "distill.teacher"))


def _say(note: str | None) -> None:
    if note:
        print(f"data: {note}", file=sys.stderr)


def check_early(config: RunConfig) -> None:
    """What can be said without the data and without the cluster; raises ConfigError."""
    workers = config.scaling.num_workers
    config.check_workers(workers or 1, gpu=workers != 0 or torch.cuda.is_available())


def run(config: RunConfig, folder: Path, announce: Callable[[str], None]) -> dict[str, Any]:
    """Train a resolved config in its run's folder, from its newest checkpoint if there is one.

    `announce` gets a line about where the run goes. Returns the result (see `mamba.train.trainer.fit`). Signals are the
    caller's: `mamba.runs.folder.request_stop` ends the run in order.

    Raises:
        ForgeError: with a sentence for the user; before workers start where the cluster is too small.
    """
    await_orphans(folder)
    try:
        result = _run(config, folder, announce)
    except ForgeError:
        with suppress(ForgeError, OSError):  # of a full disk the first sentence counts
            if any(folder.glob("events*")):  # it began
                write_hparams(folder, config, "failed")
        raise
    if result["status"] == "interrupted":
        write_hparams(folder, config, "interrupted")
    return result


def _run(config: RunConfig, folder: Path, announce: Callable[[str], None]) -> dict[str, Any]:
    workers = config.scaling.num_workers
    if workers == 0:
        process = local_process()
        announce(f"training in this process on {process.device}")
        return fit(config, process, folder, hooks=hooks_for(config, folder=folder))

    from ray_jobs.launch.cluster import connected

    with connected(announce) as cluster:
        gpu = cluster.gpus > 0
        workers = workers or max(1, cluster.gpus)
        config.check_workers(workers, gpu)
        if gpu and workers > cluster.gpus:
            raise TrainingError(
                f"scaling.num_workers {workers} needs {workers} GPUs and the cluster has {cluster.gpus}; "
                f"valid: 0 to {cluster.gpus}"
            )
        cpus = config.scaling.cpus_per_worker or max(1, cluster.cpus // workers)
        if cpus * workers > cluster.cpus:
            raise TrainingError(
                f"{workers} workers with {cpus} CPUs each need {cpus * workers} CPUs and the cluster has "
                f"{cluster.cpus}; lower scaling.num_workers or scaling.cpus_per_worker"
            )
        kind = "GPU" if gpu else f"x {cpus} CPU"
        announce(f"training on {cluster.where}: {workers} worker{'s'[: workers > 1]} ({kind})")
        return train_with_workers(config, folder, workers, gpu, cpus, announce)


def _silent(text: str) -> None:
    pass


def train_with_workers(
    config: RunConfig, folder: Path, workers: int, gpu: bool, cpus: int, announce: Callable[[str], None] = _silent
) -> dict[str, Any]:
    """A Ray Train run of several workers, on the cluster that this process is connected to; `announce` gets a line
    where something takes long.

    Raises:
        TrainingError: what ended it, in a sentence; the whole traceback is in error.log.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"config": config.model_dump(mode="json"), "folder": str(folder)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": cpus, **({"GPU": 1} if gpu else {})}
        ),
        run_config=ray.train.RunConfig(
            # Ray would resume a run of the same name by itself; our own checkpoints decide that
            name=f"attempt-{time.time_ns()}",
            storage_path=str(folder / ".ray"),
            failure_config=ray.train.FailureConfig(max_failures=config.scaling.max_failures),
        ),
    )
    outcome: dict[str, Any] = {}

    def fit_trainer() -> None:
        try:
            outcome["result"] = trainer.fit().return_value
        except BaseException as error:
            outcome["error"] = error

    # Ray Train takes over Ctrl-C when it runs in the main thread, and would abort without a checkpoint
    before = time.time()
    thread = threading.Thread(target=fit_trainer, daemon=True)
    thread.start()
    waits = [
        Wait(f"{workers} worker{'s'[: workers > 1]} to start", lambda: not _started(folder, workers, before)),
        Wait("the workers to save a checkpoint and end", lambda: stop_requested(folder)),
    ]
    while thread.is_alive():
        thread.join(timeout=0.2)
        for wait in waits:
            wait.look(announce)
    if "error" in outcome:
        raise _sentence(outcome["error"], folder) from None
    result = outcome["result"]
    if "error" in result:
        raise TrainingError(result["error"])
    return result


class RayProcess(Process):
    """A Ray Train worker; the process group is Ray's."""

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        import ray.train

        ray.train.report(dict(metrics))


def train_loop(spec: dict[str, Any]) -> dict[str, Any]:
    """What each Ray worker runs. Errors that all ranks raise together come back as a value, so that Ray does not
    restart what would only fail again; others end the worker, and the whole group with it."""
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    device = get_device()
    assert not isinstance(device, list)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels are launched on the current device
    folder = Path(spec["folder"])
    process = RayProcess(context.get_world_rank(), context.get_world_size(), context.get_local_world_size(), device)
    about = {"pid": os.getpid(), "host": platform.node(), "device": str(device)}
    write_json(folder / ".ray" / f"worker-{process.rank}.json", about)
    try:
        config = RunConfig(**spec["config"])
        return fit(config, process, folder, hooks=hooks_for(config, process.rank, folder))
    except ForgeError as error:
        if process.world_size == 1 or error.every_rank:
            return {"error": str(error)}
        raise


def await_orphans(folder: Path) -> None:
    """Wait until the workers of a driver that was killed are gone: for some seconds they train on, and write.

    Raises:
        TrainingError: one still runs on this machine after ORPHANS_S seconds.
    """
    ends = time.monotonic() + ORPHANS_S
    for file in (folder / ".ray").glob("worker-*.json"):
        about = worker_in(file)
        command = Path(f"/proc/{about.get('pid')}/cmdline")
        while about.get("host") == platform.node() and _is_ray_worker(command):
            if time.monotonic() > ends:
                raise TrainingError(f"process {about['pid']} still trains in {folder}; stop it, then resume")
            time.sleep(0.1)


def worker_in(file: Path) -> dict[str, Any]:
    """Process, host and device of a worker, as it wrote them; empty where the file is gone or damaged."""
    try:
        return read_json(file)
    except (FileNotFoundError, FolderError):
        return {}


def _started(folder: Path, workers: int, since: float) -> bool:
    """Whether all workers of an attempt that began at that time have said who they are."""
    files = [folder / ".ray" / f"worker-{rank}.json" for rank in range(workers)]
    with suppress(OSError):
        return all(file.stat().st_mtime >= since - 1 for file in files)
    return False


def _is_ray_worker(command: Path) -> bool:
    try:
        return b"ray::" in command.read_bytes()
    except OSError:  # gone, or not a system with /proc
        return False


def _sentence(error: BaseException, folder: Path) -> ForgeError:
    """One sentence for what ended a Ray Train run; the whole traceback goes to a file."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    log = folder / ERROR_LOG
    with suppress(FolderError):  # of a full disk what ended the run is said all the same
        write_text(log, "\n\n".join(f"rank {rank}:\n{failure}" for rank, failure in failures.items()))
    rank, first = next(iter(failures.items()))
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    cause = lines[-1] if lines else type(first).__name__
    return TrainingError(f"worker {rank} failed: {cause} (full traceback: {log})")
