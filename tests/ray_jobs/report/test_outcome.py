"""A sweep from its command line on, as far as nothing runs."""

from __future__ import annotations

import pytest

from mamba.config.cli import TrainArgs
from mamba.errors import ConfigError
from ray_jobs.report import outcome
from ray_jobs.sweep import experiment
from tests.ray_jobs.sweep.test_experiment import grid_of


def test_what_is_refused_when_the_cluster_is_known_blocks_no_name(tmp_path, monkeypatch):
    """After "the cluster has no GPU" the same command said that the folder held an experiment."""

    def refuse(*_):
        raise ConfigError("data.device 'gpu' needs a GPU and there is none")

    monkeypatch.setattr(outcome, "run", refuse)
    wanted = grid_of(tmp_path, optim__lr=[0.1, 0.2])
    args = TrainArgs(wanted.config)
    for _ in range(2):
        with pytest.raises(ConfigError, match="needs a GPU"):
            outcome.perform(args, lambda: wanted, "tune.py")
    assert not wanted.folder.exists()
    folder = experiment.create(wanted, [])
    (folder / "optim.lr-0.1").mkdir()
    experiment.discard_if_unused(folder)
    assert folder.exists(), "trials are kept"
