"""Two real processes (gloo) against one: the same curve, exact counts, one verdict on what is not finite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mamba.models.model import Architecture, MambaModel
from mamba.runs import checkpoint as ckpt
from mamba.train.distributed import local_process
from mamba.train.trainer import fit
from pruning.cut import cut
from pruning.masks import FILE
from pruning.rounds import hooks_for
from tests.conftest import make_small_config

SCRIPT = Path(__file__).parent / "torchrun_fit.py"
SETTINGS = {
    "data__augment": "basic",
    "data__random_erasing": 0.25,
    "data__mixup": 0.8,
    "data__cutmix": 1.0,
    "data__loader_workers": 0,
    "data__batch_size": 24,
    "model__drop_path": 0.0,
    "optim__accumulate": 2,
    "optim__layer_decay": 0.8,
}


def torchrun(*folders):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(SCRIPT)]
    paths = [str(SCRIPT.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]  # the script imports `tests`
    done = subprocess.run(
        [*command, *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every run that starts afresh, in one process group: to start one takes longer than most of them."""
    root = tmp_path_factory.mktemp("distributed")
    torch.manual_seed(0)
    dense = MambaModel(Architecture.from_config(make_small_config(root).model, 3, 8))
    rates = {"mlp:neuron": 0.5, "linear_in:expand": 0.3, "linear_out:output": 0.4, "linear_delta:low_rank": 0.5}
    cut_model = cut(dense, {**rates, "linear_B_C:shared": 0.5, "linear_gate:element": 0.5}, shrink=True)
    start = ckpt.save_checkpoint(root / "start", cut_model.model, None, {}, None, {FILE: cut_model.masks})
    whole = make_small_config(root, **SETTINGS | {"model__drop_path": 0.3}, checkpoint__keep=3)
    short = {**SETTINGS, "optim__epochs": 2}
    made = {
        "two": (make_small_config(root, **short), None),
        "buckets": (make_small_config(root, **short), ["buckets", 1000]),
        "poisoned": (make_small_config(root, **SETTINGS, optim__epochs=1), ["poison", 1]),
        "whole": (whole, None),
        "parts": (whole, ["resumed", "whole"]),
        "pruned": (make_small_config(root, **short, model__checkpoint=start, penalty__kind="group"), None),
    }
    conv = {"model__stem": "conv", "optim__epochs": 2, "ema__decay": 0.5}
    for ways in ("ddp", "flat"):
        made[f"conv-{ways}"] = make_small_config(root, **SETTINGS | conv), ["statistics", ways]
    for name, (config, how) in made.items():
        (root / name).mkdir()
        (root / name / "config.yaml").write_text(config.to_yaml())
        if how:
            (root / name / "how.json").write_text(json.dumps(how))
    torchrun(*(root / name for name in made))
    return SimpleNamespace(root=root, config={k: config for k, (config, _) in made.items()}, masks=cut_model.masks)


def curve(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(ckpt.newest_checkpoint(folder) / "model.safetensors")


@pytest.fixture(scope="module")
def alone(runs, small_data):
    return fit(runs.config["two"], local_process(), runs.root / "one", small_data)


@pytest.mark.parametrize("name", ["two", "buckets"])
def test_two_workers_follow_the_curve_of_one(runs, alone, name):
    for a, b in zip(curve(runs.root / "one"), curve(runs.root / name), strict=True):
        for key in ("train/loss", "train/lr", "val/loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
        for key in ("val/accuracy", "val/ema_accuracy"):
            assert a[key] == pytest.approx(b[key], abs=100 / 24 + 0.01), key  # one of 24 images may fall on a tie
    two = json.loads((runs.root / name / "result.json").read_text())
    assert two["world_size"] == 2 and two["images"] == alone["images"]
    a, b = weights(runs.root / "one"), weights(runs.root / name)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)


def test_two_workers_resume_bit_for_bit(runs):
    """Drop path is on, so each rank's own random state has to come back."""
    whole, parts = runs.root / "whole", runs.root / "parts"
    assert len(sorted((parts / "checkpoints").glob("step-*"))) == 3
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert curve(whole)[-1]["val/loss"] == curve(parts)[-1]["val/loss"]


def test_one_rank_that_is_not_finite_skips_the_step_on_all(runs):
    (metrics,) = curve(runs.root / "poisoned")
    assert metrics["train/skipped_steps"] == 1
    assert torch.tensor(metrics["train/loss"]).isfinite()
    assert all(v.isfinite().all() for v in weights(runs.root / "poisoned").values())


@pytest.mark.parametrize("ways", ["ddp", "flat"])
def test_batch_norm_is_the_same_on_every_rank(runs, ways):
    """After each step, in each validation and in the test, and so in the checkpoint: one model, however gradients are
    averaged. On a CPU the statistics of a batch are each rank's own, so they differ until they are averaged."""
    folder = runs.root / f"conv-{ways}"
    one, two = (torch.load(folder / f"statistics-{rank}.pt", weights_only=True) for rank in range(2))
    assert len(one["step"]) == 6 and len(one["evaluated"]) == 5
    for kind in ("step", "evaluated"):
        assert all(torch.equal(a, b) for a, b in zip(one[kind], two[kind], strict=True)), kind
    assert not torch.equal(one["step"][0], one["step"][-1])
    saved = torch.cat([t.flatten() for name, t in weights(folder).items() if "running" in name])
    assert torch.equal(saved.sort().values, one["step"][-1].sort().values)
    other = {"ddp": "flat", "flat": "ddp"}[ways]
    for a, b in zip(curve(folder), curve(runs.root / f"conv-{other}"), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
        assert a["val/loss"] == pytest.approx(b["val/loss"], rel=1e-3)


def test_a_shrunk_and_masked_model_trains_alike_on_two_workers(runs, small_data):
    """Uneven widths, an index, low rank, shared B and C, and masks on what is left: DDP sees a model like any other."""
    config = runs.config["pruned"]
    fit(config, local_process(), runs.root / "pruned-one", small_data, hooks_for(config))
    for a, b in zip(curve(runs.root / "pruned-one"), curve(runs.root / "pruned"), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
        assert a["prune/penalty_norm"] == pytest.approx(b["prune/penalty_norm"], rel=1e-4)
    trained = weights(runs.root / "pruned")
    for name, keep in runs.masks.items():
        assert bool((trained[name][~keep] == 0).all()) and bool((trained[name][keep] != 0).all())
