"""Ray Train workers that serve one piece of work after another, so that a series of trainings starts them once.

A Ray Train run whose training function waits for tasks: the driver puts the newest one, numbered, into the cluster's
key-value store, every worker takes it, and rank 0 puts back what came out. Ray Train places the workers, sets up their
process group and restarts them where one dies; they then take the task that has no answer yet, whose run goes on from
its newest checkpoint.
"""

from __future__ import annotations

import os
import pickle
import platform
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mamba.config.schema import RunConfig
from mamba.errors import FolderError, ForgeError, TrainingError
from mamba.runs.files import read_json, write_json, write_text
from mamba.runs.folder import ERROR_LOG, stop_requested
from mamba.train.distributed import Process
from mamba.train.trainer import fit
from pruning.rounds import hooks_for
from ray_jobs.launch.process import restored
from ray_jobs.launch.waiting import Wait

ORPHANS_S = 30.0
"""How long the workers of a killed driver are waited for."""
LOOK_S = 0.05
"""Seconds between two looks for a task, or for its answer."""
Task = tuple[str, dict[str, Any]]
"""Its kind (KINDS) and what it needs."""


class Channel:
    """The newest task and the answers to tasks, in the key-value store of the cluster."""

    def __init__(self, name: str) -> None:
        self.name = name

    def put(self, number: int, task: Task | None) -> None:
        """Make this the newest task; None: there are no more."""
        self._put("task", (number, task))

    def newest(self) -> tuple[int, Task | None]:
        """Number 0 where there was none yet."""
        found = self._get("task")
        return (0, None) if found is None else found

    def answer(self, number: int, value: Any) -> None:
        self._put(f"answer-{number}", (value,))

    def answered(self, number: int) -> tuple[Any] | None:
        """The answer to a task, in a tuple; None: there is none yet."""
        found: tuple[Any] | None = self._get(f"answer-{number}")
        return found

    def after(self, number: int) -> tuple[int, Task | None]:
        """Wait for a task that is newer than `number`."""
        while True:
            found = self.newest()
            if found[0] > number:
                return found
            time.sleep(LOOK_S)

    def _put(self, key: str, value: Any) -> None:
        from ray.experimental import internal_kv

        internal_kv._internal_kv_put(f"{self.name}/{key}", pickle.dumps(value), overwrite=True)

    def _get(self, key: str) -> Any:
        from ray.experimental import internal_kv

        found = internal_kv._internal_kv_get(f"{self.name}/{key}")
        return None if found is None else pickle.loads(found)


