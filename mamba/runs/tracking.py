"""What a run leaves in its folder: config, TensorBoard events, metrics as JSON lines, the live position, the result.

    config.yaml         the resolved config
    events.out.*        TensorBoard: scalars, images, config as text; the HPARAMS entry in a file of its own
    metrics.jsonl       one line an epoch
    progress.json       where the run is now (replaced in place)
    result.json         written once, at the end
    checkpoints/

Only rank 0 writes. A resumed run drops what was logged after the checkpoint that it continues from.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mamba.config.keys import may_be_none
from mamba.config.schema import RunConfig
from mamba.errors import CheckpointError, ConfigError
from mamba.runs.checkpoint import check_resumable

HPARAM_METRICS = (
    "test/accuracy",
    "val/accuracy",
    "val/ema_accuracy",
    "train/loss",
    "train/images_per_s",
    "model/params",
    "model/macs",
)
FIRST_HPARAMS = frozenset({"data.augment", "model.drop_path", "model.name", "optim.lr"})
"""Columns that TensorBoard shows before the others, with the status: five in all; the rest is one click away."""
STATUSES = {
    "finished": Status.STATUS_SUCCESS,
    "stopped early": Status.STATUS_SUCCESS,
    "failed": Status.STATUS_FAILURE,
    "interrupted": Status.STATUS_UNKNOWN,
}
"""What the HPARAMS tab's column `status` says of a run, and the word that TensorBoard itself has for it."""
HPARAMS_FILE = "events.out.tfevents.0.hparams"
NOT_COMPARED = {
    *("trial", "out", "data.root", "data.loader_workers", "eval.batch_size", "checkpoint.every", "checkpoint.keep"),
    *("scaling.cpus_per_worker", "scaling.max_failures"),
}


def run_folder(config: RunConfig) -> Path:
    """`out`/`name`/`trial`; the trial defaults to date, time and seed."""
    if config.trial:
        return config.out / config.name / config.trial
    trial = f"{datetime.now():%Y%m%d-%H%M%S}-seed{config.seed}"
    taken = (config.out / config.name / f"{trial}{f'-{n}' if n > 1 else ''}" for n in range(1, 1000))
    return next(folder for folder in taken if not folder.exists())


def create_run(config: RunConfig) -> Path:
    """Make a new run's folder and write its config.

    Raises:
        ConfigError: the folder holds a run already, or cannot be made.
    """
    folder = run_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "config.yaml").open("x") as file:  # also decides between two that start at the same moment
            text = config.model_copy(update={"trial": folder.name}).to_yaml()
            try:
                file.write(text)
                file.flush()
            except OSError:
                (folder / "config.yaml").unlink()
                raise
    except FileExistsError:
        raise ConfigError(
            f"{folder} holds a run already; choose another --trial or --name, or continue it with --resume {folder}"
        ) from None
    except OSError as error:
        raise ConfigError(f"out: the run's folder {folder} cannot be written: {error}") from None
    return folder


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a run's folder for one trainer at a time; the system lets go of it when this process ends.

    Raises:
        ConfigError: another process is training in it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{folder} is being trained in by another process; wait for it, or stop it") from None
    except OSError as error:
        raise ConfigError(f"the run's folder {folder} cannot be written: {error}") from None
    try:
        yield
    finally:
        lock.release()


def finished_result(folder: Path) -> dict[str, Any] | None:
    """What a finished run left in result.json, None for one that is not finished."""
    path = folder / "result.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it to finish the run again") from None


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics of every epoch that a run has finished, while it goes on too."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def prepare_resume(folder: Path) -> None:
    """Forget an earlier request to stop, and see that the newest checkpoint can be read.

    Raises:
        ConfigError: the folder cannot be written to.
        CheckpointError: the checkpoint is damaged.
    """
    try:
        (folder / "STOP").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"the run's folder {folder} cannot be written: {error}") from None
    check_resumable(folder)


def discard_if_unused(folder: Path) -> None:
    """Remove the folder of a run that ended before it began, so that its name can be used again."""
    left = {f.name for f in folder.iterdir()}
    if left <= {"config.yaml", ".ray", ".lock"}:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Replace a JSON file so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(tree, indent=1) + "\n")
    partial.replace(path)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a CSV file so that a reader never sees half of it; what a row does not have stays empty."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and code revision, for the result's reader."""
    packages = ("torch", "torchvision", "ray", "numpy")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "hardware": {"gpu": gpu, "cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "code_revision": _revision(),
    }


