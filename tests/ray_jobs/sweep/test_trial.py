"""Trials without a cluster: what they measure and train on, how they end, what they leave in their process."""

from __future__ import annotations

import json
import math
import os
import random
import warnings

import pytest
import torch

from mamba.config.schema import RunConfig
from mamba.data.registry import load_data
from mamba.runs import checkpoint as ckpt
from mamba.runs.folder import epochs_of
from mamba.train.distributed import local_process
from mamba.train.trainer import fit
from pruning import load_record, prune_multiple
from pruning import measure as meter
from ray_jobs.launch.process import restored
from ray_jobs.sweep.grid import expand
from ray_jobs.sweep.measure import time_trials
from ray_jobs.sweep.results import TRIAL, baseline_of, read_trial
from ray_jobs.sweep.shared import data_of, trial_config
from ray_jobs.sweep.space import load_space
from ray_jobs.sweep.trial import check_finite, reported_epochs, run_trial
from tests.runs.test_tracking import hparams_table, shown_status


def quiet(_):
    """Nothing is done with reports."""


def test_a_measure_trial_is_the_prune_done_by_hand(trained, shared_of):
    shared = shared_of()
    model, _ = ckpt.load_model(trained)
    data = data_of(shared, RunConfig(**shared.config).resolve())
    dense = meter.accuracy(model, data, data.val)
    for trial in expand(load_space("layer_sensitivity"), 2) + expand(load_space("joint_pruning"), 2):
        result = run_trial(shared, trial.name, trial.values, quiet)
        rates = {k.removeprefix("cut."): v for k, v in trial.values.items() if isinstance(v, float)}
        if trial.values.get("cut.gate_elements"):
            rates["linear_gate:element"] = rates.pop("linear_gate")
        layer = trial.values.get("cut.layer")
        layers = None if layer is None else [layer]
        by_hand = prune_multiple(model, rates, shrink="cut.structured" in trial.values, layers=layers)
        drop = dense - meter.accuracy(by_hand, data, data.val)
        assert result["metrics"]["val/drop"] == pytest.approx(drop, abs=1e-6)
        assert result["metrics"]["model/params"] == sum(p.numel() for p in by_hand.parameters())
        assert "bench/images_per_s" not in result["metrics"], "measured beside other trials"
        record = load_record(shared.folder / trial.name)
        assert {what.partition(":")[0] for what in record.whats} == {name.partition(":")[0] for name in rates}
        if "cut.structured" in trial.values:
            units = [row.kept for row in record.of("mlp:neuron").values()]
            assert units == [block.mlp_hidden for block in by_hand.architecture.blocks]
    baseline = baseline_of(shared.folder)
    assert baseline["val/accuracy"] == pytest.approx(dense, abs=1e-6)
    assert baseline["model/params"] == sum(p.numel() for p in model.parameters())
    assert baseline["val/images"] == len(data.val)


def test_a_trial_that_is_done_is_read_not_run_and_a_damaged_one_runs_again(shared_of):
    shared = shared_of()
    first = run_trial(shared, "a", {"cut.mlp": 0.5}, quiet)
    assert run_trial(shared, "a", {"cut.mlp": 0.9}, quiet)["metrics"] == first["metrics"]
    (shared.folder / "a" / TRIAL).write_text('{"status": "fini')
    assert run_trial(shared, "a", {"cut.mlp": 0.5}, quiet)["metrics"] == first["metrics"]
    assert json.loads((shared.folder / "a" / TRIAL).read_text())["status"] == "finished"


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"cut.linear_B_C": 0.9, "cut.structured": True}, "a floor of 1"),
        ({"cut.mlp": 0.5, "cut.layer": 7}, "there is no block 7; valid: 0 to 1"),
        ({"seed": 1}, "nothing is cut"),
    ],
)
def test_a_trial_that_cannot_be_is_a_result_with_its_reason(shared_of, values, reason):
    shared = shared_of()
    result = run_trial(shared, "bad", values, quiet)
    assert result["status"] == "failed" and reason in result["reason"]
    log = (shared.folder / "bad" / "trial.log").read_text()
    assert "Traceback" in log and reason in log and log.endswith("failed\n")
    assert shown_status(shared.folder / "bad") == "failed"