class Workers:
    """A group of workers on the connected cluster, started by the first task; close it when there are no more.

    `storage`: a folder that all nodes see, for Ray's own files. `private`: the cluster is this process's own.
    """

    def __init__(
        self, count: int, gpu: bool, cpus: int, storage: Path, max_failures: int = 0, private: bool = False
    ) -> None:
        self.count, self.gpu, self.cpus, self.storage = count, gpu, cpus, storage
        self.max_failures, self.private = max_failures, private
        self.channel = Channel(f"mamba-forge/{uuid.uuid4().hex}")
        self.number = 0
        self.answers = 0  # given by the Ray Train run that goes on
        self.thread: threading.Thread | None = None
        self.outcome: dict[str, BaseException] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def train(self, config: RunConfig, folder: Path, announce: Callable[[str], None]) -> dict[str, Any]:
        """Train a resolved config in its run's folder, from its newest checkpoint if there is one; `announce` gets a
        line where something takes long.

        Raises:
            TrainingError: what ended it, in a sentence; the whole traceback is in error.log.
        """
        task = {"config": config.model_dump(mode="json"), "folder": str(folder)}
        before = time.time()
        waits = [
            Wait(f"{self._name()} to start", lambda: not _started(folder, self.count, before)),
            Wait("the workers to save a checkpoint and end", lambda: stop_requested(folder)),
        ]
        result: dict[str, Any] = self._call(("train", task), folder, waits, announce)
        if "error" in result:
            raise TrainingError(result["error"])
        return result

    def measure(self, spec: dict[str, Any], announce: Callable[[str], None]) -> list[dict[str, float]]:
        """`ray_jobs.launch.measure.compare`, by rank 0 on its device."""
        began = time.monotonic()
        wait = Wait("the speed of the models", lambda: time.monotonic() > began)
        rows: list[dict[str, float]] = self._call(("measure", spec), self.storage.parent, [wait], announce)
        return rows

    def close(self) -> None:
        """Let the workers end; those of a private cluster end with it."""
        if self.thread is not None and self.thread.is_alive():
            with suppress(Exception):  # Ray has ended already
                self.channel.put(self.number + 1, None)
            if not self.private:
                self.thread.join()
        self.thread = None

    def _name(self) -> str:
        return f"{self.count} worker{'s'[: self.count > 1]}"

    def _call(self, task: Task, folder: Path, waits: list[Wait], announce: Callable[[str], None]) -> Any:
        self.number += 1
        self.channel.put(self.number, task)
        while True:
            if self.thread is None:
                self._start()
            assert self.thread is not None
            while (answer := self.channel.answered(self.number)) is None and self.thread.is_alive():
                self.thread.join(LOOK_S)
                for wait in waits:
                    wait.look(announce)
            if answer is None:  # it may have come just before the end
                answer = self.channel.answered(self.number)
            if answer is not None:
                self.answers += 1
                return answer[0]
            self.thread = None
            if self.answers == 0:
                raise _sentence(self.outcome.get("error", RuntimeError("the workers ended")), folder) from None
            self.answers = 0  # what failed before was another task's: this one has its own tries

    def _start(self) -> None:
        # Ray Train takes over Ctrl-C when it runs in the main thread, and would abort without a checkpoint
        self.outcome.clear()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        import ray.train

        from ray_jobs.launch.lean import trainer_class

        try:
            trainer_class(self.private)(
                serve,
                train_loop_config={"channel": self.channel.name},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=self.count,
                    use_gpu=self.gpu,
                    resources_per_worker={"CPU": self.cpus, **({"GPU": 1} if self.gpu else {})},
                ),
                run_config=ray.train.RunConfig(
                    # Ray would resume a run of the same name by itself; our own checkpoints decide that
                    name=f"{self.storage.parent.parent.name}-{self.storage.parent.name}-{time.time_ns()}",
                    storage_path=str(self.storage),
                    failure_config=ray.train.FailureConfig(max_failures=self.max_failures),
                ),
            ).fit()
        except BaseException as error:
            self.outcome["error"] = error


class RayProcess(Process):
    """A Ray Train worker; the process group is Ray's."""

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        import ray.train

        ray.train.report(dict(metrics))


def serve(spec: dict[str, Any]) -> None:
    """What each worker runs: task after task, until there are no more. A task ends with the random states, settings and
    memory with which it began."""
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    device = get_device()
    assert not isinstance(device, list)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels are launched on the current device
    process = RayProcess(context.get_world_rank(), context.get_world_size(), context.get_local_world_size(), device)
    serve_tasks(Channel(spec["channel"]), process)


def serve_tasks(channel: Channel, process: Process) -> None:
    """`serve`, once the process is known. What has an answer is not done again: a worker group that was restarted finds
    the newest task, which has none unless the group died at its end."""
    done = 0
    while True:
        number, task = channel.after(done)
        if task is None:
            return
        if channel.answered(number) is None:
            kind, needs = task
            with restored(torch.get_num_threads()):
                value = KINDS[kind](process, needs)
            if process.rank == 0:
                channel.answer(number, value)
        done = number


def train_task(process: Process, needs: dict[str, Any]) -> dict[str, Any]:
    """Errors that all ranks raise together come back as a value, so that Ray does not restart what would only fail
    again; others end the worker, and the whole group with it."""
    folder = Path(needs["folder"])
    about = {"pid": os.getpid(), "host": platform.node(), "device": str(process.device)}
    (folder / ".ray").mkdir(exist_ok=True)
    write_json(folder / ".ray" / f"worker-{process.rank}.json", about)
    try:
        config = RunConfig(**needs["config"])
        return fit(config, process, folder, hooks=hooks_for(config, process.rank, folder))
    except ForgeError as error:
        if process.world_size == 1 or error.every_rank:
            return {"error": str(error)}
        raise


def _measure_task(process: Process, needs: dict[str, Any]) -> list[dict[str, float]] | None:
    from ray_jobs.launch.measure import measured

    return measured(needs) if process.rank == 0 else None


KINDS: dict[str, Callable[[Process, dict[str, Any]], Any]] = {"train": train_task, "measure": _measure_task}


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
