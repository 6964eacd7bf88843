"""Two real processes (gloo) against one: the same curve, exact counts, one verdict on what is not finite."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mamba import checkpoint as ckpt
from mamba.model import Architecture, MambaModel
from mamba.trainer import fit
from mamba.worker import local_worker
from pruning.cut import cut
from pruning.masks import FILE
from pruning.rounds import hooks_for

SCRIPT = Path(__file__).parent / "torchrun_fit.py"
SETTINGS = {
    "data__augment": "basic",
    "data__random_erasing": 0.25,
    "data__mixup": 0.8,
    "data__cutmix": 1.0,
    "data__loader_workers": 0,
    "data__batch_size": 64,
    "model__drop_path": 0.0,
    "optim__accumulate": 2,
    "optim__layer_decay": 0.8,
}


def torchrun(folder, config, *extra):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run([*command, str(SCRIPT), str(folder), *extra], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]


def curve(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(ckpt.newest_checkpoint(folder) / "model.safetensors")


@pytest.mark.parametrize("how", [(), ("buckets", "1000")])
def test_two_workers_follow_the_curve_of_one(small_config, tmp_path, how):
    config = small_config(**SETTINGS)
    torchrun(tmp_path / "two", config, *how)
    result = fit(config, local_worker(), tmp_path / "one")
    for a, b in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        for key in ("train/loss", "train/lr", "val/loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
        for key in ("val/accuracy", "val/ema_accuracy"):
            assert a[key] == pytest.approx(b[key], abs=100 / 143 + 0.01), key  # one of 143 images may fall on a tie
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["world_size"] == 2 and two["images"] == result["images"]
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_two_workers_resume_bit_for_bit(small_config, tmp_path):
    """Drop path is on, so each rank's own random state has to come back."""
    config = small_config(**SETTINGS | {"model__drop_path": 0.3}, checkpoint__keep=3)
    torchrun(tmp_path / "whole", config)
    # two epochs, then the third: the schedule is that of the whole run, cut by removing the later checkpoint
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    checkpoints = sorted((tmp_path / "parts" / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 3
    shutil.rmtree(checkpoints[-1])
    torchrun(tmp_path / "parts", config)
    assert len(sorted((tmp_path / "parts" / "checkpoints").glob("step-*"))) == 3
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert curve(tmp_path / "whole")[-1]["val/loss"] == curve(tmp_path / "parts")[-1]["val/loss"]


def test_one_rank_that_is_not_finite_skips_the_step_on_all(small_config, tmp_path):
    torchrun(tmp_path / "run", small_config(**SETTINGS, optim__epochs=1), "poison", "5")
    (metrics,) = curve(tmp_path / "run")
    assert metrics["train/skipped_steps"] == 1
    assert torch.tensor(metrics["train/loss"]).isfinite()
    assert all(v.isfinite().all() for v in weights(tmp_path / "run").values())


def test_a_shrunk_and_masked_model_trains_alike_on_two_workers(small_config, tmp_path):
    """Uneven widths, an index, low rank, shared B and C, and masks on what is left: DDP sees a model like any other."""
    torch.manual_seed(0)
    dense = MambaModel(Architecture.from_config(small_config().model, 10, 8))
    rates = {"mlp:neuron": 0.5, "linear_in:expand": 0.3, "linear_out:output": 0.4, "linear_delta:low_rank": 0.5}
    result = cut(dense, {**rates, "linear_B_C:shared": 0.5, "linear_gate:element": 0.5}, shrink=True)
    start = ckpt.save_checkpoint(tmp_path / "start", result.model, None, {}, None, {FILE: result.masks})
    config = small_config(**{**SETTINGS, "model__checkpoint": start, "prune__penalty": "group"})
    torchrun(tmp_path / "two", config)
    fit(config, local_worker(), tmp_path / "one", hooks=hooks_for(config))
    for a, b in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
        assert a["prune/penalty_norm"] == pytest.approx(b["prune/penalty_norm"], rel=1e-4)
    trained = weights(tmp_path / "two")
    for name, keep in result.masks.items():
        assert bool((trained[name][~keep] == 0).all()) and bool((trained[name][keep] != 0).all())
