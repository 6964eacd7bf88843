"""Trials that are series of pruning rounds: training, pruning, rewinding, all on the trial's own device; and, after the
last trial, how fast each round's model is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamba.config.schema import RunConfig
from mamba.data.images import ImageData
from mamba.runs.environment import environment
from mamba.runs.files import read_sealed, write_csv, write_sealed
from mamba.runs.start import prepare_resume
from mamba.train.distributed import own_device
from mamba.train.precision import resolve_amp
from mamba.train.trainer import fit
from pruning import measure as meter
from pruning.rounds import COLUMNS, Engine, hooks_for, round_folders, run_rounds
from pruning.store import load_smaller
from ray_jobs.sweep.results import read_trial, write_trial
from ray_jobs.sweep.shared import Report, Shared, TrialProcess, data_of, finished_run

SPEEDS = {"images_per_s": "bench/images_per_s", "latency_ms": "bench/latency_ms"}
"""Columns of a round's row, and the metrics that they hold."""


def rounds_trial(shared: Shared, config: RunConfig, folder: Path, report: Report) -> dict[str, Any]:
    """Run what is left of a series as prune.py would, without timing its models: those beside it would be timed too.

    Its metrics are those of the last round's model; `rounds` has every round's row.
    """
    device, data = own_device(), data_of(shared, config)
    amp = resolve_amp(config.optim.amp, device)

    def train(own: RunConfig, here: Path) -> dict[str, Any]:
        done = finished_run(here)
        if done is not None:
            return done
        prepare_resume(here)
        process = TrialProcess(device, shared.threads, report)
        return fit(own, process, here, data, hooks_for(own, folder=here))

    def measure(own: RunConfig, path: Path) -> dict[str, float]:
        return measured(load_smaller(path, device)[0].model, data, own.eval.batch_size, amp)

    rows = run_rounds(config, folder, data, Engine(train, measure, print))
    if rows is None:
        raise InterruptedError(f"{folder} was asked to stop")
    first, last = rows[0], rows[-1]
    metrics = {
        "prune/density": last["density"],
        "model/params": last["params"],
        "model/nonzero": last["nonzero"],
        "model/macs": last["macs"],
        "test/accuracy": last["test_accuracy"],
    }
    if data.val is not None:
        accuracy = last["val_accuracy"]
        metrics |= {"val/accuracy": accuracy, "val/best_accuracy": accuracy, "val/images": float(len(data.val))}
        metrics["val/drop"] = first["val_accuracy"] - accuracy
    return {"status": "finished", "metrics": metrics, "rounds": rows, "seed": config.seed, **environment(device)}


def measured(model: Any, data: ImageData, batch_size: int, amp: Any) -> dict[str, float]:
    """Size and validation accuracy of a model on its device; test accuracy where there is no validation split."""
    what, split = ("test", data.test) if data.val is None else ("val", data.val)
    return {**meter.size(model), f"{what}/accuracy": meter.accuracy(model, data, split, batch_size, amp)}


def models_to_time(folder: Path) -> list[tuple[str, str]]:
    """(trial, folder of its round) of the finished series of an experiment whose speed is not known."""
    found = []
    for path in sorted(p.parent for p in folder.glob("*/trial.json")):
        result = read_trial(path)
        if result is not None and result["status"] == "finished" and "bench/images_per_s" not in result["metrics"]:
            found += [(path.name, here.name) for here in round_folders(path)]
    return found


def time_rounds(shared: Shared, models: Sequence[tuple[str, str]]) -> list[dict[str, float]]:
    """Speed of each round's model with nothing beside it, in turns; the models wait on the CPU."""
    device = own_device()
    loaded = [load_smaller(_model_of(shared.folder / trial, name))[0].model for trial, name in models]
    amp = resolve_amp(RunConfig(**shared.config).optim.amp, device)
    return meter.speeds(loaded, meter.usual_batch(device), meter.SECONDS, amp, device)


def write_speeds(folder: Path, models: Sequence[tuple[str, str]], speeds: Sequence[dict[str, float]]) -> None:
    """Add speeds to the rounds' rows, their tables and the trials' results."""
    for trial in dict.fromkeys(trial for trial, _ in models):
        own = [(name, speed) for (of, name), speed in zip(models, speeds, strict=True) if of == trial]
        rows = []
        for name, speed in own:
            row = {**read_sealed(folder / trial / name / "row.json"), **{c: speed[key] for c, key in SPEEDS.items()}}
            write_sealed(folder / trial / name / "row.json", row)
            rows.append(row)
        write_csv(folder / trial / "rounds.csv", COLUMNS, rows)
        result = read_trial(folder / trial)
        assert result is not None
        metrics = {**result["metrics"], **own[-1][1]}
        write_trial(folder / trial, {**result, "metrics": metrics, "rounds": rows})


def _model_of(series: Path, name: str) -> Path:
    """Where a round's model is: what its training left, or what round 0 was given."""
    pruned = series / name / "pruned"
    return pruned if pruned.exists() else series / "start"
