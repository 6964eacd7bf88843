"""The model that is trained to be cut."""

from __future__ import annotations

import pytest

from mamba.errors import ConfigError
from mamba.runs.folder import write_config
from mamba.runs.tracking import Tracker
from ray_jobs.sweep.baseline import trained_baseline


def test_a_baseline_of_another_config_is_not_taken(small_config, tmp_path):
    """It was, whatever the command line said: what was cut was not what was asked for."""
    own = small_config(optim__epochs=2, optim__warmup_epochs=0)
    here = tmp_path / "ablation" / "baseline"
    here.mkdir(parents=True)
    write_config(here, own.with_values({"out": tmp_path, "name": "ablation", "trial": "baseline"}).resolve())
    Tracker(here, own, 0, 0).finish({"status": "finished", "metrics": {}, "tested": None}, 1)
    assert trained_baseline(own.with_values({"scaling.num_workers": 0}), here.parent) == here
    with pytest.raises(ConfigError, match=r"was trained with optim\.epochs 2, and 3 is asked for"):
        trained_baseline(own.with_values({"optim.epochs": 3}), here.parent)
