"""What lies in a run's folder, who may write there, and what state the run is in.

    config.yaml         the resolved config
    start/              a copy of the checkpoint that the run started from, if it did
    checkpoints/        step-N: full training states, best-N: the weights that validated best
    metrics.jsonl       one line an epoch; disposable
    progress.json       where the run is now
    result.json         written once, at the end
    events.out.*        TensorBoard
    train.log           what the console said
    error.log           the traceback of what ended the run
    STOP                a request to save and end
    .lock .alive .ray/  who trains here, what each process is doing, and Ray's own files

Files carry the version of this layout (`format`); those of before it had one are version 1. Older ones are read, newer
ones are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mamba.config.schema import RunConfig
from mamba.config.versions import FORMAT, check_format
from mamba.errors import ConfigError, FolderError
from mamba.runs.files import as_metrics, create, read_json, read_sealed, unwritable, write_text

CONFIG, RESULT, METRICS_LOG, PROGRESS = "config.yaml", "result.json", "metrics.jsonl", "progress.json"
LOG, ERROR_LOG, STOP, LOCK = "train.log", "error.log", "STOP", ".lock"
STATUSES = ("finished", "stopped early", "failed", "interrupted")
"""How a run can have ended."""


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
    try:
        folder = run_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        with create(folder / CONFIG) as file:  # also decides between two that start at the same moment
            try:
                file.write(config_text(config.model_copy(update={"trial": folder.name})).encode())
                file.flush()
            except OSError:
                (folder / CONFIG).unlink()
                raise
    except FileExistsError:
        raise ConfigError(
            f"{folder} holds a run already; choose another --trial or --name, or continue it with --resume {folder}"
        ) from None
    except OSError as error:
        raise ConfigError(f"out: {unwritable(run_folder_text(config), error)}") from None
    return folder


def run_folder_text(config: RunConfig) -> Path:
    """`run_folder` for an error: no look at the disk."""
    return config.out / config.name / (config.trial or "")


def config_text(config: RunConfig) -> str:
    """config.yaml's content."""
    return f"format: {FORMAT}\n{config.to_yaml()}"


def write_config(folder: Path, config: RunConfig) -> None:
    """Replace a run's config.yaml; raises FolderError."""
    write_text(folder / CONFIG, config_text(config))


def read_config(folder: Path) -> RunConfig:
    """A run's config; raises ConfigError where it is missing, damaged, or of a newer version."""
    return RunConfig.from_yaml(folder / CONFIG)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a run's folder for one trainer at a time; the system lets go of it when this process ends.

    Raises:
        ConfigError: another process is training in it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{folder} is being trained in by another process; wait for it, or stop it") from None
    except OSError as error:
        raise ConfigError(str(unwritable(folder, error))) from None
    try:
        yield
    finally:
        lock.release()


def finished_result(folder: Path) -> dict[str, Any] | None:
    """What a finished run left in result.json, None for one that is not finished. Metrics that are not finite are NaN.

    Raises:
        FolderError: it is damaged, or of a newer version.
    """
    try:
        result = _read_result(folder)
    except FileNotFoundError:
        return None
    return None if "values" in result and "tested" not in result else result


def older_trial(folder: Path) -> dict[str, Any] | None:
    """The result of a sweep's trial as version 1 kept it: in result.json, with the trial's `values`. None where there
    is no such thing.

    Raises:
        FolderError: result.json is damaged.
    """
    try:
        result = _read_result(folder)
    except FileNotFoundError:
        return None
    return result if "values" in result else None


def _read_result(folder: Path) -> dict[str, Any]:
    path = folder / RESULT
    result = read_sealed(path, "remove it to finish the run again")
    check_format(result, path, FolderError)
    if not isinstance(result.get("status"), str) or not isinstance(result.get("metrics"), dict):
        raise FolderError(f"{path} is damaged (it holds no status and metrics); remove it to finish the run again")
    return {**result, "metrics": as_metrics(result["metrics"])}


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics of every epoch that a run has finished, while it goes on too; damaged lines are left out."""
    return list(logged_epochs(folder).values())


def logged_epochs(folder: Path) -> dict[str, dict[str, Any]]:
    """metrics.jsonl: a line's text -> its content. The file is disposable: what of it cannot be read is left out."""
    try:
        lines = (folder / METRICS_LOG).read_bytes().decode(errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        with suppress(ValueError, RecursionError):
            tree = json.loads(line)
            if isinstance(tree, dict) and isinstance(tree.get("epoch"), int):
                found[line] = {"epoch": tree["epoch"], **as_metrics(tree)}
    return found


def position_of(folder: Path) -> dict[str, Any]:
    """progress.json: epoch, epochs, step, steps_per_epoch, loss, images_per_s; empty where it is missing or damaged."""
    try:
        tree = as_metrics(read_json(folder / PROGRESS))
    except (FileNotFoundError, FolderError):
        return {}
    return tree if {"epoch", "epochs", "step", "steps_per_epoch"} <= tree.keys() else {}


def request_stop(folder: Path) -> None:
    """Ask the run in this folder to save a checkpoint at its current step and end."""
    with suppress(FileExistsError), create(folder / STOP):
        pass


def stop_requested(folder: Path) -> bool:
    return (folder / STOP).exists()


def forget_stop(folder: Path) -> None:
    """Take back an earlier request to stop; raises ConfigError where the folder cannot be written to."""
    try:
        (folder / STOP).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(str(unwritable(folder, error))) from None


def discard_if_unused(folder: Path) -> None:
    """Remove the folder of a run that ended before it began, so that its name can be used again."""
    with suppress(OSError):
        left = {f.name for f in folder.iterdir()}
        if left <= {CONFIG, ".ray", ".alive", LOCK, LOG, "start", "inputs.json"}:
            shutil.rmtree(folder, ignore_errors=True)
