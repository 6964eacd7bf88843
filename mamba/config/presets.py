"""Named full runs. Each is a function, so that its docstring can say what it is, what it costs and what to expect.

A preset is a starting point: every key can still be overridden. Each says `Cost:` and `Score:`, both measured, with the
hardware beside, or "not yet measured"; what its authors hoped for is no measurement.
"""

from __future__ import annotations

from collections.abc import Callable

from mamba.config.schema import RunConfig
from mamba.errors import ConfigError


def quickstart() -> RunConfig:
    """A small Mamba on scikit-learn's 8x8 digits: nothing to download, no GPU.

    Cost: measured, about a minute on 2 CPU cores, Ray's start included. Score: measured, 97.5 to 98.3 % test accuracy
    over three seeds on 2 CPU cores (docs/LOG.md).
    """
    return RunConfig(name="quickstart").with_values(
        {
            "data.dataset": "digits",
            "data.batch_size": 64,
            "data.augment": "none",
            "model.name": "mamba_tiny",
            "model.d_model": 64,
            "model.depth": 4,
            "model.drop_path": 0.1,
            "optim.epochs": 20,
            "optim.lr": 2e-3,
            "optim.warmup_epochs": 2,
            "ema.decay": 0.99,
        }
    )


def v1() -> RunConfig:
    """The plain recipe: mamba_small, 300 epochs of CIFAR-10, RandAugment, mixup, cutmix, linear warm-up, float32.

    Cost: not yet measured at full length. Score: not yet measured (its authors hoped for 94 to 95.5 %).
    """
    return RunConfig(name="v1").with_values(
        {
            "data.augment": "randaugment",
            "data.mixup": 0.8,
            "data.cutmix": 1.0,
            "optim.warmup": "linear",
            "optim.grad_clip": None,
            "optim.amp": "off",
            "ema.enabled": False,
            "checkpoint.every": 5,
        }
    )


def stage1() -> RunConfig:
    """v1 with drop path 0.1, random erasing 0.25, gradient clipping at norm 1 and EMA 0.9999.

    Cost: not yet measured. Score: not yet measured (its authors hoped for 95.5 to 97 %).
    """
    return v1().with_values(
        {
            "name": "stage1",
            "model.drop_path": 0.1,
            "data.random_erasing": 0.25,
            "optim.grad_clip": 1.0,
            "ema.enabled": True,
        }
    )


def v2() -> RunConfig:
    """The full recipe (stage 2): stage1 with mixed precision, layer-wise learning rates, AutoAugment in place of
    RandAugment, exponential warm-up. 300 epochs, batch 128, lr 1e-3, weight decay 0.05, 20 warm-up epochs.

    Cost: measured, 10,500 images/s on one H100 and 11,368 on one H200 (docs/BENCHMARKS.md), so 21 minutes of training.
    Score: at full length not yet measured (its authors hoped for 97 to 98 %); measured on one H100, of CIFAR-10 as JPEG
    of quality 75: validation 72.9 % at epoch 20, 84.5 at 100, 88.9 at 215 of 300 (the average of the weights 89.3),
    which heads for about 91. A layer decay of 0.65 is a value for fine-tuning: from scratch the first blocks hardly
    learn. It stays here because it is the recipe's.
    """
    return stage1().with_values(
        {
            "name": "v2",
            "data.augment": "autoaugment",
            "optim.amp": "auto",
            "optim.layer_decay": 0.65,
            "optim.warmup": "exponential",
        }
    )


def stage2() -> RunConfig:
    """v2 by its name in the recipes' original notes.

    Cost: as measured for v2 on one H100. Score: as measured for v2 on one H100.
    """
    return v2().with_values({"name": "stage2"})


def stage3() -> RunConfig:
    """v2 with scans from both ends, a convolutional stem, and five views of each test image. With
    `--distill.teacher RUN` it learns from a trained model besides.

    Cost: 26,121,418 parameters and 1.6 times v2's multiply-accumulates; time not yet measured. Score: not yet measured
    (its authors hoped for 97 to 98 %). With layer decay 1.0, batch 512 and lr 2e-3, measured on one H100, of CIFAR-10
    as JPEG of quality 75: 8,500 images/s, validation 83.5 % at epoch 30, 91.3 at 175 of 240.
    """
    return v2().with_values(
        {"name": "stage3", "model.mixer": "bidirectional", "model.stem": "conv", "eval.tta_views": 5}
    )


