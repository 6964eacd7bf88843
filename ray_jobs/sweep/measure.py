"""Trials that cut a trained model: cutting, fine-tuning, measuring, and timing what became smaller."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mamba.config.schema import RunConfig
from mamba.models.model import MambaModel
from mamba.runs import checkpoint as ckpt
from mamba.runs.environment import environment
from mamba.runs.tracking import Tracker
from mamba.train.distributed import Process, own_device
from mamba.train.evaluate import evaluate
from mamba.train.precision import resolve_amp
from mamba.train.trainer import fit
from pruning import measure as meter
from pruning.masks import Masks
from pruning.plans import carry_out, own_plan, reads_images
from pruning.record import save_record
from pruning.rounds import ShowCut, calibration_batches, hooks_for
from pruning.show import PICTURE, cut_picture
from pruning.shrink import Shrunk
from pruning.store import masks_of, of_cut, save_pruned
from ray_jobs.sweep.results import baseline_of, write_baseline
from ray_jobs.sweep.shared import Report, Shared, TrialProcess, data_of, finished_run, trial_config


@lru_cache(maxsize=1)
def trained_model(path: Path, device: torch.device) -> tuple[MambaModel, dict[str, Any], Masks]:
    """The model of a checkpoint, its description and its masks, loaded once a process. Cuts copy them."""
    return *ckpt.load_model(path, device=device), masks_of(path)


def cut_model(shared: Shared, config: RunConfig, device: torch.device) -> Shrunk:
    """The trained model, cut as `cut.*` says; what its checkpoint had masked stays masked."""
    assert shared.checkpoint is not None
    model, _, masks = trained_model(shared.checkpoint, device)
    plan, repair, batches = own_plan(config.cut), config.cut.repair, None
    if reads_images(plan, repair):
        data = data_of(shared, config)
        batches = [(x.to(device), y.to(device)) for x, y in calibration_batches(data, config.seed)]
    return carry_out(plan, model, calibration=batches, seed=config.seed, masks=masks, repair=repair)


def measure_trial(shared: Shared, config: RunConfig, folder: Path, report: Report) -> dict[str, Any]:
    """Cut the trained model as `cut.*` says, fine-tune it if asked to, and measure what is left."""
    assert shared.checkpoint is not None
    device = own_device()
    _, description, _ = trained_model(shared.checkpoint, device)
    data, epochs = data_of(shared, config), config.cut.finetune_epochs
    assert data.val is not None
    own_plan(config.cut)  # refused before anything is measured
    baseline = measured_baseline(shared, config, device)
    pruned = cut_model(shared, config, device)
    smaller = pruned.model
    folder.mkdir(parents=True, exist_ok=True)
    save_record(folder, pruned.record)
    metrics: dict[str, float] = {}
    if epochs:
        start = save_pruned(folder / "start", smaller, pruned.masks, of_cut(description))
        tuning = config.with_values({"model.checkpoint": start, "optim.epochs": epochs})
        tuning = tuning.with_values({"optim.warmup_epochs": min(tuning.optim.warmup_epochs, 0.2 * tuning.optim.epochs)})
        process = TrialProcess(device, shared.threads, report)
        result = finished_run(folder) or fit(
            tuning.resolve(), process, folder, data, [*hooks_for(tuning), ShowCut(folder)]
        )
        smaller, _ = ckpt.load_model(folder, device=device)
        metrics |= result["metrics"]
    amp = resolve_amp(config.optim.amp, device)
    loss, accuracy = evaluate(smaller, data, data.val, Process(device=device), config.eval.batch_size, amp)
    metrics |= meter.size(smaller)
    metrics |= {"val/loss": loss, "val/accuracy": accuracy, "val/drop": baseline["val/accuracy"] - accuracy}
    metrics |= {"val/best_accuracy": accuracy}  # these are the weights that are kept
    if not epochs:
        tracker = Tracker(folder, config, 0, 0)
        tracker.scalars(metrics, 0)
        if pruned.record is not None:
            tracker.pictures({PICTURE: cut_picture(pruned.record)}, 0)
        tracker.close()
    return {"status": "finished", "metrics": metrics, "seed": config.seed, **environment(device)}


_baselines: dict[Path, dict[str, float]] = {}


def measured_baseline(shared: Shared, config: RunConfig, device: torch.device) -> dict[str, float]:
    """Validation accuracy and size of the model that is cut: measured once a process, by its first trial, so that no
    sweep waits for it, and kept in the experiment's folder. `config` is any trial's: all measure on the same data."""
    path = shared.folder
    if path not in _baselines:
        baseline = baseline_of(path)
        if "val/accuracy" not in baseline:
            base, data = RunConfig(**shared.config), data_of(shared, config)
            assert shared.checkpoint is not None and data.val is not None
            model, *_ = trained_model(shared.checkpoint, device)
            amp = resolve_amp(base.optim.amp, device)
            accuracy = meter.accuracy(model, data, data.val, base.eval.batch_size, amp)
            images = float(len(data.val))
            baseline = write_baseline(path, {"val/accuracy": accuracy, "val/images": images, **meter.size(model)})
        _baselines[path] = baseline
    return _baselines[path]


def time_trials(shared: Shared, trials: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, float]]:
    """Speed of the dense model and of each trial's with nothing beside them, dense first. The models wait on the CPU:
    on a GPU there is one at a time."""
    assert shared.checkpoint is not None
    device = own_device()
    dense, *_ = trained_model(shared.checkpoint, device)
    models = [deepcopy(dense).cpu()]  # the one that is kept stays where it is
    for name, values in trials:
        models.append(cut_model(shared, trial_config(shared, name, values), device).model.cpu())
    amp = resolve_amp(RunConfig(**shared.config).optim.amp, device)
    batch_size = meter.usual_batch(device)
    return meter.speeds(models, batch_size, meter.SECONDS, amp, device)