def test_a_cut_can_be_fine_tuned(shared_of):
    shared = shared_of()
    values = {"cut.mlp": 0.9, "cut.linear_in": 0.9, "cut.linear_out": 0.95}
    at_once = run_trial(shared, "cut", values, quiet)
    epochs = []
    tuned = run_trial(shared, "tuned", {**values, "cut.finetune_epochs": 2}, epochs.append)
    assert len(epochs) == 2 and tuned["metrics"]["val/accuracy"] > at_once["metrics"]["val/accuracy"]
    assert tuned["metrics"]["model/nonzero"] == at_once["metrics"]["model/nonzero"], "cut weights came back"
    (shared.folder / "tuned" / TRIAL).unlink()  # killed between its training and its end
    again = run_trial(shared, "tuned", {**values, "cut.finetune_epochs": 2}, epochs.append)
    assert len(epochs) == 2, "trained twice"
    assert again["metrics"]["val/accuracy"] == tuned["metrics"]["val/accuracy"]


def test_a_training_trial_reports_every_epoch_but_the_last_and_repeats_itself(shared_of):
    shared = shared_of("train")
    reports = []
    a = run_trial(shared, "a", {"optim.lr": 1e-3}, reports.append)
    b = run_trial(shared, "b", {"optim.lr": 1e-3}, quiet)
    # the last one goes with the test's score: a scheduler that stopped the trial there would only lose that
    assert [r["epoch"] for r in reports] == [1, 2] and a["metrics"]["epoch"] == 3
    assert reports[1]["val/best_accuracy"] >= reports[0]["val/best_accuracy"]
    same = ("val/loss", "val/best_accuracy", "test/accuracy", "train/loss")
    assert [a["metrics"][k] for k in same] == [b["metrics"][k] for k in same]
    assert a["metrics"]["val/images"] > 0, "a report says how many images are behind an accuracy"


def test_tensorboard_has_the_metric_that_counts_of_every_kind_of_trial(shared_of):
    """It was empty for trials, and parallel coordinates drew 4 of 42 runs."""
    cut, trained = shared_of(), shared_of("train")
    results = {"cut": run_trial(cut, "cut", {"cut.mlp": 0.5}, quiet),
               "trained": run_trial(trained, "trained", {"optim.lr": 1e-3}, quiet)}  # fmt: skip
    _, groups = hparams_table(cut.folder)
    for group in groups:
        shown = {m.name.tag: m.value for m in group.metric_values}
        name = group.sessions[0].name
        assert shown["val/best_accuracy"] == pytest.approx(results[name]["metrics"]["val/best_accuracy"], rel=1e-5)
    assert len(groups) == 2


def test_trials_train_on_the_data_that_their_keys_say(shared_of, monkeypatch):
    """All trained on the experiment's images; results.csv said otherwise."""
    shared = shared_of("train", optim__epochs=1, optim__warmup_epochs=0, data__batch_size=700, model__patch_size=None,
                       model__stride=None)  # fmt: skip
    monkeypatch.setattr("ray_jobs.sweep.shared.load_data", load_data)
    seen = {}
    for name, values in {
        "base": {},
        "16": {"data.img_size": 16},
        "half": {"data.val_fraction": 0.5},
        "both": {"data.img_size": 16, "data.val_fraction": 0.5},
    }.items():
        result = run_trial(shared, name, values, quiet)
        images = json.loads((shared.folder / name / "result.json").read_text())["images"]
        seen[name] = (result["metrics"]["model/macs"], images["val"])
    assert len(set(seen.values())) == 4
    assert seen["both"] == (seen["16"][0], seen["half"][1])


def test_what_follows_from_a_trials_keys_is_filled_in_for_the_trial(shared_of):
    """The experiment's own widths stayed, whatever the trial's model was called."""
    shared = shared_of("train", model__d_model=None, model__depth=None, model__patch_size=None, model__stride=None)
    tiny = trial_config(shared, "a", {"model.name": "mamba_tiny"})
    assert (tiny.model.d_model, tiny.model.depth) == (128, 16)
    assert trial_config(shared, "b", {"data.img_size": 32}).model.patch_size == 4
    assert trial_config(shared, "c", {"model.stem": "conv"}).model.patch_size == 4


def test_data_is_loaded_once_for_trials_on_the_same_images(shared_of):
    shared = shared_of("train")
    configs = [
        trial_config(shared, "a", values) for values in ({}, {"data.batch_size": 8, "seed": 7}, {"optim.lr": 1.0})
    ]
    first, *others = [data_of(shared, config) for config in configs]
    assert all(data is first for data in others), "another seed must not validate on other images"
    assert {config.data.split_seed for config in configs} == {0}, "workers of a trial's own split by its seed"


