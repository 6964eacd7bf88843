"""What an earlier version stored is read by today's names, and says so once."""

from __future__ import annotations

import json

import pytest
import yaml

from mamba.config import keys
from mamba.config.cli import parse_train_args
from mamba.config.keys import RETIRED, current, dotted_keys
from mamba.config.presets import get_preset
from mamba.config.schema import RunConfig
from mamba.errors import ConfigError

OLD = {
    "prune": {
        "method": "rsst",
        "target": "mlp",
        "exponent": 2.0,
        "linear_B_C": 0.3,
        "layer": 1,
        "structured": True,
        "finetune_epochs": 2,
        "penalty": "group",
        "penalty_strength": 0.5,
    }
}
NOW = {
    "prune.method": "rsst",
    "prune.target": "mlp",
    "prune.exponent": 2.0,
    "cut.linear_B_C": 0.3,
    "cut.layer": 1,
    "cut.structured": True,
    "cut.finetune_epochs": 2,
    "penalty.kind": "group",
    "penalty.strength": 0.5,
    "penalty.target": "mlp",  # one key of prune.* counted for both
    "penalty.exponent": 2.0,
}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(keys, "_said", set())


def test_table_leads_from_no_key_of_today_to_one():
    known = dotted_keys()
    assert not set(RETIRED) & set(known)
    assert {new for new in RETIRED.values() if new} <= set(known)


def test_stored_configs_are_read_and_said_once(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"seed": 3, **OLD}))
        assert parse_train_args(["--resume", str(tmp_path / name)]).config == RunConfig(seed=3).with_values(NOW)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "a/config.yaml is of an earlier version: prune." in said[0] and "6 keys" not in said[0]


def test_stored_experiments_are_read(tmp_path, capsys):
    (tmp_path / "experiment.json").write_text(json.dumps({"config": OLD}))
    assert parse_train_args(["--resume", str(tmp_path)]).config == RunConfig().with_values(NOW)
    assert "experiment.json is of an earlier version" in capsys.readouterr().err


def test_old_words_on_the_command_line(capsys):
    words = "--prune.linear-out 0.5 --prune.layer none --prune.penalty l1 --prune.exponent 3"
    config = parse_train_args(words.split()).config
    wanted = {"cut.linear_out": 0.5, "penalty.kind": "l1", "penalty.exponent": 3.0, "prune.exponent": 3.0}
    assert config == get_preset("quickstart").with_values(wanted)
    assert "note: the command line is of an earlier version: prune.linear_out is read as cut.linear_out" in (
        capsys.readouterr().err
    )
    with pytest.raises(ConfigError, match="prune.mlp is called cut.mlp now, and both are given"):
        parse_train_args(["--prune.mlp", "0.5", "--cut.mlp", "0.5"])


def test_code_must_use_todays_names():
    with pytest.raises(ConfigError, match="unknown key 'prune.mlp': it is cut.mlp now"):
        RunConfig().with_values({"prune.mlp": 0.5})


def test_what_is_of_today_is_left_alone(capsys):
    assert current({"optim.lr": 1, "cut.mlp": 0.5}, "x") == {"optim.lr": 1, "cut.mlp": 0.5}
    assert RunConfig.stored(get_preset("v2").model_dump(mode="json"), "x") == get_preset("v2")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("tree", [None, [], "text", {1: 2}])
def test_no_mapping_is_refused(tree):
    with pytest.raises(ConfigError, match="x does not hold a run config"):
        RunConfig.stored(tree, "x")
