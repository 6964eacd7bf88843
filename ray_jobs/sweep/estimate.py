"""What a sweep will take, before it starts: trials, time from a step that is measured here, disk.

A few optimizer steps of the first trial run on random images of the right shape, in this process and a folder that is
removed again: nothing is downloaded, and no cluster is needed. Other trials are counted by their MACs and images.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mamba.config.schema import RunConfig
from mamba.data.images import ImageData, ImageSet
from mamba.data.registry import describe
from mamba.data.split import VAL_FRACTION
from mamba.errors import ConfigError
from mamba.models.model import Architecture
from mamba.runs import checkpoint as ckpt
from mamba.runs.environment import environment
from mamba.runs.provenance import with_split
from mamba.train.distributed import Process, own_device
from mamba.train.evaluate import evaluate
from mamba.train.precision import resolve_amp
from mamba.train.state import save, write_checkpoint
from mamba.train.trainer import Trainer
from pruning.rounds import hooks_for
from ray_jobs.launch.cluster import Cluster
from ray_jobs.sweep.checks import configs_of
from ray_jobs.sweep.experiment import Experiment
from ray_jobs.sweep.results import rows
from ray_jobs.sweep.run import resources

SECONDS = 2.0
"""How long steps are timed."""
BENCH_S = 1.0
"""Latency and throughput of a cut, once all are done."""


@dataclass(frozen=True)
class Measured:
    """What steps took on a device."""

    device: str
    step_s: float
    """Of one optimizer step of `batch` images; 0 where nothing trains."""
    batch: int
    eval_image_s: float
    """Of one image of validation."""
    disk: int
    """Bytes that a trial keeps."""
    macs: float


class _Timed(Trainer):
    """On random images there is nothing to compare."""

    def check_models(self) -> None:
        pass


def measure(config: RunConfig, seconds: float = SECONDS) -> Measured:
    """Time a resolved config's training step, and its validation, on this process's device.

    Raises:
        ForgeError: it cannot be made, or does not fit into memory.
    """
    classes, _ = describe(config.data, config.seed)
    device = own_device()
    gpu = device.type == "cuda"
    batch = config.data.batch_size if gpu else min(config.data.batch_size, max(32, config.data.repeats))
    warm, timed = (14, 40) if gpu else (1, 20)
    quiet = {"tracking.backends": (), "optim.compile": False, "data.batch_size": batch, "scaling.num_workers": 0}
    quiet |= {} if gpu else {"optim.accumulate": 1, "data.loader_workers": 0}
    own = config.with_values(quiet)
    data = random_images(config.data.img_size or 32, classes, batch * (warm + timed), 256 if gpu else 64)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Timed(own, Process(device=device), Path(folder), data, hooks_for(own))
        try:
            trainer.model.train()
            for hook in trainer.hooks:
                hook.begin_epoch(0, own.optim.epochs)
            began, taken = 0.0, 0
            for i, micro in enumerate(trainer.steps()):
                if i == warm:
                    _wait(device)
                    began = time.perf_counter()
                trainer.train_step(micro)
                trainer.step += 1
                if i >= warm:
                    taken += 1
                    if not gpu and time.perf_counter() - began > seconds:
                        break
            _wait(device)
            step = (time.perf_counter() - began) / max(1, taken)
            assert data.val is not None
            eval_s = _seconds(lambda: trainer.evaluate(trainer.model, data.val or data.test), device) / len(data.val)
            save(trainer)
            write_checkpoint(trainer, "best-00001", None)
            trainer.writer.wait()
            disk = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            macs = float(trainer.model.architecture.macs())
        finally:
            trainer.close()
    return Measured(name_of(device), step * config.data.batch_size / batch, config.data.batch_size, eval_s, disk, macs)


def measure_evaluation(checkpoint: Path, config: RunConfig) -> Measured:
    """Time the validation of a trained model, for trials that only cut it."""
    device = own_device()
    model, _ = ckpt.load_model(checkpoint, device=device)
    base = model.architecture
    data = random_images(base.img_size, base.num_classes, 1, 256 if device.type == "cuda" else 64)
    amp = resolve_amp(config.optim.amp, device)
    process, split = Process(device=device), data.test
    taken = _seconds(lambda: evaluate(model, data, split, process, config.eval.batch_size, amp), device)
    return Measured(name_of(device), 0.0, 0, taken / len(split), 100_000, float(base.macs()))


def random_images(side: int, classes: int, train: int, held: int) -> ImageData:
    """Images of noise: `train` to train on, `held` to validate on."""
    rng = np.random.default_rng(0)
    few = max(classes, 64)
    pixels = rng.integers(0, 256, (few, side, side, 3), dtype=np.uint8)
    labels = np.arange(few, dtype=np.int64) % classes

    def split(n: int) -> ImageSet:
        return ImageSet(pixels, labels, np.arange(n) % few)

    names = tuple(map(str, range(classes)))
    return ImageData(split(train), split(held), split(held), names, (0.5,) * 3, (0.25,) * 3)


def _seconds(work: object, device: torch.device) -> float:
    assert callable(work)
    work()
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def name_of(device: torch.device) -> str:
    hardware = environment(device)["hardware"]
    return str(hardware.get("gpu") or f"a CPU with {hardware.get('cpus', '?')} cores")


def estimated(experiment: Experiment, left: int | None = None, seconds: float = SECONDS) -> str:
    """What is left of an experiment, in a few lines: trials, time, disk.

    Raises:
        ForgeError: what can be found wrong without the data.
    """
    space = experiment.space
    left = experiment.count if left is None else left
    configs = configs_of(space, experiment.trials, experiment.config.with_values(space.fixed))
    configs = [with_split(config, experiment.checkpoint) for config in configs]
    if not configs or not left:
        return f"{left} trials are left"
    measuring = space.kind == "measure"
    tuned = [config for config in configs if config.cut.finetune_epochs]
    threads = torch.get_num_threads()
    try:
        if own_device().type == "cpu":
            torch.set_num_threads(1)  # as a trial has
        if measuring:
            assert experiment.checkpoint is not None
            found = measure_evaluation(experiment.checkpoint, configs[0])
            if tuned:
                start = {"model.checkpoint": experiment.checkpoint}
                step = measure(tuned[0].with_values(start), seconds)
                found = replace(step, disk=step.disk + found.disk, eval_image_s=found.eval_image_s)
        else:
            found = measure(configs[0], seconds)
    finally:
        torch.set_num_threads(threads)
    each = [trial_seconds(config, found, measuring) for config in configs]
    if space.kind == "rounds":  # that a round's model is smaller is not counted
        trainings = [config.prune.rounds + (config.model.checkpoint is None) for config in configs]
        each = [seconds * count for seconds, count in zip(each, trainings, strict=True)]
        found = replace(found, disk=found.disk * max(trainings))
    total = left * sum(each) / len(each)
    return "\n".join(_lines(experiment, left, total, found, configs))


def trial_seconds(config: RunConfig, found: Measured, measuring: bool) -> float:
    """How long one trial computes, where another's step was measured."""
    classes, train = describe(config.data, config.seed)
    share = VAL_FRACTION if config.data.val_fraction is None else config.data.val_fraction
    held = train * share / (1 - share)
    size = 1.0
    if not measuring and config.model.checkpoint is None:
        size = Architecture.from_config(config.model, classes, config.data.img_size or 32).macs() / found.macs
    epochs = config.cut.finetune_epochs if measuring else config.optim.epochs
    step = found.step_s * config.data.batch_size / found.batch if found.batch else 0.0
    weights = 2 if config.ema.enabled else 1
    validations = epochs / config.eval.every * weights
    seconds = size * epochs * (train // config.data.batch_size) * step + size * validations * held * found.eval_image_s
    if measuring:
        seconds += held * found.eval_image_s + (BENCH_S if config.cut.structured else 0.0)
    return seconds


def _lines(experiment: Experiment, left: int, total: float, found: Measured, configs: Sequence[RunConfig]) -> list[str]:
    device = own_device()
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    at_once = None
    with suppress(ConfigError):
        at_once = min(left, resources(experiment, Cluster(os.cpu_count() or 1, gpus, "here")).concurrent)
    kind = "GPU" if gpus else "CPU"
    most = "at most " if experiment.space.early_stop else "about "
    # measure trials share a GPU: together they are as fast as one after the other
    spread = max(1, gpus) if experiment.space.kind == "measure" and gpus else at_once
    together = f", {_time(total / spread)} with {at_once} at once" if at_once and spread and spread > 1 else ""
    step = f"{1000 * found.step_s:.3g} ms a step of {found.batch} images" if found.batch else (
        f"{1000 * found.eval_image_s:.3g} ms an image to validate"
    )  # fmt: skip
    lines = [f"{left} trials: {most}{_time(total)} of {kind} time{together}",
             f"measured on {found.device}: {step}; Ray's start, decoding and the test are not counted"]  # fmt: skip
    free = _free(experiment.config.out)
    lines.append(f"disk: {_bytes(left * found.disk)}, {_bytes(found.disk)} a trial; {_bytes(free)} are free")
    if left * found.disk > free:
        lines.append("that is more than is free: lower checkpoint.keep, or choose another --out")
    return lines


def _free(path: Path) -> int:
    path = path.expanduser().absolute()
    there = next(parent for parent in (path, *path.parents) if parent.is_dir())
    return shutil.disk_usage(there).free


def _time(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} seconds"


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def left_of(folder: Path, experiment: Experiment) -> int:
    """Trials of an experiment's folder that have no result."""
    return max(0, experiment.count - len(rows(folder)))
