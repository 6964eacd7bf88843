"""Weights & Biases and MLflow. A run's id there is kept in its folder, so that a resumed run goes on under the same.

What goes wrong at the start is the user's to mend (no login); what goes wrong later (no network) ends the tracking with
one line, and training goes on: its own folder has everything.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from mamba.config.schema import RunConfig
from mamba.errors import ConfigError, FolderError
from mamba.runs.backends import Backend
from mamba.runs.files import read_json, write_json

IDS = "tracking.json"
"""In a run's folder: backend -> the run's id there."""
PROJECT = "mamba-forge"
LONGEST = 6000
"""Characters of a parameter's value that MLflow takes."""


def remote_id(folder: Path, name: str) -> str | None:
    """The run's id at a backend; None where it has none."""
    try:
        value = read_json(folder / IDS).get(name)
    except (FileNotFoundError, FolderError):
        return None
    return value if isinstance(value, str) else None


def keep_id(folder: Path, name: str, value: str) -> None:
    known: dict[str, Any] = {}
    with suppress(FileNotFoundError, FolderError):
        known = read_json(folder / IDS)
    write_json(folder / IDS, {**known, name: value})


class Remote(Backend):
    """A backend that may fail without ending the run."""

    name = ""

    def __init__(self, folder: Path, config: RunConfig, steps_done: int) -> None:
        super().__init__(folder, config, steps_done)
        self.lost = False
        self.project = config.tracking.project or PROJECT
        self.title = f"{config.name}/{config.trial or folder.name}"
        try:
            self.start()
        except Exception as error:
            words = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"tracking.backends: {self.name} does not start ({words[:300]}); log in to it, set tracking.offline "
                "True, or leave it out"
            ) from error

    def start(self) -> None:
        raise NotImplementedError

    @contextmanager
    def told(self) -> Iterator[None]:
        """Says once what went wrong, and nothing more is told."""
        try:
            yield
        except Exception as error:
            self.lost = True
            words = " ".join(str(error).split())[:300] or type(error).__name__
            print(f"tracking: {self.name} stopped ({words}); the run goes on, and its folder has everything",
                  file=sys.stderr)  # fmt: skip

    def tell(self, work: Callable[[], object]) -> None:
        if not self.lost:
            with self.told():
                work()


class WeightsAndBiases(Remote):
    """Runs of `tracking.project`, grouped by `name`. Steps that a resumed run repeats stay as they were."""

    name = "wandb"

    def start(self) -> None:
        import wandb

        known = remote_id(self.folder, self.name)
        own = known or uuid4().hex[:12]
        self.run = wandb.init(
            project=self.project,
            group=self.config.name,
            name=self.title,
            id=own,
            resume="allow",
            config=self.config.flat(),
            dir=str(self.folder),
            mode="offline" if self.config.tracking.offline else None,
            reinit="create_new",  # a process of a sweep has many runs
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, quiet=True),
            allow_val_change=True,
        )
        if known is None:
            keep_id(self.folder, self.name, own)

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        self.tell(lambda: self.run.log(dict(metrics), step=step))

    def image(self, name: str, picture: Tensor, step: int) -> None:
        import wandb

        self.tell(lambda: self.run.log({name: wandb.Image(_pixels(picture))}, step=step))

    def finish(self, status: str) -> None:
        self.tell(lambda: self.run.summary.update({"status": status}))
        self.tell(lambda: self.run.finish(exit_code=0 if status == "finished" else 1))
        self.lost = True  # told everything

    def close(self) -> None:
        self.tell(lambda: self.run.finish(exit_code=1))
        self.lost = True


class MLflow(Remote):
    """Runs of an experiment called `tracking.project`, on MLFLOW_TRACKING_URI or, where there is none, in `out`/mlruns.
    A resumed run leaves out what was logged before, metric by metric."""

    name = "mlflow"

    def start(self) -> None:
        import os

        from mlflow import MlflowClient

        local = (self.config.out.absolute() / "mlruns").as_uri()
        uri = local if self.config.tracking.offline else os.environ.get("MLFLOW_TRACKING_URI") or local
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask for a word
        self.client = MlflowClient(tracking_uri=uri)
        self.logged: dict[str, int] = {}
        """Metric -> the last step that was logged before this process."""
        known = remote_id(self.folder, self.name)
        if known is not None:
            self.client.update_run(known, status="RUNNING")
            self.id, self.resumed = known, True
            return
        self.id, self.resumed = self._new(), False
        keep_id(self.folder, self.name, self.id)

    def _new(self) -> str:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self.project)
        if found is None:
            try:
                own = self.client.create_experiment(self.project)
            except MlflowException:  # another trial was faster
                found = self.client.get_experiment_by_name(self.project)
                if found is None:
                    raise
                own = found.experiment_id
        else:
            own = found.experiment_id
        run = self.client.create_run(own, run_name=self.title, tags={"group": self.config.name})
        params = [Param(key, str(value)[:LONGEST]) for key, value in self.config.flat().items()]
        self.client.log_batch(run.info.run_id, params=params[:100])
        self.client.log_batch(run.info.run_id, params=params[100:])
        return run.info.run_id

    def _is_new(self, key: str, step: int) -> bool:
        if not self.resumed:
            return True
        if key not in self.logged:
            history = self.client.get_metric_history(self.id, key)
            self.logged[key] = max((point.step for point in history), default=-1)
        return step > self.logged[key]

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        import time

        from mlflow.entities import Metric

        def work() -> None:
            now = int(1000 * time.time())
            points = [
                Metric(key, float(value), now, step)
                for key, value in metrics.items()
                if math.isfinite(value) and self._is_new(key, step)
            ]
            if points:
                self.client.log_batch(self.id, metrics=points)

        self.tell(work)

    def image(self, name: str, picture: Tensor, step: int) -> None:
        file = f"{name.replace('/', '-')}-{step}.png"
        self.tell(lambda: self.client.log_image(self.id, _pixels(picture), file))

    def finish(self, status: str) -> None:
        self.tell(lambda: self.client.set_tag(self.id, "status", status))
        self.tell(lambda: self.client.set_terminated(self.id, "FINISHED" if status == "finished" else "FAILED"))
        self.lost = True

    def close(self) -> None:
        self.tell(lambda: self.client.set_terminated(self.id, "KILLED"))
        self.lost = True


def _pixels(picture: Tensor) -> Any:
    """(3, height, width) from 0 to 1 -> a uint8 array of (height, width, 3)."""
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