def cct() -> RunConfig:
    """The public recipe of Compact Convolutional Transformers (https://arxiv.org/abs/2104.05704, its published settings
    for 300 epochs of CIFAR-10), with mamba_tiny in the transformer's place: 256 tokens from one convolution and max
    pooling, attention pooling, random resized crop, RandAugment of increasing severity, mixup or cutmix of every batch
    up to epoch 175, no layer decay. Ours beside it: gradients clipped at norm 1, and the average of the weights.

    Cost: not yet measured. Score: not yet measured (the transformer, of 3.8 million parameters, is published with
    96.53 %).
    """
    return RunConfig(name="cct").with_values(
        {
            "data.augment": "randaugment_inc",
            "data.crop": "resized",
            "data.crop_scale": 0.8,
            "data.mixup": 0.8,
            "data.cutmix": 1.0,
            "data.mix_prob": 1.0,
            "data.mix_off_epochs": 125,
            "model.name": "mamba_tiny",
            "model.stem": "cct",
            "model.stride": 2,
            "model.head": "attention",
            "model.drop_path": 0.1,
            "optim.lr": 5.5e-4,
            "optim.min_lr": 1e-5,
            "optim.weight_decay": 0.06,
            "optim.warmup": "linear",
            "optim.warmup_epochs": 10,
        }
    )


def best_cifar10() -> RunConfig:
    """The best of CIFAR-10 that was measured: `cct` with Muon, batch 512, 300 epochs of all 50,000 training images, so
    without validation: for a recipe that is settled. Where something is still to be chosen, add
    `--data.val-fraction 0.1`. Half as long: `--optim.epochs 140 --optim.warmup-epochs 6 --data.mix-off-epochs 56`.

    Cost: measured on two H100, 982 s of training (15,700 images/s). Score: measured on two H100, 96.35 % of the test
    set, one seed; of 140 epochs 95.28 % (docs/RESULTS.md).
    """
    return cct().with_values(
        {
            "name": "best_cifar10",
            "data.dataset": "cifar10",
            "data.batch_size": 512,
            "data.val_fraction": 0.0,
            "optim.optimizer": "muon",
            "optim.lr": 4e-3,
            "ema.decay": 0.999,
        }
    )


def vim_cifar() -> RunConfig:
    """v2 with Vision Mamba's tiny size for 32x32 images: patches of 4 pixels, a class token in the middle.

    Cost: 6,793,354 parameters; time not yet measured. Score: not yet measured.
    """
    return v2().with_values({"name": "vim_cifar", "model.name": "vim_tiny"})


def overfit() -> RunConfig:
    """v2 for a run that overfits: weight decay 0.08, drop path 0.15, label smoothing 0.15.

    Cost: not yet measured. Score: not yet measured.
    """
    return v2().with_values(
        {"name": "overfit", "optim.weight_decay": 0.08, "model.drop_path": 0.15, "optim.label_smoothing": 0.15}
    )


def underfit() -> RunConfig:
    """v2 for a run that underfits: weight decay 0.03, drop path 0.05, 400 epochs.

    Cost: a third more than v2, not yet measured. Score: not yet measured.
    """
    return v2().with_values(
        {"name": "underfit", "optim.weight_decay": 0.03, "model.drop_path": 0.05, "optim.epochs": 400}
    )


def unstable() -> RunConfig:
    """v2 for a run that is unstable: gradients clipped at norm 0.5, 30 warm-up epochs, learning rate 5e-4.

    Cost: not yet measured. Score: not yet measured.
    """
    return v2().with_values({"name": "unstable", "optim.grad_clip": 0.5, "optim.warmup_epochs": 30, "optim.lr": 5e-4})


PRESETS: dict[str, Callable[[], RunConfig]] = {
    f.__name__: f
    for f in (quickstart, v1, stage1, v2, stage2, stage3, cct, best_cifar10, vim_cifar, overfit, underfit, unstable)
}


def get_preset(name: str) -> RunConfig:
    """Raises ConfigError for an unknown name, with the valid ones."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset '{name}'; valid: {', '.join(PRESETS)}")
    return PRESETS[name]()
