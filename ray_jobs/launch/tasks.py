"""What the workers of a cluster do: task after task, until there are no more.

The driver (`ray_jobs.launch.workers`) puts the newest task, numbered, into the cluster's key-value store, every worker
takes it, and rank 0 puts back what came out.
"""

from __future__ import annotations

import os
import pickle
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mamba.config.schema import RunConfig
from mamba.data.registry import load_data
from mamba.errors import ForgeError
from mamba.runs.files import append, write_json
from mamba.runs.folder import LOG, stop_requested
from mamba.train.distributed import Process, own_device
from mamba.train.precision import resolve_amp
from mamba.train.trainer import fit
from pruning import measure as meter
from pruning.rounds import hooks_for
from pruning.store import load_smaller
from ray_jobs.launch.process import restored

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


class Drained(RuntimeError):
    """Ends a worker whose run has saved where it is, so that the group starts again on the machines that stay."""


class RayProcess(Process):
    """A Ray Train worker; the process group is Ray's."""

    def leaving(self) -> bool:
        """Of elastic runs, where Ray's watcher tells every worker of a node that is drained. Ray's public function for
        it is a barrier of all workers, which no step should wait for."""
        with suppress(ImportError, AttributeError):
            from ray.train.v2._internal.execution.context import get_train_context

            return get_train_context().preemption_context.preemption_info is not None
        return False

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
        result = fit(config, process, folder, hooks=hooks_for(config, process.rank, folder))
    except ForgeError as error:
        if process.world_size == 1 or error.every_rank:
            return {"error": str(error)}
        raise
    if result["status"] == "interrupted" and process.leaving() and not stop_requested(folder):
        where = f"epoch {result['epoch'] + 1}, after {result['step']} of its steps"
        if process.rank == 0:
            append(folder / LOG, f"a machine of this run is about to go away: saved in {where}\n")
        raise Drained(f"saved in {where}: a machine of this run is about to go away")
    return result


def measured(spec: dict[str, Any]) -> list[dict[str, float]]:
    """`ray_jobs.launch.measure.compare`, in this process, whose first GPU is used if it has one."""
    config = RunConfig(**spec["config"])
    device = own_device()
    amp = resolve_amp(config.optim.amp, device)
    models = [load_smaller(Path(path), device)[0].model for path in spec["paths"]]
    data = load_data(config.data, config.seed)
    batch_size = spec["batch_size"] or meter.usual_batch(device)
    rows = meter.speeds(models, batch_size, meter.SECONDS, amp)
    for model, row in zip(models, rows, strict=True):
        row |= meter.size(model)
        if data.val is None:
            row["test/accuracy"] = meter.accuracy(model, data, data.test, config.eval.batch_size, amp)
        else:
            row["val/accuracy"] = meter.accuracy(model, data, data.val, config.eval.batch_size, amp)
            row["val/images"] = float(len(data.val))
    return rows


KINDS: dict[str, Callable[[Process, dict[str, Any]], Any]] = {
    "train": train_task,
    "measure": lambda process, needs: measured(needs) if process.rank == 0 else None,
}
