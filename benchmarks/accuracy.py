"""Accuracy at equal epochs: our models and others' with the same data, augmentation, mixing, optimizer, rate, schedule,
average of weights and precision, through the parts of our trainer. No layer decay: only our models have its layers.

Nothing is kept, compiled or resumed. The better of raw and averaged weights on the validation split is tested, once,
after the last epoch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import others
from benchmarks.timing import Row, synchronize
from mamba.config.presets import get_preset
from mamba.config.schema import RunConfig
from mamba.data.device_loader import make_train_batches
from mamba.data.images import ImageData
from mamba.data.mix import BatchMix
from mamba.data.registry import load_data
from mamba.models.model import Architecture, MambaModel, count_parameters
from mamba.train.distributed import Process, local_process
from mamba.train.ema import ModelEma
from mamba.train.evaluate import evaluate
from mamba.train.loss import TrainingLoss
from mamba.train.optim import make_optimizer
from mamba.train.precision import resolve_amp
from mamba.train.schedule import learning_rate
from mamba.train.step import OptimizerStep


def rows(
    models: Sequence[str],
    epochs: int,
    preset: str = "v2",
    dataset: str = "folder",
    root: str = "data",
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
) -> Iterator[Row]:
    """A row a model: a named size of ours or one of benchmarks/others.py. overrides: config values, dotted keys."""
    values = {"data.dataset": dataset, "data.root": Path(root), "data.img_size": 32, "seed": seed,
              "optim.layer_decay": 1.0, "optim.epochs": epochs, **(overrides or {})}  # fmt: skip
    base = get_preset(preset).with_values(values)
    process, toy = local_process(), "model.depth" in (overrides or {})
    data: ImageData | None = None
    for name in models:
        ours = name not in others.OTHERS
        config = (base.with_values({"model.name": name}) if ours else base).resolve()
        data = data or load_data(config.data, config.seed)
        yield {"model": name, "epochs": epochs, **train(name if not ours else None, config, data, process, toy)}


def train(other: str | None, config: RunConfig, data: ImageData, process: Process, toy: bool) -> Row:
    """One model from its first weights to its test accuracy."""
    device, optim, classes = process.device, config.optim, len(data.classes)
    torch.manual_seed(config.seed)
    if other is None:
        model: nn.Module = MambaModel(Architecture.from_config(config.model, classes, data.side))
    else:
        model = others.other(other, classes, data.side, toy=toy)
    model.to(device)
    ema = ModelEma(model, config.ema.decay)
    if isinstance(model, MambaModel):
        optimizer = make_optimizer(model, optim)
    else:
        parts = others.groups(model, optim.weight_decay)
        optimizer = torch.optim.AdamW(parts, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True)
    amp = resolve_amp(optim.amp, device)
    loss = TrainingLoss(config, classes, data.side, device, amp)
    step: Any = OptimizerStep(optim, process, model, ema, optimizer, loss, amp)  # type: ignore[arg-type]
    mix = BatchMix.from_config(config, classes)
    batches = make_train_batches(data, config.data, config.seed, 1, 0, 1, process.cpus, device)
    step.prepare()
    steps, taken, speeds = batches.sampler.steps, 0, []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for epoch in range(optim.epochs):
        model.train()
        began = time.perf_counter()
        for i, (images, labels) in enumerate(batches.epoch(epoch, 0)):
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            step([mix(images, labels, epoch, i)], learning_rate(optim, taken, steps))
            taken += 1
        synchronize(device)
        speeds.append(steps * config.data.batch_size / (time.perf_counter() - began))
    last = speeds[1:] or speeds  # the first epoch warms up and records
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    score = partial(evaluate, data=data, process=process, batch_size=config.eval.batch_size, amp=amp)
    chosen, val = model, None
    if data.val is not None:
        raw, average = (score(m, split=data.val).accuracy for m in (model, ema.model))
        chosen, val = (ema.model, average) if average > raw else (model, raw)
    row = {
        "params": count_parameters(model),
        "val_accuracy": val,
        "test_accuracy": score(chosen, split=data.test).accuracy,
        "train_loss": float(step.totals[0] / step.totals[1]),
        "images_per_s": sorted(last)[len(last) // 2],
        "images_per_s_low": min(last),
        "images_per_s_high": max(last),
        "peak_gib": peak,
        "batch": config.data.batch_size,
        "train_images": len(data.train),
    }
    step.recorded = None  # it refers to itself
    return row
