"""Ray Train workers that serve one piece of work after another, so that a series of trainings starts them once.

A Ray Train run whose training function waits for tasks: the driver puts the newest one, numbered, into the cluster's
key-value store, every worker takes it, and rank 0 puts back what came out. Ray Train places the workers, sets up their
process group and restarts them where one dies; they then take the task that has no answer yet, whose run goes on from
its newest checkpoint.
"""

from __future__ import annotations

import platform
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mamba.config.schema import RunConfig
from mamba.errors import FolderError, ForgeError, TrainingError
from mamba.runs.files import read_json, write_text
from mamba.runs.folder import ERROR_LOG, stop_requested
from ray_jobs.launch.tasks import LOOK_S, Channel, Task, serve
from ray_jobs.launch.waiting import Wait

ORPHANS_S = 30.0
"""How long the workers of a killed driver are waited for."""


class Workers:
    """A group of workers on the connected cluster, started by the first task; close it when there are no more.

    `storage`: a folder that all nodes see, for Ray's own files. `private`: the cluster is this process's own. `counts`:
    the numbers of workers that are good enough, least first, where not only `count` is.
    """

    def __init__(
        self,
        count: int,
        gpu: bool,
        cpus: int,
        storage: Path,
        max_failures: int = 0,
        private: bool = False,
        counts: Sequence[int] = (),
    ) -> None:
        self.counts = tuple(counts) or (count,)
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
            Wait(f"{self._name()} to start", lambda: not _started(folder, self.counts[0], before)),
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

        from ray_jobs.launch.elastic import elastic_trainer
        from ray_jobs.launch.lean import trainer_class

        elastic = len(self.counts) > 1
        try:
            trainer = elastic_trainer(self.counts) if elastic else trainer_class(self.private)
            trainer(
                serve,
                train_loop_config={"channel": self.channel.name},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=(self.counts[0], self.counts[-1]) if elastic else self.count,
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
