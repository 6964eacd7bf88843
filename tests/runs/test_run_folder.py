"""A run's folder: its version, its states, and small files that are damaged."""

from __future__ import annotations

import json
import math
import os

import pytest
import yaml

from mamba.config.schema import RunConfig
from mamba.config.versions import FORMAT
from mamba.errors import ConfigError, FolderError
from mamba.runs import folder as runs
from mamba.runs.tracking import Tracker


def test_files_carry_the_version_and_newer_ones_are_refused(small_config, tmp_path):
    run = runs.create_run(small_config(trial="one"))
    assert yaml.safe_load((run / "config.yaml").read_text())["format"] == FORMAT
    assert runs.read_config(run) == small_config(trial="one")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"format: {FORMAT}", "format: 99"))
    with pytest.raises(ConfigError, match=r"config.yaml has format 99, of a newer version"):
        runs.read_config(run)
    (run / "config.yaml").write_text(text.replace(f"format: {FORMAT}\n", ""))  # version 1
    assert runs.read_config(run) == small_config(trial="one")
    (run / "result.json").write_text(json.dumps({"format": 99, "status": "finished", "metrics": {}}))
    with pytest.raises(FolderError, match=r"result.json has format 99"):
        runs.finished_result(run)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"status": "finished"}', '{"status": 1, "metrics": []}'])
def test_a_damaged_result_is_one_sentence(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(FolderError, match=r"result.json is damaged .*; remove it to finish the run again") as raised:
        runs.finished_result(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["", "[1, 2]", "data: [", "data: 1", "\x00"])
def test_a_damaged_config_is_one_sentence(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config.yaml") as raised:
        runs.read_config(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


def test_result_of_a_run_and_of_an_older_trial(tmp_path):
    result = {"status": "finished", "metrics": {"val/accuracy": None}, "tested": {}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert math.isnan(runs.finished_result(tmp_path)["metrics"]["val/accuracy"])
    assert runs.older_trial(tmp_path) is None
    trial = {"status": "finished", "metrics": {}, "values": {"prune.rate": 0.5}}
    (tmp_path / "result.json").write_text(json.dumps(trial))
    assert runs.finished_result(tmp_path) is None and runs.older_trial(tmp_path)["values"] == {"prune.rate": 0.5}


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"epoch": 1, "a": 1.0}\n[1]\n\xff\xfe\n{"epoch": "x"}\n{"epoch": 2, "a": null}\n{"epoch": 3, "a'
    )
    first, second = runs.epochs_of(tmp_path)
    assert first == {"epoch": 1, "a": 1.0} and second["epoch"] == 2 and math.isnan(second["a"])
    assert runs.epochs_of(tmp_path / "nowhere") == []


@pytest.mark.parametrize("damage", [b"\x00\xff\xfe", b"[1, 2, 3]\n", None])
def test_damaged_metrics_do_not_block_an_intact_checkpoint(small_fit, tmp_path, damage):
    small_fit(optim__epochs=1)
    run = tmp_path / "run"
    (run / "result.json").unlink()
    if damage is None:
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    else:
        (run / "metrics.jsonl").write_bytes(damage)
    small_fit(optim__epochs=2)
    assert [row["epoch"] for row in runs.epochs_of(run)] == [2] and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("content", ["", "[1]", '{"epoch": 1}', "{"])
def test_a_damaged_position_is_none(tmp_path, content):
    (tmp_path / "progress.json").write_text(content)
    assert runs.position_of(tmp_path) == {}


def test_a_request_to_stop_follows_no_link(tmp_path):
    (tmp_path / "STOP").symlink_to(tmp_path / "elsewhere")
    runs.request_stop(tmp_path)
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "STOP").unlink()
    runs.request_stop(tmp_path)
    assert runs.stop_requested(tmp_path)
    runs.forget_stop(tmp_path)
    assert not runs.stop_requested(tmp_path)


def test_config_text_is_a_config_file_for_the_command_line(small_config, tmp_path):
    runs.write_config(tmp_path, small_config())
    assert RunConfig.from_yaml(tmp_path / "config.yaml") == small_config() and os.listdir(tmp_path) == ["config.yaml"]


def test_a_result_that_was_changed_is_refused(tmp_path, small_config):
    tracker = Tracker(tmp_path, small_config(), 0, 0)
    tracker.finish({"status": "finished", "metrics": {"test/accuracy": 61.5}, "tested": None}, 1)
    result = tmp_path / "result.json"
    found = runs.finished_result(tmp_path)
    assert found is not None and found["metrics"] == {"test/accuracy": 61.5} and "checksum" not in found
    result.write_text(result.read_text().replace("61.5", "91.5"))
    with pytest.raises(FolderError, match=r"result.json is damaged or was changed .* remove it to finish the run"):
        runs.finished_result(tmp_path)