@cache
def _revision() -> str:
    """The commit of the code that runs, `+changes` where the tree differs from it, `unknown` outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


class Tracker:
    """Writes a run's folder as it goes. Made on rank 0 only."""

    def __init__(self, folder: Path, config: RunConfig, epochs_done: int, steps_done: int) -> None:
        self.folder, self.config = folder, config
        try:
            self._drop_after(epochs_done)
            self.writer = SummaryWriter(str(folder), purge_step=steps_done + 1 if any(folder.glob("events*")) else None)
            if steps_done == 0:
                lines = [f"    {line}" for line in config.to_yaml().splitlines()]
                self.writer.add_text("config", "\n".join(lines))
            self.writer.flush()
        except OSError as error:
            raise CheckpointError(f"the run's folder {folder} cannot be written: {error}") from None

    def _drop_after(self, epochs_done: int) -> None:
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _epoch_of(line) <= epochs_done]
            partial = path.with_name(".metrics.partial")
            partial.write_text("".join(line + "\n" for line in lines))
            partial.replace(path)

    def step(self, global_step: int, metrics: Mapping[str, float]) -> None:
        """Scalars of one optimizer step, under tags of their own (`step/*`)."""
        for name, value in metrics.items():
            self.writer.add_scalar(f"step/{name}", value, global_step)

    def epoch(self, epoch: int, global_step: int, metrics: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """Scalars at the end of the epoch-th epoch; learning rates by group under `lr/*`. Like every scalar they are
        drawn against the optimizer step, the one axis on which a resumed run can drop what it is going to repeat."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, global_step)
        for name, value in rates.items():
            self.writer.add_scalar(f"lr/{name}", value, global_step)
        self.writer.flush()
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"epoch": epoch, **metrics}) + "\n")

    def scalars(self, metrics: Mapping[str, float], global_step: int) -> None:
        """Scalars of something that has no epochs."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, global_step)

    def samples(self, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """A grid of the first training batch as the model sees it, normalisation undone."""
        from torchvision.utils import make_grid  # not above: a slow import

        shift, scale = (torch.tensor(v)[:, None, None] for v in (mean, std))
        pictures = (images[:32].detach().float().cpu() * scale + shift).clamp(0, 1)
        factor = max(1, 64 // pictures.shape[-1])
        pictures = pictures.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
        self.writer.add_image("train/augmented", make_grid(pictures, nrow=8), 0)

    def progress(self, **position: Any) -> None:
        write_json(self.folder / "progress.json", position)

    def finish(self, result: Mapping[str, Any], global_step: int) -> None:
        """The final scalars, the HPARAMS entry's status, and result.json."""
        for name, value in result["metrics"].items():
            if name.split("/")[0] in ("test", "model"):
                self.writer.add_scalar(name, value, global_step)
        self.writer.close()
        write_hparams(self.folder, self.config, "finished")
        write_json(self.folder / "result.json", result)

    def close(self) -> None:
        self.writer.close()


def write_hparams(folder: Path, config: RunConfig, status: str, first: Collection[str] = FIRST_HPARAMS) -> None:
    """A run's line in TensorBoard's HPARAMS tab, with a status to filter and sort by; replaces the one before.

    Written when a run has ended: a TensorBoard that is open keeps the first entry that it reads of a run. Every run of
    ours has the same keys, so each can carry the same experiment summary, whichever TensorBoard reads: one table with
    every run under `--logdir`, whatever was or was not searched.

    Args:
        folder: of the run.
        config: of the run.
        status: one of STATUSES.
        first: the hyperparameters whose columns come first.
    """
    shown = {
        key: value
        if isinstance(value, int | float) and not isinstance(value, bool) and not may_be_none(key)
        else str(value)
        for key, value in config.flat().items()
        if key not in NOT_COMPARED
    }
    metrics = dict.fromkeys(HPARAM_METRICS, 0.0)
    experiment, start, end = hparams({"status": status, **shown}, metrics, {"status": list(STATUSES)})
    with _content(experiment) as content:
        for info in content.experiment.hparam_infos:  # TensorBoard sorts first what differs between runs
            info.differs = info.name == "status" or info.name in first
    with _content(end) as content:
        content.session_end_info.status = STATUSES[status]
    now = time.time()
    events = [Event(wall_time=now, file_version="brain.Event:2")]
    events += [Event(wall_time=now, summary=part) for part in (experiment, start, end)]
    partial = folder / ".hparams.partial"
    with partial.open("wb") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())
    partial.replace(folder / HPARAMS_FILE)


@contextmanager
def _content(summary: Any) -> Iterator[Any]:
    """What a summary says to the HPARAMS tab, to be changed."""
    data = summary.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(data.content)
    yield content
    data.content = content.SerializeToString()


def _epoch_of(line: str) -> int:
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError):  # a line that a crash cut short
        return 10**9
