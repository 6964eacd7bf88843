"""Every benchmark once: what it runs, at full size and as a toy, and what its table shows.

To add one: a function that yields rows (plain dictionaries) in a file of this folder, an entry here, and its two marks
in docs/BENCHMARKS.md (`benchmarks/page.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mamba.errors import ConfigError

Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark and its table."""

    title: str
    rows: str
    """`module:function` of this folder; called with the settings it yields the rows."""
    device: str
    """cuda or cpu: where its numbers mean something. As a toy it runs anywhere."""
    settings: dict[str, Any]
    toy: dict[str, Any]
    """Over `settings`, for a test on a CPU."""
    keys: tuple[str, ...]
    """What tells a row from the others."""
    better: dict[str, str]
    """Measured value -> up or down, whichever is better. Its range, where known, is under `_low` and `_high`."""
    columns: dict[str, str]
    """Key of a row -> heading, in order."""
    note: str = ""
    """What a reader of the table must know."""
    across: tuple[str, tuple[str, ...]] | None = None
    """(key, values): one table a value, whose columns are the values of the key instead of its rows."""
    figure: tuple[str, str] | None = field(default=None)
    """`module:function` that draws the rows, and the file below docs/."""

    def run(self, settings: dict[str, Any]) -> Iterable[Row]:
        return resolved(self.rows)(**settings)


