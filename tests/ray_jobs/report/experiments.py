"""Folders that sweeps leave, without the sweeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamba.config.schema import RunConfig
from ray_jobs.sweep import experiment
from ray_jobs.sweep.grid import Trial
from ray_jobs.sweep.results import rows, write_baseline, write_trial
from ray_jobs.sweep.space import Space


def row(values: dict[str, Any], status: str = "finished", trial: str = "", **metrics: float) -> dict[str, Any]:
    """A trial's row; two underscores in a metric's name stand for a slash."""
    found = {key.replace("__", "/"): value for key, value in metrics.items()}
    name = trial or "_".join(f"{k}-{v}" for k, v in values.items())
    return {"trial": name, "status": status, "reason": "", "values": values, "metrics": found, "seconds": 1.0}


def lost(values: dict[str, Any], drop: float, dense: float = 90.0, **metrics: float) -> dict[str, Any]:
    """A measure trial that lost so many points."""
    return row(values, **{"val__drop": drop, "val__accuracy": dense - drop, **metrics})


def left_behind(
    folder: Path, space: Space, trials: list[dict[str, Any]], baseline: dict[str, float] | None = None, **config: Any
) -> list[dict[str, Any]]:
    """Write an experiment's folder as a sweep of these trials leaves it; returns its rows."""
    keys = {key.replace("__", "."): value for key, value in config.items()}
    own = RunConfig(out=folder.parent, name=folder.name).with_values({"data.dataset": "digits", **keys}).resolve()
    listed = [] if space.search else [Trial(t["trial"], t["values"]) for t in trials]
    experiment.create(experiment.Experiment(space, listed, own, None, None, None, len(trials)), ["tune.py"])
    text = own.to_yaml()
    for t in trials:
        write_trial(
            folder / t["trial"], {**t, "hardware": {"gpu": None, "cpu": "x", "cpus": 2}, "versions": {"ray": "2"}}
        )
        (folder / t["trial"] / "config.yaml").write_text(text)
    if baseline:
        write_baseline(folder, baseline)
    return rows(folder)


def space_of(**parts: Any) -> Space:
    return Space.model_validate({"question": "?", "cost": "none", "kind": "measure", **parts})


def run_left_behind(
    folder: Path, result: dict[str, Any] | None, epochs: Sequence[dict[str, Any]] = (), **config: Any
) -> None:
    """Write a run's folder as a training leaves it."""
    keys = {key.replace("__", "."): value for key, value in config.items()}
    folder.mkdir(parents=True)
    own = RunConfig(out=folder.parent.parent, name=folder.parent.name, trial=folder.name)
    (folder / "config.yaml").write_text(own.with_values({"data.dataset": "digits", **keys}).resolve().to_yaml())
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"epoch": i + 1, **e}) + "\n" for i, e in enumerate(epochs))
    )
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
