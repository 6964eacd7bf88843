"""What a sweep is said to take, beside what a run of it took."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mamba.errors import DataError
from mamba.models.model import Architecture
from ray_jobs.report.outcome import _estimate
from ray_jobs.sweep import estimate
from ray_jobs.sweep.estimate import Measured, estimated, trial_seconds
from ray_jobs.sweep.experiment import Experiment
from ray_jobs.sweep.grid import expand
from ray_jobs.sweep.space import Space
from tests.conftest import make_small_config

FOUND = Measured("a toy", step_s=0.5, batch=16, eval_image_s=0.01, disk=10**9, macs=1e5)


@pytest.fixture
def grid(tmp_path):
    """Four trainings of two epochs."""
    space = Space.model_validate(
        {"question": "?", "cost": "?", "kind": "train", "grids": [{"optim.lr": [1e-3, 2e-3], "seed": [0, 1]}]}
    )
    config = make_small_config(tmp_path / "runs", optim__epochs=2)
    return Experiment(space, expand(space, 0), config, None, None, None, 4)


def test_a_number_and_nothing_is_left(grid, tmp_path):
    said = estimated(grid, seconds=0.05)
    assert re.search(r"^4 trials: about [\d.]+ (seconds|minutes) of (CPU|GPU) time", said), said
    assert re.search(r"measured on .*: [\d.e+]+ ms a step of 16 images", said)
    assert not (tmp_path / "runs").exists()


def test_the_disk_is_that_of_a_run(grid, small_config, small_fit, tmp_path):
    config = small_config(optim__epochs=1)
    found = estimate.measure(config, seconds=0.05)
    small_fit(optim__epochs=1)
    kept = sum(f.stat().st_size for f in (tmp_path / "run" / "checkpoints").rglob("*") if f.is_file())
    assert 0.8 * kept < found.disk < 1.25 * kept and found.step_s > 0 and found.eval_image_s > 0


def test_time_follows_epochs_batches_models_and_weights(small_config):
    """Of 1,297 digits to train on and 143 or so to validate, two epochs of 81 steps."""
    config = small_config(optim__epochs=2, ema__enabled=False)
    own = replace(FOUND, macs=float(Architecture.from_config(config.model, 10, 8).macs()))
    once = trial_seconds(config, own, False)
    steps = 2 * (estimate.describe(config.data, 0)[1] // 16)
    held = once - steps * 0.5
    assert 2 * 0.01 * 130 < held < 2 * 0.01 * 160
    assert trial_seconds(small_config(optim__epochs=4, ema__enabled=False), own, False) == pytest.approx(2 * once)
    averaged = trial_seconds(small_config(optim__epochs=2), own, False)
    assert averaged == pytest.approx(once + held), "averaged weights are validated too"
    larger = trial_seconds(small_config(optim__epochs=2, ema__enabled=False, model__d_model=24), own, False)
    assert 2 * once < larger < 4 * once


def test_cuts_are_validated_and_not_trained(trained, tmp_path):
    space = Space.model_validate(
        {"question": "?", "cost": "?", "kind": "measure", "grids": [{"cut.mlp": [0.1, 0.5], "cut.structured": [False]}]}
    )
    config = make_small_config(tmp_path / "runs", data__val_fraction=0.25)
    told = Experiment(space, expand(space, 2), config, trained, None, None, 2)
    assert "ms an image to validate" in estimated(told) and "a step of" not in estimated(told)


def test_more_than_the_disk_has_is_said(grid, monkeypatch):
    monkeypatch.setattr(estimate, "measure", lambda *_: FOUND)
    monkeypatch.setattr(estimate, "_free", lambda _: 3 * 10**9)
    said = estimated(grid)
    assert "disk: 4 GB, 1 GB a trial; 3 GB are free\nthat is more than is free: lower checkpoint.keep" in said


def test_what_cannot_be_measured_says_why(grid, monkeypatch):
    def missing(*_):
        raise DataError("there is nothing at x")

    monkeypatch.setattr(estimate, "describe", missing)
    assert _estimate(grid, None) == "time and disk: not measured, there is nothing at x"
