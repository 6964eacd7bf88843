"""What a run starts from: its own copy, the architecture that it has, other classes and sizes on purpose."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from mamba.config.schema import RunConfig
from mamba.data.images import ImageData, ImageSet
from mamba.errors import CheckpointError, ConfigError
from mamba.models.embed import resize_positions
from mamba.runs import checkpoint as ckpt
from mamba.runs import start
from mamba.runs.folder import write_config
from mamba.train.distributed import local_process
from mamba.train.trainer import fit
from pruning.masks import FILE
from pruning.rounds import hooks_for
from pruning.store import save_pruned


@pytest.fixture
def trained(small_fit, tmp_path):
    small_fit(optim__epochs=1)
    return tmp_path / "run"


def zeros_in(folder):
    model, _ = ckpt.load_model(folder, weights="raw")
    return [int((b.ssm.in_proj.weight == 0).sum()) for b in model.blocks]


def test_a_fine_tuned_run_resumes_after_what_it_started_from_is_gone(trained, small_config, small_data, tmp_path):
    """Masks and all, before its first checkpoint and after."""
    model, description = ckpt.load_model(trained)
    name = "blocks.0.ssm.in_proj.weight"
    masks = {name: torch.rand(model.state_dict()[name].shape) > 0.5}
    with torch.no_grad():
        model.blocks[0].ssm.in_proj.weight *= masks[name]
    pruned = save_pruned(tmp_path / "pruned", model, masks, description)
    config = small_config(model__checkpoint=pruned, optim__epochs=2)
    run = tmp_path / "tuned"
    run.mkdir()
    start.keep_start(config, run)
    expected = ckpt.load_model(run / "start")[0].state_dict()
    assert all(torch.equal(expected[k], v) for k, v in model.state_dict().items()) and (run / "start" / FILE).exists()
    shutil.rmtree(tmp_path / "pruned")
    shutil.rmtree(trained)

    def go(epochs):
        c = small_config(model__checkpoint=pruned, optim__epochs=epochs)
        return fit(c, local_process(), run, small_data, hooks_for(c, folder=run))

    go(1)
    (run / "result.json").unlink()
    go(2)
    cut = int((~masks[name]).sum())
    assert zeros_in(run)[0] >= cut and cut > 0
    shutil.rmtree(run / "start")  # as a run of version 1: its newest training state serves
    (run / "result.json").unlink()
    assert go(3)["epochs"] == 3 and zeros_in(run)[0] >= cut


def test_the_config_says_what_the_model_is(trained, small_config):
    """Not what its name would be; of a pruned one its mean widths."""
    config = RunConfig().with_values({"data.dataset": "digits", "model.checkpoint": trained}).resolve()
    assert config.model.d_model != 12
    own = start.described(config).model
    assert (own.d_model, own.depth, own.d_state, own.patch_size, own.mixer) == (12, 2, 4, 2, "forward")
    assert (own.expand, own.mlp_ratio, own.class_token) == (2.0, 4.0, "none")
    assert start.described(small_config()) == small_config()


def test_what_is_not_finite_is_not_started_from(trained, small_config, tmp_path):
    folder = ckpt.best_checkpoint(trained)
    model, description = ckpt.load_model(folder, weights="raw")
    with torch.no_grad():
        model.head.weight[0, 0] = torch.inf
    bad = ckpt.save_checkpoint(tmp_path / "bad", model, None, {**description, "weights": "raw"}, None)
    (tmp_path / "tuned").mkdir()
    with pytest.raises(CheckpointError, match=r"1 of 36 values of head.weight are NaN or infinite"):
        start.keep_start(small_config(model__checkpoint=bad), tmp_path / "tuned")
    assert not (tmp_path / "tuned" / "start").exists()


def test_a_damaged_checkpoint_is_not_copied(trained, small_config, tmp_path):
    file = ckpt.best_checkpoint(trained) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    ema = file.with_name("ema.safetensors")
    if ema.exists():
        ema.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        start.keep_start(small_config(model__checkpoint=trained), tmp_path)


def test_other_classes_and_sizes_only_on_purpose(trained, small_config):
    config = small_config(model__checkpoint=trained)
    for classes, side in ((5, 8), (3, 12), (5, 12)):
        with pytest.raises(
            CheckpointError, match=f"is for 3 classes at 8 pixels, and the data has {classes} classes at"
        ):
            start.first_weights(config, trained / "none", classes, side)
    with pytest.raises(CheckpointError, match=r"set model.new_head for a head of 5 classes$"):
        start.check_start(trained, 5, 12, new_size=True)
    old, _ = ckpt.load_model(trained)
    config = config.with_values({"model.new_head": True, "model.new_size": True})
    model = start.first_weights(config, trained / "none", 5, 12)
    assert model(torch.randn(1, 3, 12, 12)).shape == (1, 5)
    assert torch.equal(model.pos_embed, resize_positions(old.pos_embed, 6, "none"))
    assert torch.equal(model.blocks[0].ssm.in_proj.weight, old.blocks[0].ssm.in_proj.weight)
    with pytest.raises(CheckpointError, match="model.new_size: .* does not go with these images"):
        start.first_weights(config, trained / "none", 5, 9)


def test_fine_tuning_onto_other_classes_and_pixels(trained, small_config, tmp_path):
    rng = np.random.default_rng(0)

    def images(n):
        labels = np.arange(n) % 4
        pixels = rng.integers(0, 60, (n, 12, 12, 3)) + 60 * labels[:, None, None, None]
        return ImageSet.whole(pixels.astype(np.uint8), labels.astype(np.int64))

    data = ImageData(images(48), images(16), images(16), ("a", "b", "c", "d"), (0.5,) * 3, (0.25,) * 3)
    run = tmp_path / "tuned"
    run.mkdir()
    config = small_config(model__checkpoint=trained, model__new_head=True, model__new_size=True, optim__epochs=1)
    start.keep_start(config, run)
    fit(config, local_process(), run, data)
    (run / "result.json").unlink()
    assert fit(config.with_values({"optim.epochs": 2}), local_process(), run, data)["epochs"] == 2
    architecture = json.loads((ckpt.newest_checkpoint(run) / "config.json").read_text())["architecture"]
    assert architecture["num_classes"] == 4 and architecture["img_size"] == 12


def test_a_run_does_not_go_on_with_another_config(trained, small_config):
    """config.yaml was edited between stop and --resume: half of the epochs were trained otherwise, without a word."""
    own = small_config(optim__epochs=1)
    moved = {"data.root": "elsewhere", "scaling.num_workers": 2, "optim.epochs": 3}  # and extended
    for values in ({}, moved):
        write_config(trained, own.with_values(values))
        start.prepare_resume(trained)
    write_config(trained, own.with_values({"optim.lr": 0.5, "data.augment": "randaugment"}))
    with pytest.raises(ConfigError, match=r"was changed since .*step-\d+\): it says data\.augment randaugment"):
        start.prepare_resume(trained)