@pytest.mark.parametrize("metrics", [{"val/loss": math.nan}, {"train/loss": math.inf}, {"val/accuracy": math.nan}])
def test_a_trial_that_diverged_has_failed(metrics):
    result = {"status": "finished", "metrics": {"val/loss": 1.0, "val/best_accuracy": 50.0, **metrics}}
    failed = check_finite(result, ("val/best_accuracy",))
    assert failed["status"] == "failed" and "it diverged: " in failed["reason"]
    without = check_finite({"status": "finished", "metrics": {"val/loss": 1.0}}, ("val/accuracy",))
    assert without["status"] == "failed" and "is not among its metrics" in without["reason"]


def test_a_training_that_diverges_ends_at_once_as_failed(shared_of):
    shared = shared_of("train", optim__epochs=50, objectives=("val/loss",))
    values = {"optim.lr": 1e30, "optim.grad_clip": None, "optim.max_skipped": 100000, "optim.warmup_epochs": 0}
    reports = []
    result = run_trial(shared, "a", values, reports.append)
    assert result["status"] == "failed" and "diverged" in result["reason"]
    assert len(reported_epochs(shared.folder / "a")) < 50
    assert all(math.isfinite(r["val/loss"]) for r in reports)


def test_a_trial_of_several_workers_is_followed_stopped_and_continued(shared_of, monkeypatch):
    """Tune stops a trial where it reports: the workers are asked to end, and have ended before the trial has. The
    request must not outlive the sweep: every interrupted trial failed when its sweep was continued."""
    shared = shared_of("train", workers=2)
    ended = []

    def workers(config, folder, *_):
        ended.append(fit(config, local_process(), folder, data_of(shared, config)))
        return ended[-1]

    monkeypatch.setattr("ray_jobs.launch.run.train_with_workers", workers)
    reports = []
    result = run_trial(shared, "whole", {}, reports.append)
    assert [m["epoch"] for m in reports] == [1, 2], "the third comes with the result"
    assert result["metrics"]["val/best_accuracy"] >= reports[-1]["val/best_accuracy"] > 0

    def stop(metrics):
        raise SystemExit

    with pytest.raises(SystemExit):
        run_trial(shared, "stopped", {"optim.epochs": 40}, stop)
    assert [r["status"] for r in ended] == ["finished", "interrupted"] and ended[-1]["epoch"] < 39
    assert not (shared.folder / "stopped" / TRIAL).exists() and (shared.folder / "stopped" / "STOP").exists()
    before = len(epochs_of(shared.folder / "stopped"))  # one that was stopped within its validation is not among them
    result = run_trial(shared, "stopped", {"optim.epochs": 40}, reports.append)
    assert result["status"] == "finished" and not (shared.folder / "stopped" / "STOP").exists()
    assert reports[2]["epoch"] == before + 1, "epochs of the sweep before were reported again"


def test_a_reused_process_ends_a_trial_as_it_began_it():
    import torch._dynamo.config as dynamo
    import torch.fx.experimental._config as symbolic

    torch.manual_seed(3)
    random.seed(3)
    before = (torch.get_rng_state(), random.getstate(), torch.get_num_threads(), len(warnings.filters))
    with restored(threads=1):
        assert torch.get_num_threads() == 1
        torch.manual_seed(99)
        random.seed(99)
        dynamo.force_parameter_static_shapes = False
        symbolic.use_duck_shape = False
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        warnings.simplefilter("ignore")
        os.environ["MAMBA_FORGE_TRIAL"] = "1"
    after = (torch.get_rng_state(), random.getstate(), torch.get_num_threads(), len(warnings.filters))
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert dynamo.force_parameter_static_shapes and symbolic.use_duck_shape
    assert not torch.backends.cudnn.benchmark and torch.get_float32_matmul_precision() == "highest"
    assert "MAMBA_FORGE_TRIAL" not in os.environ


def test_speeds_are_those_of_the_trials_models(shared_of, monkeypatch):
    shared = shared_of()
    timed = []
    monkeypatch.setattr(meter, "speeds", lambda models, *_: timed.extend(models) or [{} for _ in models])
    time_trials(shared, [("a", {"cut.mlp": 0.5, "cut.structured": True})])
    dense, smaller = (sum(p.numel() for p in model.parameters()) for model in timed)
    assert smaller < dense
    result = run_trial(shared, "a", {"cut.mlp": 0.5, "cut.structured": True}, quiet)
    assert result["metrics"]["model/params"] == smaller
    assert read_trial(shared.folder / "a") is not None