def resolved(name: str) -> Callable[..., Any]:
    """The function that `module:function` names, imported now: a list of benchmarks needs no torch."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(f"benchmarks.{module}"), function)


TOY_MODEL = {"model.d_model": 16, "model.depth": 2, "model.d_state": 4}
DIGITS = {"dataset": "digits", "epochs": 1}
STEP = {"images_per_s": "images/s", "wait_percent": "waiting for data, %", "first_step_s": "first step, s",
        "peak_gib": "memory, GiB"}  # fmt: skip

BENCHMARKS: dict[str, Benchmark] = {
    "train_step": Benchmark(
        "Training step",
        "train_step:rows",
        "cuda",
        {"models": ["mamba_tiny", "mamba_small", "mamba_base"], "batches": [128, 1024], "modes": ["recorded"]},
        {**DIGITS, "models": ["mamba_tiny"], "batches": [16], "modes": ["plain"], "steps": 2, "isolated": False,
         "variants": {"-": TOY_MODEL}},
        ("model", "batch", "mode", "scan", "variant"),
        {"images_per_s": "up", "peak_gib": "down", "first_step_s": "down"},
        {"model": "model", "batch": "batch", "mode": "mode", **STEP},
        "Real training through the Trainer: preset v2 with everything on (AutoAugment, erasing, mixup, cutmix, EMA, "
        "clipping, layer-wise decay, bf16), recorded and compiled, which is the default of long runs. Median epoch.",
    ),
    "scans_in_training": Benchmark(
        "The same training with other scans",
        "train_step:rows",
        "cuda",
        {"models": ["mamba_small"], "batches": [128], "modes": ["plain"], "scans": ["default", "mamba_ssm", "loop"],
         "steps": 8, "epochs": 1},
        {**DIGITS, "models": ["mamba_tiny"], "batches": [16], "modes": ["plain"], "scans": ["loop"],
         "steps": 2, "isolated": False, "variants": {"-": TOY_MODEL}},
        ("model", "batch", "mode", "scan", "variant"),
        {"images_per_s": "up", "peak_gib": "down"},
        {"model": "model", "batch": "batch", "scan": "scan", "mode": "mode", **STEP},
        "`loop` is the prototype's way, a loop over tokens in Python; `mamba_ssm` its kernel, where it is installed.",
    ),
    "precision": Benchmark(
        "Mixed precision against float32",
        "train_step:rows",
        "cuda",
        {"models": ["mamba_small"], "batches": [128, 256], "modes": ["graph"], "epochs": 2, "steps": 60,
         "variants": {"bf16": {"optim.amp": "bf16"}, "float32": {"optim.amp": "off"}}},
        {**DIGITS, "models": ["mamba_tiny"], "batches": [16], "modes": ["plain"], "steps": 2, "isolated": False,
         "variants": {"bf16": {**TOY_MODEL, "optim.amp": "bf16"}, "float32": {**TOY_MODEL, "optim.amp": "off"}}},
        ("model", "batch", "mode", "scan", "variant"),
        {"images_per_s": "up", "peak_gib": "down"},
        {"model": "model", "batch": "batch", "variant": "precision", **STEP},
        "Training as above, recorded and not compiled. Matrix products of float32 use TF32 where torch does by default "
        "(it does not).",
    ),
    "scaling": Benchmark(
        "Several GPUs against one",
        "scaling:rows",
        "cuda",
        {"gpus": [1, 2], "batches": [128, 1024]},
        {**DIGITS, "gpus": [2], "batches": [16], "model": "mamba_tiny", "mode": "plain", "steps": 2,
         "overrides": TOY_MODEL},
        ("model", "gpus", "batch", "gradients"),
        {"images_per_s": "up", "peak_gib": "down"},
        {"model": "model", "batch": "batch a GPU", "gpus": "GPUs", "images_per_s": "images/s", "ratio": "ratio",
         "peak_gib": "memory a GPU, GiB"},
        "The same batch a GPU; three epochs timed each.",
    ),
    "side_by_side": Benchmark(
        "The models side by side",
        "side_by_side:rows",
        "cuda",
        {"models": ["mamba_small", "vit_small", "vit_small:plain", "mamba_small:loop", "vim_small", "vim_tiny",
                    "mamba_small:mamba_ssm"],
         "sizes": [224, 512, 1024, 1248], "batch": 128, "memory_batch": 2, "loop_batch": 16, "loop_size": 224,
         "seconds": 0.3},
        {"models": ["vit_small", "vit_small:plain", "resnet50", "vim_tiny", "mamba_small:loop"], "sizes": [16],
         "batch": 2, "memory_batch": 1, "loop_batch": 1, "loop_size": 32, "seconds": 0.0, "d_model": 16, "depth": 2},
        ("model", "how", "img_size", "compiled"),
        {"forward_images_per_s": "up", "training_images_per_s": "up", "training_mib_per_image": "down",
         "forward_mib_per_image": "down"},
        {"model": "model", "how": "scan or attention", "params": "parameters"},
        "1,000 classes, patches of 16 pixels. vit_small stands for DeiT-S and ViT-S, which are one network; `plain` "
        "attention writes the scores of all pairs of tokens to memory. `loop` is the prototype's way: a loop over "
        "tokens in Python, launched one by one; the others are recorded and not compiled. Memory is what an image "
        "takes in a pass of two, beyond weights and gradients.",
        across=("img_size", ("training_images_per_s", "forward_images_per_s", "training_mib_per_image",
                             "forward_mib_per_image")),
        figure=("side_by_side:draw", "images/models.png"),
    ),
    "accuracy": Benchmark(
        "Accuracy at equal epochs",
        "accuracy:rows",
        "cuda",
        {"models": ["mamba_small", "vit_small", "resnet50"], "epochs": 10,
         "overrides": {"data.batch_size": 512, "optim.lr": 1e-3, "optim.warmup_epochs": 1, "ema.decay": 0.998}},
        {"models": ["mamba_tiny", "vit_small"], "dataset": "digits", "epochs": 1,
         "overrides": {**TOY_MODEL, "data.batch_size": 256, "optim.warmup_epochs": 0, "data.img_size": 8}},
        ("model", "epochs"),
        {"val_accuracy": "up", "test_accuracy": "up", "images_per_s": "up", "peak_gib": "down"},
        {"model": "model", "params": "parameters", "epochs": "epochs", "val_accuracy": "validation, %",
         "test_accuracy": "test, %", "images_per_s": "images/s", "peak_gib": "memory, GiB"},
        "The same data, augmentation, mixing, optimizer, rate, schedule and average of weights (preset v2 without "
        "layer decay). One seed; what each model would reach with a recipe of its own is another question. vit_small "
        "is DeiT-S and ViT-S with patches of 4 pixels, ResNet-50 begins with a 3x3 convolution of stride 1.",
    ),
    "scan": Benchmark(
        "The scan's backends on a GPU",
        "scan:rows",
        "cuda",
        {"graph": True, "seconds": 0.7},
        {"shapes": ["1x4x6x2"], "repeats": 3, "seconds": 0.01, "backends_": ["reference", "two_phase", "cpu"]},
        ("shape", "mode", "backend"),
        {"median_ms": "down"},
        {"shape": "batch x channels x length x states", "mode": "mode", "backend": "backend", "median_ms": "ms",
         "ratio": "over one way"},
        "bf16, CUDA graph replays. How it got there: scan-notes.md.",
    ),
    "input": Benchmark(
        "Making batches, GPU machine",
        "input:rows",
        "cuda",
        {"augments": ["basic", "autoaugment"], "workers": [16], "epochs": 1},
        {**DIGITS, "augments": ["none", "basic"], "workers": [0], "side": 8},
        ("augment", "way"),
        {"images_per_s": "up"},
        {"augment": "augmentation", "way": "way", "images_per_s": "images/s"},
        "Batches of 128, normalised and on the device; `loader N` has N processes.",
    ),
    "scan_cpu": Benchmark(
        "The scan's backends on a CPU",
        "scan:rows",
        "cpu",
        {"threads": 2, "repeats": 9, "seconds": 0.8},
        {"shapes": ["1x4x6x2"], "repeats": 3, "seconds": 0.01},
        ("shape", "mode", "backend"),
        {"median_ms": "down"},
        {"shape": "batch x channels x length x states", "mode": "mode", "backend": "backend", "median_ms": "ms",
         "speedup": "reference over it", "ratio": "over one way"},
        "float32, 2 threads. How it got there: cpu-scan-notes.md.",
    ),
    "input_cpu": Benchmark(
        "Making batches, CPU",
        "input:rows",
        "cpu",
        {"augments": ["none", "basic", "randaugment", "autoaugment"], "workers": [1], "dataset": "digits", "side": 8},
        {"augments": ["autoaugment"], "workers": [0], "epochs": 1},
        ("augment", "way"),
        {"images_per_s": "up"},
        {"augment": "augmentation", "way": "way", "images_per_s": "images/s"},
        "8x8 images, batch 128, erasing 0.25; `device` is the way of `data.device` gpu, which runs on a CPU too.",
    ),
    "cpu_steps": Benchmark(
        "A step of the quickstart model on a CPU",
        "cpu:steps",
        "cpu",
        {"scans": ["default", "two_phase", "loop", "none"], "batch": 64, "seconds": 4.0, "threads": 1},
        {"scans": ["default", "loop", "none"], "batch": 2, "seconds": 0.0, "threads": 1, "d_model": 8, "depth": 1},
        ("scan", "batch", "threads"),
        {"forward_ms": "down", "both_ms": "down"},
        {"scan": "scan", "threads": "threads", "forward_ms": "forward, ms", "both_ms": "forward and backward, ms"},
        "64 digits of 8x8, one thread, processor time. `loop` is the prototype's way, a loop over tokens in Python; "
        "`none` leaves out the scan.",
    ),
    "cpu_latency": Benchmark(
        "Latency of one image on a CPU, and the plans",
        "cpu:latency",
        "cpu",
        {"plans": ["stage2", "stage3"], "seconds": 8.0, "threads": [1, 2]},
        {"plans": ["stage3"], "seconds": 0.0, "threads": [1], "depth": 16, "d_model": 8},
        ("plan", "threads"),
        {"latency_ms": "down"},
        {"plan": "mamba_small, plan", "threads": "threads", "params": "parameters", "macs": "MACs",
         "latency_ms": "ms", "ratio": "dense over it", "macs_ratio": "MACs, dense over it"},
        "32x32, float32, batch 1, in turns; one thread in processor time, more in elapsed time. What it says of the "
        "claim (3 to 4 times for stage 3): below.",
    ),
    "export_cpu": Benchmark(
        "ONNX Runtime beside our own code on a CPU",
        "export:rows",
        "cpu",
        {"models": ["quickstart", "mamba_small"], "batches": [1, 16], "seconds": 8.0, "threads": 1},
        {"models": ["quickstart"], "batches": [2], "seconds": 0.0, "threads": 1, "d_model": 8, "depth": 1},
        ("model", "batch", "runtime", "threads"),
        {"forward_ms": "down"},
        {"model": "model", "params": "parameters", "batch": "batch", "runtime": "by", "forward_ms": "ms",
         "ratio": "ours over it"},
        "Forward pass, float32, 32x32 pixels (quickstart: 8x8), in turns; one thread, processor time. The file is that "
        "of export.py, in which a Scan node walks over the tokens.",
    ),
    "components": Benchmark(
        "What a cut costs and buys",
        "components:rows",
        "cpu",
        {},
        {"epochs": 1, "rates": [0.5], "components": ["linear_out"], "seconds": 0.01, "batch_size": 2,
         "overrides": {"model.d_model": 16, "model.d_state": 8, "model.depth": 16, "data.batch_size": 512}},
        ("what", "rate"),
        {"val_accuracy": "up", "images_per_s": "up", "latency_ms": "down"},
        {"what": "cut", "rate": "rate", "val_accuracy": "validation, %", "params": "parameters", "macs": "MACs",
         "images_per_s": "images/s", "latency_ms": "latency, ms"},
        "The quickstart model, not fine-tuned; of larger ones: PRUNING.md.",
    ),
    "sweep": Benchmark(
        "What a sweep adds to its trials",
        "sweep:rows",
        "cpu",
        {},
        {"epochs": 1},
        ("grid",),
        {"sweep_s": "down", "first_result_s": "down", "overhead_s": "down"},
        {"grid": "grid", "trials": "trials", "loop_s": "plain loop, s", "sweep_s": "sweep, s",
         "first_result_s": "to its first result, s", "overhead_s": "more a trial after that, s"},
        "The grid of components on the quickstart model, under Tune and in a plain loop.",
    ),
}  # fmt: skip


def chosen(names: list[str], device: str | None) -> list[str]:
    """The benchmarks of these names; of none: those whose numbers mean something on the device; None: all.

    Raises:
        ConfigError: one of them is unknown.
    """
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise ConfigError(f"unknown benchmark '{unknown[0]}'; valid: {', '.join(BENCHMARKS)}")
    return names or [name for name, b in BENCHMARKS.items() if device in (None, b.device)]
