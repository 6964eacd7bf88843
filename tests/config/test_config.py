"""The config: every bad input is refused with the key and what is valid."""

from __future__ import annotations

import re

import pytest

from mamba.config.cli import parse_train_args
from mamba.config.keys import dotted_keys
from mamba.config.presets import PRESETS, get_preset
from mamba.config.schema import RunConfig
from mamba.errors import ConfigError


@pytest.mark.parametrize(
    "values, message",
    [
        ({"data.foo": 1}, "unknown key 'data.foo'; valid in data: data.dataset, data.root"),
        ({"foo": 1}, "unknown key 'foo'; valid: name, trial, seed, out"),
        ({"nothing.lr": 1}, "unknown key 'nothing.lr'; valid: .*optim"),
        ({"data.val_fraction": 1.5}, "data.val_fraction: should be less than 1, got 1.5"),
        ({"optim.lr": "fast"}, "optim.lr: should be a valid number.*'fast'"),
        ({"optim.lr": float("nan")}, "optim.lr: should be a finite number"),
        ({"data.dataset": "mnist"}, "data.dataset: should be 'digits', 'cifar10', 'cifar100' or 'folder'"),
        ({"ema.enabled": "maybe"}, "ema.enabled: should be a valid boolean"),
        ({"name": "../up"}, "name: should be of letters, digits"),
        ({"data.img_size": 30, "model.patch_size": 4}, "data.img_size 30 is not divisible by model.patch_size 4"),
        ({"data.batch_size": 10, "optim.accumulate": 4}, "data.batch_size 10 is not divisible by optim.accumulate 4"),
        ({"model.mlp_ratio": 0.001}, "model.mlp_ratio 0.001 of model.d_model 192 gives no channel"),
        ({"model.mixer": "sideways"}, "model.mixer: should be 'forward', 'bidirectional', .*'multiscale'"),
        ({"model.class_token": "end"}, "model.class_token: should be 'none', 'start', 'middle' or 'double'"),
        ({"model.class_token": "start"}, "'start' with model.mixer 'forward' sees no image.*valid mixers: bidirect"),
        ({"model.stem": "conv", "model.patch_size": 2}, "model.patch_size 2 does not go with model.stem 'conv'; valid"),
        (
            {"model.stem": "conv", "model.stride": 3},
            "model.stride 3 does not go with model.stem 'conv'; valid: 2, 4, 8",
        ),
        ({"model.stem": "conv", "model.stride": 8, "model.stem_layers": 2}, "model.stem_layers 2 does .* valid: 3"),
        ({"model.stem": "cct", "model.stride": 2, "model.stem_layers": 2}, "model.stem_layers 2 does .* valid: 1"),
        ({"model.stem": "cct", "data.img_size": 33}, "data.img_size 33 .* 'cct'; valid: a multiple of 2"),
        ({"model.stem_layers": 2}, "model.stem_layers 2 does not go with model.stem 'patch'"),
        ({"model.stride": 3}, "model.stride 3 does not lead from .*data.img_size 32 .*valid strides: 1, 2, 4"),
        ({"model.patch_size": 4, "model.stride": 8}, "model.stride 8 does not lead .*valid strides: 1, 2, 4"),
        ({"model.patch_size": 64, "model.stride": 2}, "model.patch_size 64 is larger than data.img_size 32"),
        ({"model.pos_embed": "rope", "model.d_model": 10}, "'rope' needs a model.d_model divisible by 4, got 10"),
        ({"model.name": "vim_huge"}, "model.name: should be .*'vim_base'"),
        ({"distill.temperature": 0}, "distill.temperature: should be greater than 0"),
        ({"distill.alpha": 1.5}, "distill.alpha: should be less than or equal to 1"),
        (
            {"model.name": "vim_tiny", "prune.method": "refill", "prune.target": "mlp"},
            "prune.target 'mlp' needs an MLP and model.mlp_ratio 0 has none; valid: ssm, both",
        ),
        ({"optim.min_lr": 1.0}, "optim.min_lr 1.0 is above optim.lr"),
        ({"optim.epochs": 5, "optim.warmup_epochs": 6}, "optim.warmup_epochs 6 is longer than optim.epochs 5"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig().with_values(values).resolve()


def test_workers_and_precision_refused():
    config = RunConfig().with_values({"data.batch_size": 100, "optim.accumulate": 5})
    with pytest.raises(ConfigError, match=r"workers x optim.accumulate = 3 x 5; valid: a multiple of 15"):
        config.check_workers(3, gpu=True)
    config.check_workers(2, gpu=True)
    mixed = RunConfig().with_values({"data.batch_size": 30, "data.mixup": 0.8})
    mixed.check_workers(1, gpu=True)
    with pytest.raises(ConfigError, match="data.batch_size 30 over 2 shares .* leaves 15 each; valid: a multiple of 4"):
        mixed.check_workers(2, gpu=True)
    one_value = RunConfig().with_values({"model.stem": "conv", "data.img_size": 4, "data.batch_size": 2}).resolve()
    one_value.check_workers(1, gpu=True)
    with pytest.raises(ConfigError, match="leaves its batch norm one value a channel"):
        one_value.check_workers(2, gpu=True)
    with pytest.raises(ConfigError, match="optim.amp 'fp16' needs a GPU"):
        RunConfig().with_values({"optim.amp": "fp16"}).check_workers(1, gpu=False)


def test_yaml_round_trip_and_flat_keys(tmp_path):
    config = get_preset("v2").with_values({"seed": 3, "optim.grad_clip": None}).resolve()
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert RunConfig.from_yaml(path) == config
    assert set(config.flat()) == set(dotted_keys())
    path.write_text("optim: {lrr: 1}")
    with pytest.raises(ConfigError, match="unknown key 'optim.lrr'; valid in optim"):
        RunConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="missing.yaml cannot be read"):
        RunConfig.from_yaml(tmp_path / "missing.yaml")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve_and_say_what_they_are(name):
    config = get_preset(name).resolve()
    assert config.name == name
    assert_claims_are_measured(PRESETS[name].__doc__ or "")


def assert_claims_are_measured(text):
    """Cost and score are each said to be not yet measured, or measured, with a figure or a preset and the hardware."""
    parts = re.search(r"Cost: (.*?)\. Score: (.*)", " ".join(text.split()))
    assert parts, "the docstring says no `Cost: ... Score: ...`"
    for part in parts.groups():
        claimed = re.sub(r"not yet measured", "", part)
        assert claimed != part or "measured" in claimed, f"neither measured nor said not to be: {part}"
        if "measured" in claimed:
            assert re.search(r"H100|H200|CPU core", claimed), f"measured on what? {part}"


def test_not_yet_measured_is_no_measurement():
    assert_claims_are_measured("Cost: measured, 4 s on one H100. Score: not yet measured (hoped for 97 %).")
    for text in (
        "Cost: measured, 4 s on one H100.",
        "Cost: not yet measured. Score: 97 %.",
        "Cost: not yet measured. Score: measured, 97 %.",
        "Cost: 4 s. Score: not yet measured.",
    ):
        with pytest.raises(AssertionError):
            assert_claims_are_measured(text)


def test_values_that_follow_from_the_named_model():
    mamba, vim = (RunConfig().with_values({"model.name": n}).resolve().model for n in ("mamba_small", "vim_small"))
    assert (mamba.mixer, mamba.class_token, mamba.mlp_ratio, mamba.stride) == ("forward", "none", 4.0, 4)
    assert (vim.mixer, vim.class_token, vim.mlp_ratio, vim.d_model) == ("bidirectional_shared", "middle", 0.0, 384)
    conv = RunConfig().with_values({"model.stem": "conv", "data.img_size": 224}).resolve().model
    assert (conv.patch_size, conv.stride, conv.stem_layers) == (4, 4, 3)
    for given, stride, layers in (
        ({"model.stem": "conv", "model.stem_layers": 1}, 2, 1),
        ({"model.stem": "conv", "model.stride": 2}, 2, 3),
        ({"model.stem": "cct"}, 2, 1),
        ({"model.stem": "cct", "model.stride": 8}, 8, 3),
        ({"model.stem": "cct", "model.stem_layers": 2}, 4, 2),
    ):
        stem = RunConfig().with_values(given).resolve()
        assert (stem.model.patch_size, stem.model.stride, stem.model.stem_layers) == (stride, stride, layers)
        assert stem.resolve() == stem
    large = RunConfig().with_values({"data.img_size": 224, "model.stride": 8}).resolve().model
    assert (large.patch_size, large.stride) == (16, 8)


def test_presets_of_the_family():
    stage3, vim = get_preset("stage3").resolve(), get_preset("vim_cifar").resolve()
    assert (stage3.model.mixer, stage3.model.stem, stage3.eval.tta_views) == ("bidirectional", "conv", 5)
    assert stage3.optim == get_preset("v2").resolve().optim and stage3.distill.teacher is None
    assert (vim.model.name, vim.data.img_size, vim.model.patch_size) == ("vim_tiny", 32, 4)


def test_preset_values():
    v1, stage1, v2 = (get_preset(n).resolve() for n in ("v1", "stage1", "v2"))
    assert (v1.data.augment, v1.data.mixup, v1.data.cutmix, v1.optim.warmup, v1.optim.amp) == (
        "randaugment", 0.8, 1.0, "linear", "off",
    )  # fmt: skip
    assert (stage1.model.drop_path, stage1.data.random_erasing, stage1.optim.grad_clip, stage1.ema.enabled) == (
        0.1, 0.25, 1.0, True,
    )  # fmt: skip
    o = v2.optim
    assert (o.epochs, v2.data.batch_size, o.lr, o.weight_decay, o.warmup_epochs) == (300, 128, 1e-3, 0.05, 20)
    assert (v2.ema.decay, o.amp, o.warmup, v2.data.augment) == (0.9999, "auto", "exponential", "autoaugment")
    assert o.layer_decay < 1 and o.label_smoothing == 0.1
    overfit, underfit, unstable = (get_preset(n) for n in ("overfit", "underfit", "unstable"))
    assert (overfit.optim.weight_decay, overfit.model.drop_path, overfit.optim.label_smoothing) == (0.08, 0.15, 0.15)
    assert (underfit.optim.weight_decay, underfit.model.drop_path, underfit.optim.epochs) == (0.03, 0.05, 400)
    assert (unstable.optim.grad_clip, unstable.optim.warmup_epochs, unstable.optim.lr) == (0.5, 30, 5e-4)


def test_command_line_overrides_a_preset():
    words = "--preset v2 --data.batch-size=64 --optim.grad_clip none --ema.enabled false --optim.compile True --seed 7"
    config = parse_train_args(words.split()).config
    assert (config.data.batch_size, config.optim.grad_clip, config.ema.enabled, config.optim.compile) == (
        64, None, False, True,
    )  # fmt: skip
    assert (config.seed, config.name, config.optim.epochs) == (7, "v2", 300)
    assert parse_train_args([]).config == get_preset("quickstart")


def test_a_checkpoint_can_be_trained_without_synchronised_statistics():
    words = "--model.checkpoint runs/x --model.sync-batchnorm False --model.drop-path 0.3"
    config = parse_train_args(words.split()).config
    assert config.model.sync_batchnorm is False and config.model.drop_path == 0.3


def test_every_boolean_can_be_turned_off():
    booleans = [k for k, v in RunConfig().flat().items() if isinstance(v, bool)]
    assert booleans
    booleans += ["optim.compile", "optim.cuda_graph"]  # or auto
    for key in booleans:
        assert parse_train_args([f"--{key}", "false"]).config.flat()[key] is False
        assert parse_train_args([f"--{key}", "true"]).config.flat()[key] is True


@pytest.mark.parametrize(
    "words, message",
    [
        ("--optim.lrr 1", "unknown key 'optim.lrr'; valid in optim: optim.epochs"),
        ("--bogus=1", "unknown key 'bogus'"),
        ("--preset v9", "unknown preset 'v9'; valid: quickstart, v1"),
        ("--resume nowhere", "--resume nowhere: there is no such folder"),
        ("--data.val-fraction 2", "data.val_fraction: should be less than 1"),
        ("--optim.epochs abc", "optim.epochs: should be a valid integer.*'abc'"),
        ("--ema.enabled maybe", "ema.enabled: should be a valid boolean"),
        ("--optim.compile maybe", "^optim.compile: should be 'auto', True or False, got 'maybe'$"),
        ("--model.checkpoint runs/x --model.mixer forward", "leave out --model.mixer; .* model.sync_batchnorm go"),
        ("--data.dataset mnist", "data.dataset: should be 'digits', 'cifar10'"),
        ("--optim.lr", "--optim.lr needs a value"),
        ("--resume --dry-run", "--resume needs a value"),
        ("--preset v1 --preset v2", "--preset is given twice"),
        ("train", "unexpected word 'train'"),
        ("--seed 99999999999999999999999", "seed: should be less than"),
    ],
)
def test_command_line_refuses(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_train_args(words.split())


def test_resume_takes_scaling_keys_only(tmp_path):
    (tmp_path / "config.yaml").write_text(get_preset("v1").to_yaml())
    args = parse_train_args(["--resume", str(tmp_path), "--scaling.num-workers", "2"])
    assert args.config.scaling.num_workers == 2 and args.config.name == "v1"
    with pytest.raises(ConfigError, match="leave out --optim.lr"):
        parse_train_args(["--resume", str(tmp_path), "--optim.lr", "1"])


@pytest.mark.parametrize(
    "values, gpu, message",
    [
        ({"data.device": "gpu"}, False, "data.device 'gpu' needs a GPU and there is none; valid on CPU: auto, cpu"),
        ({"optim.cuda_graph": True}, False, "optim.cuda_graph needs a GPU and there is none; valid on CPU: auto"),
        ({"optim.cuda_graph": True, "optim.amp": "fp16"}, True, "optim.cuda_graph cannot record optim.amp 'fp16'"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(values, gpu, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig().with_values(values).check_workers(1, gpu)
    RunConfig().with_values(values | {"optim.amp": "bf16"}).check_workers(1, gpu=True)


def test_the_gate_can_lose_single_weights_in_a_structured_cut():
    rates = {"cut.linear_out": 0.7, "cut.linear_gate": 0.5, "cut.structured": True}
    assert RunConfig().with_values(rates).cut.rates == {"linear_out": 0.7, "linear_gate": 0.5}
    apart = RunConfig().with_values({**rates, "cut.gate_elements": True}).cut.rates
    assert apart == {"linear_out": 0.7, "linear_gate:element": 0.5}


def test_a_size_that_is_named_is_that_size(tmp_path):
    """The quickstart's own width and depth stood over it, without a word."""
    small = parse_train_args([]).config.resolve().model
    named = parse_train_args(["--model.name", "mamba_tiny"]).config.resolve().model
    assert (small.depth, named.d_model, named.depth) == (4, 128, 16)
    assert parse_train_args(["--model.name", "mamba_small", "--model.depth", "3"]).config.resolve().model.depth == 3
    (tmp_path / "config.yaml").write_text(parse_train_args([]).config.resolve().to_yaml())
    words = ["--config", str(tmp_path / "config.yaml"), "--model.name", "mamba_small"]
    assert parse_train_args(words).config.resolve().model.depth == 24


@pytest.mark.parametrize("text", ["1:30", "010", "1_0", "0x10", "true", "off"])
def test_a_file_says_numbers_as_people_read_them(tmp_path, text):
    """YAML 1.1 took these for 90, 8, 10 and 16, and pydantic the others for 1 and 0."""
    file = tmp_path / "run.yaml"
    file.write_text(f"optim:\n  epochs: {text}\n")
    with pytest.raises(ConfigError, match=r"no decimal number|no number"):
        RunConfig.from_yaml(file)
