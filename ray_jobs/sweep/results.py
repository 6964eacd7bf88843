"""What the trials of an experiment leave in its folder, and reading it again.

    <trial>/trial.json      how a trial ended: status, reason, values, metrics, seconds, and the machine
    baseline.json           metrics of the model that the trials cut

A training trial's folder is a run's too, with the trainer's own result.json. Experiments from before trial.json kept
both in result.json: of the two kinds, a trial's holds its values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mamba.config.keys import current
from mamba.errors import FolderError
from mamba.runs.files import read_json, read_sealed, unsealed, write_sealed

TRIAL = "trial.json"
BASELINE = "baseline.json"
OWNER = "experiment"
"""Key of a baseline's: the id of its experiment."""
STATUSES = ("finished", "stopped early", "failed")
"""How a trial can end."""


def write_trial(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write a trial's result, which ends it; returns it as `read_trial` will. What is not finite is written as null."""
    result = unsealed(result)
    finite = {key: v for key, v in result["metrics"].items() if v is not None and math.isfinite(v)}
    metrics = {key: finite.get(key) for key in result["metrics"]}
    written = {"status": result["status"], "reason": result.get("reason", ""), **result, "metrics": metrics}
    written["trial"] = folder.name  # a copy beside it is none
    folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / TRIAL, written)
    return {**written, "metrics": finite}


def read_trial(folder: Path) -> dict[str, Any] | None:
    """What `write_trial` wrote, its finite metrics alone; None for a trial that has no result, or one that is damaged
    or was changed (`refused` says so): it has to run (again)."""
    try:
        return checked_trial(folder)
    except FolderError:
        return None


def checked_trial(folder: Path) -> dict[str, Any] | None:
    """As `read_trial`.

    Raises:
        FolderError: the result is damaged or was changed.
    """
    for name in (TRIAL, "result.json"):
        path = folder / name
        try:
            tree = read_sealed(path, "remove it to run the trial again")
            if name != TRIAL and "values" not in tree:  # a run's own
                return None
            values, metrics = current(tree["values"], path), dict(tree["metrics"])
            if tree["status"] not in STATUSES:
                raise ValueError(f"a status of {tree['status']!r:.40}")
            if tree.get("trial", folder.name) != folder.name:
                raise FolderError(f"{path} is that of trial {tree['trial']}: a copy, or the folder was renamed")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FolderError(f"{path} is damaged ({' '.join(str(error).split())})") from None
        metrics = {key: v for key, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
        seconds = tree.get("trial_seconds", tree.get("seconds"))
        about = {"reason": tree.get("reason") or "", "seconds": seconds}
        return {**tree, **about, "values": values, "metrics": metrics}
    return None


def rows(folder: Path) -> list[dict[str, Any]]:
    """Every trial that left a result: trial, status, reason, values, metrics, seconds."""
    trials = sorted({path.parent for name in (TRIAL, "result.json") for path in folder.glob(f"*/{name}")})
    read = {path.name: read_trial(path) for path in trials}
    keys = ("status", "reason", "values", "metrics", "seconds")
    found = [(name, result) for name, result in read.items() if result]
    series = {name: {"rounds": result["rounds"]} for name, result in found if "rounds" in result}
    return [{"trial": n, **{key: result[key] for key in keys}, **series.get(n, {})} for n, result in found]


def refused(folder: Path) -> list[str]:
    """What lies in an experiment's folder and is not taken for a result, since it is damaged or was changed: a sentence
    each."""
    found = []
    for path in sorted({path.parent for path in folder.glob(f"*/{TRIAL}")}):
        try:
            checked_trial(path)
        except FolderError as error:
            found.append(str(error))
    with suppress(FileNotFoundError):
        try:
            _own_baseline(folder)
        except FolderError as error:
            found.append(str(error))
    return found


def baseline_of(folder: Path) -> dict[str, float]:
    """Metrics of the model that an experiment cuts; empty where there is none, before the first trial, or where they
    are damaged or were changed (`refused` says so)."""
    try:
        tree = _own_baseline(folder)
    except (FileNotFoundError, FolderError):  # measured again by the next trial
        return {}
    return {key: v for key, v in tree.items() if isinstance(v, int | float)}


def write_baseline(folder: Path, metrics: Mapping[str, float]) -> dict[str, float]:
    """Add metrics to the baseline's; returns all of them."""
    merged = {**baseline_of(folder), **metrics}
    write_sealed(folder / BASELINE, {**merged, OWNER: _owner(folder)})
    return merged


def _own_baseline(folder: Path) -> dict[str, Any]:
    """Raises FileNotFoundError where there is none, FolderError for one that is damaged or another experiment's."""
    path = folder / BASELINE
    tree = read_sealed(path)
    if tree.get(OWNER) is not None and tree[OWNER] != _owner(folder):
        raise FolderError(f"{path} is that of another experiment: a copy; remove it to measure the model again")
    return tree


def _owner(folder: Path) -> str | None:
    """The id of the experiment in a folder."""
    try:
        found = read_json(folder / "experiment.json").get("id")
    except (FileNotFoundError, FolderError):  # whoever reads it says so
        return None
    return found if isinstance(found, str) else None
