"""What follows from what, and what cannot be: values that others decide, and combinations that cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba.config import trackers
from mamba.config.choices import Registry
from mamba.config.facts import DATASETS, METHODS, MIXERS
from mamba.errors import ConfigError

if TYPE_CHECKING:
    from mamba.config.schema import ModelConfig, RunConfig

MODEL_SIZES = Registry(
    "model.name",
    {
        "mamba_tiny": (128, 16),
        "mamba_small": (192, 24),
        "mamba_base": (384, 32),
        "vim_tiny": (192, 24),
        "vim_small": (384, 24),
        "vim_base": (768, 24),
    },
)
"""Named models: (d_model, depth)."""

MOST_WEIGHTS = 1e11

CONV_STEMS = ("conv", "cct")
"""Values of `model.stem` that are 3x3 convolutions one after the other."""


def default_patch_size(img_size: int) -> int:
    """16 to 256 tokens for the image sizes in use: 2 up to 16 pixels, 4 up to 64, 16 above."""
    return 2 if img_size <= 16 else 4 if img_size <= 64 else 16


def resolved(config: RunConfig) -> RunConfig:
    """Fill in every value that follows from others, make paths absolute, and refuse what cannot run.

    Raises:
        ConfigError: names the keys, and what is valid.
    """
    trackers.check(config.tracking.backends)
    side = config.data.img_size or DATASETS[config.data.dataset].side
    if side is None:
        raise ConfigError(f"data.img_size is needed: data.dataset '{config.data.dataset}' has no side of its own")
    model = filled(config.model, side)
    if config.model.checkpoint is None:  # a trained model brings its own
        check_model(model, side)
    if config.data.batch_size % config.optim.accumulate:
        raise ConfigError(
            f"data.batch_size {config.data.batch_size} is not divisible by optim.accumulate {config.optim.accumulate}"
        )
    if config.data.batch_size % config.data.repeats:
        raise ConfigError(
            f"data.batch_size {config.data.batch_size} is not divisible by data.repeats {config.data.repeats}"
        )
    if config.data.mix_off_epochs > config.optim.epochs:
        raise ConfigError(
            f"data.mix_off_epochs {config.data.mix_off_epochs} is more than optim.epochs {config.optim.epochs}; it "
            "must not be"
        )
    if config.optim.min_lr > config.optim.lr:
        raise ConfigError(f"optim.min_lr {config.optim.min_lr} is above optim.lr {config.optim.lr}; it must not be")
    warmup, decay, epochs = config.optim.warmup_epochs, config.optim.decay_epochs, config.optim.epochs
    if config.optim.schedule == "wsd" and warmup + decay > epochs:
        raise ConfigError(
            f"optim.warmup_epochs {warmup:g} and optim.decay_epochs {decay:g} are longer together than optim.epochs "
            f"{epochs}; they must not be"
        )
    if config.optim.warmup_epochs > config.optim.epochs:
        raise ConfigError(
            f"optim.warmup_epochs {config.optim.warmup_epochs:g} is longer than optim.epochs {config.optim.epochs}; it "
            "must not be: lower it too, 0 is allowed"
        )
    for key, used, target in (
        ("prune.target", config.prune.method != "none", config.prune.target),
        ("penalty.target", config.penalty.kind != "off", config.penalty.target),
    ):
        if used and target == "mlp" and model.mlp_ratio == 0 and config.model.checkpoint is None:
            raise ConfigError(f"{key} 'mlp' needs an MLP and model.mlp_ratio 0 has none; valid: ssm, both")
    for own, other in (("ssm", "mlp"), ("mlp", "ssm")):
        given = getattr(config.prune, f"{own}_rate")
        if config.prune.method != "none" and config.prune.target == other and given is not None:
            raise ConfigError(
                f"prune.{own}_rate {given:g} has no effect with prune.target '{other}'; leave it out, or choose "
                f"prune.target {own} or both"
            )
    if config.prune.rewind_epoch >= config.optim.epochs:
        raise ConfigError(
            f"prune.rewind_epoch {config.prune.rewind_epoch} is not before the end of optim.epochs "
            f"{config.optim.epochs}; it must be"
        )
    if METHODS[config.prune.method].decays and config.grow_epochs() >= config.optim.epochs:
        raise ConfigError(
            f"prune.grow_fraction {config.prune.grow_fraction:g} of optim.epochs {config.optim.epochs} leaves no epoch "
            "after the cut; lower it or train for more epochs"
        )
    return config.with_values(
        {
            "model.checkpoint": _absolute("model.checkpoint", config.model.checkpoint),
            "distill.teacher": _absolute("distill.teacher", config.distill.teacher),
            "data.img_size": side,
            "data.root": _absolute("data.root", config.data.root),
            "data.split_from": _absolute("data.split_from", config.data.split_from),
            "out": _absolute("out", config.out),
            **{f"model.{key}": value for key, value in model if key != "checkpoint"},
        }
    )


def _absolute(key: str, path: Path | None) -> Path | None:
    if path and "\0" in str(path):
        raise ConfigError(f"{key} {str(path)!r}: no path holds a null character")
    try:
        return path.expanduser().absolute() if path else None
    except RuntimeError:  # the home of a user who is none
        raise ConfigError(f"{key} {path}: there is no such home folder") from None


def filled(model: ModelConfig, img_size: int) -> ModelConfig:
    """With every value that is None taken from the named model or the image size, `checkpoint` excepted."""
    width, depth = MODEL_SIZES[model.name]
    if model.stem not in CONV_STEMS:
        layers, patch_size = None, model.patch_size or default_patch_size(img_size)
        stride = patch_size
    else:
        stride = model.stride or _conv_stride(model.stem, model.stem_layers)
        layers, patch_size = 3 if model.stem == "conv" else stride.bit_length() - 1, stride
    follows = {
        "d_model": width,
        "depth": depth,
        "patch_size": patch_size,
        "stride": stride,
        "stem_layers": layers,
        "class_token": "middle" if model.is_vim else "none",
        "mixer": "bidirectional_shared" if model.is_vim else "forward",
        "mlp_ratio": 0.0 if model.is_vim else 4.0,
    }
    return model.model_copy(update={key: v for key, v in follows.items() if getattr(model, key) is None})


def _conv_stride(stem: str, layers: int | None) -> int:
    """What a stem of convolutions has when none is asked for."""
    most = 2 ** (layers or 3)
    return min(4, most) if stem == "conv" else 2 if layers is None else most


def check_model(model: ModelConfig, side: int) -> None:
    """Raises ConfigError where a filled model config does not fit images of this side, or itself."""
    patch, stride, d_model = model.patch_size, model.stride, model.d_model
    assert patch is not None and stride is not None and d_model is not None and model.mlp_ratio is not None
    _check_size(model, side)
    if model.stem in CONV_STEMS:
        _check_conv_stem(model.stem, model.stem_layers, patch, stride, side)
    elif model.stem_layers is not None:
        raise ConfigError(
            f"model.stem_layers {model.stem_layers} does not go with model.stem '{model.stem}'; valid: none"
        )
    if stride == patch and side % patch:
        raise ConfigError(
            f"data.img_size {side} is not divisible by model.patch_size {patch}; "
            f"valid patch sizes: {', '.join(str(p) for p in range(1, side + 1) if side % p == 0)}"
        )
    if patch > side:
        raise ConfigError(f"model.patch_size {patch} is larger than data.img_size {side}; it must not be")
    if stride > patch or (side - patch) % stride:
        valid = [s for s in range(1, patch + 1) if (side - patch) % s == 0]
        raise ConfigError(
            f"model.stride {stride} does not lead from one end of data.img_size {side} to the other with "
            f"model.patch_size {patch}; valid strides: {', '.join(map(str, valid))}"
        )
    if model.pos_embed in ("rope", "both") and d_model % 4:
        raise ConfigError(f"model.pos_embed '{model.pos_embed}' needs a model.d_model divisible by 4, got {d_model}")
    check_class_token(model)
    for key, ratio in (("expand", model.expand), ("mlp_ratio", model.mlp_ratio)):
        if ratio and int(ratio * d_model) < 1:
            raise ConfigError(f"model.{key} {ratio:g} of model.d_model {d_model} gives no channel; choose more")


def check_class_token(model: ModelConfig) -> None:
    """Raises ConfigError where a filled model config has a class token at the start that no scan goes back to."""
    assert model.mixer is not None and model.depth is not None
    after = MIXERS[model.mixer].back_after
    if model.class_token != "start" or (after is not None and after <= model.depth):
        return
    if after is None:
        back = ", ".join(name for name, known in MIXERS.items() if known.back_after is not None)
        raise ConfigError(
            f"model.class_token 'start' with model.mixer '{model.mixer}' sees no image: scans go on from it; valid "
            f"mixers: {back}; valid class tokens: none, middle, double"
        )
    raise ConfigError(
        f"model.class_token 'start' sees no image: none of {model.depth} blocks of model.mixer '{model.mixer}' reads "
        "back to it; valid class tokens: none, middle, double"
    )


def _check_size(model: ModelConfig, side: int) -> None:
    """Raises ConfigError for a filled model that no machine holds; its weights, roughly."""
    assert model.d_model and model.depth and model.stride and model.mlp_ratio is not None
    matrices = 3 * model.expand + 2 * model.mlp_ratio
    weights = model.d_model * (model.depth * model.d_model * matrices + (side / model.stride) ** 2)
    if weights > MOST_WEIGHTS:
        raise ConfigError(
            f"model.d_model {model.d_model}, model.depth {model.depth} and data.img_size {side} make about "
            f"{weights:.0e} weights; at most {MOST_WEIGHTS:.0e}"
        )


def _check_conv_stem(stem: str, layers: int | None, patch: int, stride: int, side: int) -> None:
    """Raises ConfigError where convolutions do not take the image to this grid."""
    assert layers is not None
    where = f"with model.stem '{stem}'"
    if stride not in (2, 4, 8):
        raise ConfigError(f"model.stride {stride} does not go {where}; valid: 2, 4, 8")
    if patch != stride:
        raise ConfigError(f"model.patch_size {patch} does not go {where}; valid: {stride} (model.stride), or none")
    halvings = stride.bit_length() - 1
    valid = range(halvings, 4) if stem == "conv" else (halvings,)
    if layers not in valid:
        raise ConfigError(
            f"model.stem_layers {layers} does not go {where} and model.stride {stride}: each layer "
            f"{'halves the side at most' if stem == 'conv' else 'halves the side'}; "
            f"valid: {', '.join(map(str, valid))}"
        )
    if side % stride:
        raise ConfigError(f"data.img_size {side} does not go {where}; valid: a multiple of {stride} (model.stride)")


def is_range(workers: object) -> bool:
    """Whether a number of workers was given as the least and the most: a list, or text with a comma."""
    return isinstance(workers, list | tuple) or (isinstance(workers, str) and "," in workers)


def workers_of(given: Any) -> tuple[int, int]:
    """The least and the most of a range of workers; raises ConfigError where it is none."""
    parts = given.strip("[] ").split(",") if isinstance(given, str) else given
    whole = [int(part) for part in parts if str(part).strip().isdecimal()]
    if len(parts) != 2 or len(whole) != 2 or not 1 <= whole[0] <= whole[1]:
        raise ConfigError(f"scaling.num_workers {str(given)[:60]}: valid is a whole number, or the least and the most, "
                          "both at least 1: [1, 8]")  # fmt: skip
    return whole[0], whole[1]


def check_workers(config: RunConfig, num_workers: int, gpu: bool) -> None:
    """Refuse what cannot run on this many processes of this kind.

    Raises:
        ConfigError: names the keys, and what is valid.
    """
    shards = max(1, num_workers) * config.optim.accumulate
    if config.data.batch_size % shards:
        raise ConfigError(
            f"data.batch_size {config.data.batch_size} is not divisible by workers x optim.accumulate = "
            f"{max(1, num_workers)} x {config.optim.accumulate}; valid: a multiple of {shards}"
        )
    share = config.data.batch_size // shards
    if shards > 1 and share % 2 and (config.data.mixup or config.data.cutmix):
        raise ConfigError(
            f"data.mixup and data.cutmix pair neighbours, and data.batch_size {config.data.batch_size} over "
            f"{shards} shares (workers x optim.accumulate) leaves {share} each; valid: a multiple of {2 * shards}"
        )
    if share == 1 and config.model.stem == "conv" and config.data.img_size == config.model.stride:
        raise ConfigError(
            f"model.stem 'conv' makes one token of data.img_size {config.data.img_size}, and one image a pass "
            "(data.batch_size over workers x optim.accumulate) leaves its batch norm one value a channel; valid: two "
            "images or more"
        )
    if config.data.device == "gpu" and not gpu:
        raise ConfigError("data.device 'gpu' needs a GPU and there is none; valid on CPU: auto, cpu")
    if config.optim.cuda_graph is True and not gpu:
        raise ConfigError("optim.cuda_graph needs a GPU and there is none; valid on CPU: auto, False")
    if config.optim.cuda_graph is True and config.optim.amp == "fp16":
        raise ConfigError("optim.cuda_graph cannot record optim.amp 'fp16'; turn one off, or choose bf16")
    if config.optim.amp == "fp16" and not gpu:
        raise ConfigError("optim.amp 'fp16' needs a GPU and there is none; valid on CPU: auto, bf16, off")
