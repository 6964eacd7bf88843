"""What one trial of a sweep does, in its own folder: cut and measure a trained model, or train one.

Runs inside a Ray Tune actor that is used for many trials. What they share, data and the trained model, is loaded once a
process; everything else is as it was before the trial when it ends.
"""

from __future__ import annotations

import math
import os
import platform
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from mamba.config.schema import RunConfig
from mamba.errors import ForgeError, TrainingError
from mamba.runs.files import write_json
from mamba.runs.folder import epochs_of, request_stop
from mamba.runs.hparams import MANY, write_hparams
from mamba.runs.metrics import best_accuracy
from mamba.runs.start import prepare_resume
from mamba.train.distributed import own_device
from mamba.train.trainer import fit
from pruning.rounds import hooks_for
from ray_jobs.launch.process import restored
from ray_jobs.launch.workers import await_orphans
from ray_jobs.sweep.measure import measure_trial
from ray_jobs.sweep.results import read_trial, write_trial
from ray_jobs.sweep.rounds import rounds_trial
from ray_jobs.sweep.shared import Report, Shared, TrialProcess, data_of, finished_run, trial_config

LOG = "trial.log"


def run_trial(shared: Shared, name: str, values: dict[str, Any], report: Report) -> dict[str, Any]:
    """Run a trial, or read what it left if it is done. A failure that would only repeat itself is its result.

    Returns:
        trial.json's content: status finished or failed, metrics, the reason of a failure.
    """
    folder = shared.folder / name
    done = read_trial(folder)
    if done is not None:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with own_log(folder), restored(shared.threads, trains=shared.kind != "measure"):
        print(f"{datetime.now():%F %T} {platform.node()}, process {os.getpid()}: {values}")
        try:
            _claim(folder)
            config = trial_config(shared, name, values)
            (folder / "config.yaml").write_text(config.to_yaml())
            work = {"measure": measure_trial, "train": train_trial, "rounds": rounds_trial}[shared.kind]
            result = work(shared, config, folder, report)
            result = check_finite(result, shared.objectives)
        except (ForgeError, torch.OutOfMemoryError) as error:
            result = {"status": "failed", "reason": str(error).splitlines()[0], "metrics": {}}
            traceback.print_exc()
        except BaseException as error:
            print(f"{datetime.now():%F %T} ended by {type(error).__name__}")
            raise
        print(f"{datetime.now():%F %T} {result['status']}")
    kept = ("status", "reason", "metrics", "rounds", "seed", "hardware", "versions", "code_revision")
    seconds = round(time.perf_counter() - began, 3)
    own = {key: result[key] for key in kept if key in result}
    result = write_trial(folder, {**own, "values": values, "seconds": seconds})
    list_trial(shared, name, values, result["status"])
    return result


def check_finite(result: dict[str, Any], objectives: tuple[str, ...]) -> dict[str, Any]:
    """A trial's result, failed where it diverged: where its loss, its accuracy or an objective is not a number.

    What it reached before it diverged is kept among its metrics, and ranks nowhere.
    """
    metrics = result["metrics"]
    for key in dict.fromkeys((*objectives, "train/loss", "val/loss", "val/accuracy")):
        if key in metrics and not math.isfinite(metrics[key]):
            return {**result, "status": "failed", "reason": f"it diverged: {key} is {metrics[key]} at its end"}
        if key in objectives and key not in metrics:
            return {**result, "status": "failed", "reason": f"{key}, an objective, is not among its metrics"}
    return result


@contextmanager
def own_log(folder: Path) -> Iterator[None]:
    """What is printed and warned of in a trial goes to `trial.log` in its folder; attempts follow each other there."""
    with (folder / LOG).open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        yield


