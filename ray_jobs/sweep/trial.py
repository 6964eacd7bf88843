"""What one trial of a sweep does, in its own folder: cut and measure a trained model, or train one.

Runs inside a Ray Tune actor that is used for many trials; what they share (data, the trained model) comes out of Ray's
object store and is kept by the process.
"""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mamba.config.schema import RunConfig
from mamba.data.images import ImageData
from mamba.errors import CheckpointError, ConfigError, ForgeError
from mamba.models.model import MambaModel
from mamba.runs import checkpoint as ckpt
from mamba.runs.environment import environment
from mamba.runs.folder import epochs_of, finished_result, request_stop
from mamba.runs.tracking import FIRST_HPARAMS, Tracker, write_hparams
from mamba.train.distributed import Process, own_device
from mamba.train.trainer import fit, resolve_amp
from pruning import measure as meter
from pruning.cut import cut
from pruning.importance import SCORES
from pruning.masks import Masks
from pruning.rounds import calibration_batches, hooks_for
from pruning.shrink import Shrunk
from pruning.store import masks_of, save_pruned
from ray_jobs.sweep.results import baseline_of, read_trial, write_baseline, write_trial

Report = Callable[[Mapping[str, float]], None]
BENCH_SECONDS = 0.4
LOG = "trial.log"


@dataclass(frozen=True)
class Shared:
    """What every trial of an experiment needs, put on each node once."""

    kind: str
    folder: Path
    config: dict[str, Any]
    """The experiment's resolved config, as plain values."""
    data: ImageData
    checkpoint: Path | None
    """The trained model that measure trials cut."""
    threads: int
    """CPU threads of a trial."""
    workers: int
    """DDP workers of a training trial; 1: the trial trains by itself."""
    gpu: bool
    """Whether the cluster has GPUs."""
    compared: tuple[str, ...] = ()
    """The keys in which trials differ: TensorBoard's first columns."""


class TrialProcess(Process):
    """Trains in the trial's own process and reports each epoch to Tune."""

    def __init__(self, device: torch.device, threads: int, report: Report) -> None:
        super().__init__(device=device)
        self.threads, self.report_to_tune = threads, report

    @property
    def cpus(self) -> int:
        return self.threads

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        self.report_to_tune(metrics)


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
    torch.set_num_threads(shared.threads)
    began = time.perf_counter()
    with own_log(folder):
        print(f"{datetime.now():%F %T} {platform.node()}, process {os.getpid()}: {values}")
        try:
            config = trial_config(shared, name, values)
            (folder / "config.yaml").write_text(config.to_yaml())
            work = measure_trial if shared.kind == "measure" else train_trial
            result = work(shared, config, folder, report)
        except (ForgeError, torch.OutOfMemoryError) as error:
            result = {"status": "failed", "reason": str(error).splitlines()[0], "metrics": {}}
            traceback.print_exc()
        except BaseException as error:
            print(f"{datetime.now():%F %T} ended by {type(error).__name__}")
            raise
        print(f"{datetime.now():%F %T} {result['status']}")
    kept = ("status", "reason", "metrics", "seed", "hardware", "versions", "code_revision")
    seconds = round(time.perf_counter() - began, 3)
    own = {key: result[key] for key in kept if key in result}
    result = write_trial(folder, {**own, "values": values, "seconds": seconds})
    list_trial(shared, name, values, result["status"])
    return result


@contextmanager
def own_log(folder: Path) -> Iterator[None]:
    """What is printed and warned of in a trial goes to `trial.log` in its folder; attempts follow each other there."""
    with (folder / LOG).open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        yield


def trial_config(shared: Shared, name: str, values: Mapping[str, Any]) -> RunConfig:
    """A trial's whole config; raises ConfigError where its values do not go together."""
    base = RunConfig(**shared.config)
    own = {"out": shared.folder.parent, "name": shared.folder.name, "trial": name}
    return base.with_values({**values, **own}).resolve()


def list_trial(shared: Shared, name: str, values: Mapping[str, Any], status: str) -> None:
    """A trial's line in TensorBoard's HPARAMS tab, also of one whose values do not go together."""
    config = RunConfig(**shared.config)
    with suppress(ConfigError):
        config = config.with_values(dict(values))
        config = trial_config(shared, name, values)
    write_hparams(shared.folder / name, config, status, shared.compared or FIRST_HPARAMS)


@lru_cache(maxsize=1)
def trained_model(path: Path, device: torch.device) -> tuple[MambaModel, dict[str, Any], Masks]:
    """The model of a checkpoint, its description and its masks, loaded once a process. Cuts copy them."""
    return *ckpt.load_model(path, device=device), masks_of(path)


def cut_model(shared: Shared, config: RunConfig, device: torch.device) -> Shrunk:
    """The trained model, cut as `cut.*` says; what its checkpoint had masked stays masked."""
    assert shared.checkpoint is not None
    model, _, masks = trained_model(shared.checkpoint, device)
    how = config.cut
    batches = None
    if how.repair or SCORES[how.criterion].calibrated:
        batches = [(x.to(device), y.to(device)) for x, y in calibration_batches(shared.data, config.seed)]
    return cut(
        model,
        how.rates,
        shrink=how.structured,
        scope=how.scope,
        score=how.criterion,
        calibration=batches,
        layers=None if how.layer is None else [how.layer],
        repair=how.repair,
        seed=config.seed,
        masks=masks,
    )