def _claim(folder: Path) -> None:
    """Wait for a process of a killed sweep that still works on this trial, then say that it is this one's."""
    mark = folder / ".ray" / "worker-trial.json"
    mark.parent.mkdir(exist_ok=True)
    with suppress(OSError, ValueError, KeyError):  # a damaged mark names no process
        await_orphans(folder)
    write_json(mark, {"pid": os.getpid(), "host": platform.node()})


def list_trial(shared: Shared, name: str, values: Mapping[str, Any], status: str) -> None:
    """A trial's line in TensorBoard's HPARAMS tab, also of one whose values do not go together."""
    config = RunConfig(**shared.config)
    with suppress(ForgeError):
        config = config.with_values(dict(values))
        config = trial_config(shared, name, values)
    write_hparams(shared.folder / name, config, status, shared.compared[:MANY])


def train_trial(shared: Shared, config: RunConfig, folder: Path, report: Report) -> dict[str, Any]:
    """Train as train.py would, from the folder's newest checkpoint if there is one; reports every epoch but the last,
    which is reported with the result: a trial that is stopped there saves nothing and loses its test.

    Raises:
        TrainingError: an epoch's objective or validation loss is not a number; no later epoch could be compared.
    """

    def report_epoch(metrics: Mapping[str, float]) -> None:
        epochs = reported_epochs(folder)
        latest = {**epochs[-1], **metrics} if epochs else dict(metrics)
        for key in dict.fromkeys((*shared.objectives, "val/loss")):
            if not math.isfinite(latest.get(key, 0.0)):
                raise TrainingError(f"it diverged: {key} is {latest[key]} in epoch {latest.get('epoch', '?')}")
        if latest.get("epoch", 0) < config.optim.epochs:
            report(latest)

    result = finished_run(folder)
    if result is None:
        prepare_resume(folder)  # forgets the request to stop of a sweep that was interrupted
        if shared.workers > 1:
            result = _train_nested(shared, config, folder, report_epoch)
        else:
            process = TrialProcess(own_device(), shared.threads, report_epoch)
            result = fit(config, process, folder, data_of(shared, config), hooks_for(config))
    if result["status"] == "interrupted":  # asked to stop by someone: it goes on when the sweep is continued
        raise InterruptedError(f"{folder} was asked to stop")
    last = (reported_epochs(folder) or [{}])[-1]  # of an older run, whose result does not say it
    known = {"val/best_accuracy": last["val/best_accuracy"]} if "val/best_accuracy" in last else {}
    known |= {"val/images": float(result["images"]["val"])} if result.get("images", {}).get("val") else {}
    known |= {"train/epoch_s": result["seconds"] / result["epochs"]} if result.get("seconds") else {}
    return {**result, "metrics": {**known, **result["metrics"], "epoch": result["epochs"]}}


def reported_epochs(folder: Path) -> list[dict[str, float]]:
    """Every epoch of a run as a scheduler and a study see it: its metrics, `epoch`, and `val/best_accuracy` so far."""
    best = -math.inf
    found = []
    for epoch in epochs_of(folder):
        reached = best_accuracy(epoch)
        best = max(best, reached) if math.isfinite(reached) else best
        known = {key: value for key, value in epoch.items() if value is not None}
        found.append({**known, **({"val/best_accuracy": best} if math.isfinite(best) else {})})
    return found


def _train_nested(shared: Shared, config: RunConfig, folder: Path, report_epoch: Report) -> dict[str, Any]:
    """A Ray Train run of several workers inside the trial, followed by its metrics.jsonl."""
    from ray_jobs.launch.run import train_with_workers

    def work() -> dict[str, Any]:
        return train_with_workers(config, folder, shared.workers, shared.gpu, shared.threads)

    seen = len(epochs_of(folder))  # by the sweep that is continued
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work)
        try:
            while True:
                done = wait([running], timeout=0.5).done
                for metrics in epochs_of(folder)[seen:]:
                    report_epoch(metrics)
                    seen += 1
                if done:
                    return running.result()
        except BaseException:  # Tune stops a trial where it reports
            request_stop(folder)
            raise