def time_trials(shared: Shared, trials: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, float]]:
    """Speed of the dense model and of each trial's, one after the other with nothing beside them: dense first."""
    assert shared.checkpoint is not None
    device = own_device()
    dense, *_ = trained_model(shared.checkpoint, device)
    configs = [trial_config(shared, name, values) for name, values in trials]
    models = (dense, *(cut_model(shared, config, device).model for config in configs))
    amp = resolve_amp(RunConfig(**shared.config).optim.amp, device)
    batch_size = meter.usual_batch(device)
    return meter.speeds(models, batch_size, BENCH_SECONDS, amp)


_baselines: dict[Path, dict[str, float]] = {}


def measured_baseline(shared: Shared, device: torch.device) -> dict[str, float]:
    """Validation accuracy and size of the model that is cut: measured once a process, by the process's first trial, so
    that no sweep waits for it, and kept in the experiment's folder."""
    path = shared.folder
    if path not in _baselines:
        baseline = baseline_of(path)
        if "val/accuracy" not in baseline:
            assert shared.checkpoint is not None and shared.data.val is not None
            config = RunConfig(**shared.config)
            model, *_ = trained_model(shared.checkpoint, device)
            amp = resolve_amp(config.optim.amp, device)
            accuracy = meter.accuracy(model, shared.data, shared.data.val, config.eval.batch_size, amp)
            images = float(len(shared.data.val))
            measured = {"val/accuracy": accuracy, "val/images": images, **meter.size(model)}
            baseline = write_baseline(path, measured)
        _baselines[path] = baseline
    return _baselines[path]


def measure_trial(shared: Shared, config: RunConfig, folder: Path, report: Report) -> dict[str, Any]:
    """Cut the trained model as `cut.*` says, fine-tune it if asked to, and measure what is left."""
    assert shared.checkpoint is not None
    device = own_device()
    _, description, _ = trained_model(shared.checkpoint, device)
    data, epochs = shared.data, config.cut.finetune_epochs
    assert data.val is not None
    if not config.cut.rates:
        raise ConfigError("cut.*: nothing is cut; set at least one component's rate above 0")
    baseline = measured_baseline(shared, device)
    pruned = cut_model(shared, config, device)
    smaller = pruned.model
    if epochs:
        start = save_pruned(folder / "start", smaller, pruned.masks, description)
        tuning = config.with_values({"model.checkpoint": start, "optim.epochs": epochs})
        tuning = tuning.with_values({"optim.warmup_epochs": min(tuning.optim.warmup_epochs, 0.2 * tuning.optim.epochs)})
        process = TrialProcess(device, shared.threads, report)
        result = finished_run(folder) or fit(tuning.resolve(), process, folder, data, hooks_for(tuning))
        smaller, _ = ckpt.load_model(folder, device=device)
        metrics = dict(result["metrics"])
    else:
        metrics = {}
    amp = resolve_amp(config.optim.amp, device)
    accuracy = meter.accuracy(smaller, data, data.val, config.eval.batch_size, amp)
    metrics |= meter.size(smaller)
    metrics |= {"val/accuracy": accuracy, "val/drop": baseline["val/accuracy"] - accuracy}
    result = {"status": "finished", "metrics": metrics, "seed": config.seed, **environment(device)}
    if not epochs:
        tracker = Tracker(folder, config, 0, 0)
        tracker.scalars(metrics, 0)
        tracker.close()
    return result


def finished_run(folder: Path) -> dict[str, Any] | None:
    """What the training in a trial's folder left, if the trial was ended between it and its own result."""
    try:
        return finished_result(folder)
    except CheckpointError:  # damaged: the trainer writes it again, from its last checkpoint
        return None


def train_trial(shared: Shared, config: RunConfig, folder: Path, report: Report) -> dict[str, Any]:
    """Train as train.py would, from the folder's newest checkpoint if there is one; reports every epoch but the last,
    which is reported with the result: a trial that is stopped there saves nothing and loses its test."""

    def report_epoch(metrics: Mapping[str, float]) -> None:
        epochs = epochs_of(folder)
        if metrics.get("epoch", epochs[-1]["epoch"]) < config.optim.epochs:
            report({**metrics, "val/best_accuracy": max(map(best_accuracy, [metrics, *epochs]))})

    result = finished_run(folder)
    if result is None and shared.workers > 1:
        result = _train_nested(shared, config, folder, report_epoch)
    elif result is None:
        process = TrialProcess(own_device(), shared.threads, report_epoch)
        result = fit(config, process, folder, shared.data, hooks_for(config))
    return {**result, "metrics": {**result["metrics"], "val/best_accuracy": max(map(best_accuracy, epochs_of(folder)))}}


def _train_nested(shared: Shared, config: RunConfig, folder: Path, report_epoch: Report) -> dict[str, Any]:
    """A Ray Train run of several workers inside the trial, followed by its metrics.jsonl."""
    from ray_jobs.launch.run import train_with_workers

    def work() -> dict[str, Any]:
        return train_with_workers(config, folder, shared.workers, shared.gpu, shared.threads)

    seen = 0
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


def best_accuracy(metrics: Mapping[str, float]) -> float:
    """The better of the raw and the averaged weights' validation accuracy; -1 where there is none."""
    return max(metrics.get("val/accuracy", -1.0), metrics.get("val/ema_accuracy", -1.0))
