"""A trial's result beside its run's; older folders are read; what is damaged or not finite counts as none."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from ray_jobs.report.collect import collect
from ray_jobs.sweep.results import TRIAL, baseline_of, read_trial, refused, rows, write_baseline, write_trial

RESULT = {"status": "finished", "metrics": {"val/accuracy": 90.0}, "values": {"optim.lr": 0.1}, "seconds": 2.0}


def test_a_trials_result_is_not_its_runs(tmp_path):
    write_trial(tmp_path / "a", RESULT)
    (tmp_path / "a" / "result.json").write_text(json.dumps({"status": "finished", "metrics": {"val/accuracy": 1.0}}))
    (tmp_path / "running").mkdir()
    (tmp_path / "running" / "result.json").write_text(json.dumps({"status": "finished", "metrics": {}}))
    assert read_trial(tmp_path / "running") is None, "a run's result ended a trial"
    assert rows(tmp_path) == [{"trial": "a", "reason": "", **RESULT}]
    assert [row["metrics"] for row in collect([tmp_path]).rows] == [{"val/accuracy": 90.0}, {}]


def test_folders_from_before_trial_json_are_read(tmp_path):
    (tmp_path / "old").mkdir()
    tree = {**RESULT, "trial_seconds": 3.0}
    (tmp_path / "old" / "result.json").write_text(json.dumps(tree))
    assert [row["seconds"] for row in rows(tmp_path)] == [3.0]


DAMAGED = ["", "{", "[]", '{"status": "finished"}', '{"status": 1, "values": {}, "metrics": {}}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_result_is_none(tmp_path, text):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / TRIAL).write_text(text)
    assert read_trial(tmp_path / "a") is None and rows(tmp_path) == []
    (tmp_path / "baseline.json").write_text(text)
    assert "val/accuracy" not in baseline_of(tmp_path)


def test_a_result_that_was_changed_is_named_and_ranked_nowhere(tmp_path):
    write_trial(tmp_path / "a", RESULT)
    write_baseline(tmp_path, {"val/accuracy": 95.0})
    assert refused(tmp_path) == []
    for path, old, new in ((tmp_path / "a" / TRIAL, "90.0", "98.0"), (tmp_path / "baseline.json", "95.0", "75.0")):
        path.write_text(path.read_text().replace(old, new))
    assert read_trial(tmp_path / "a") is None and rows(tmp_path) == [] and baseline_of(tmp_path) == {}
    said = refused(tmp_path)
    assert len(said) == 2 and all("was changed" in s and "checksum" in s for s in said) and TRIAL in said[0]
    found = collect([tmp_path])
    assert found.rows == [] and TRIAL in found.skipped[0]
    path = tmp_path / "a" / TRIAL  # as earlier versions wrote it, or on purpose
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"}))
    assert [row["metrics"]["val/accuracy"] for row in rows(tmp_path)] == [98.0]


def test_a_copy_of_a_trial_is_no_other_trial(tmp_path):
    """It was another row, and "7 of 6" had finished."""
    write_trial(tmp_path / "a", RESULT)
    shutil.copytree(tmp_path / "a", tmp_path / "a-keep")
    assert [row["trial"] for row in rows(tmp_path)] == ["a"]
    assert len(refused(tmp_path)) == 1 and "a-keep/trial.json is that of trial a: a copy" in refused(tmp_path)[0]


def test_what_is_not_finite_is_null_and_no_metric(tmp_path):
    write_trial(tmp_path / "a", {**RESULT, "metrics": {"val/loss": math.nan, "train/loss": math.inf, "epoch": 3}})
    text = (tmp_path / "a" / TRIAL).read_text()
    assert "NaN" not in text and "Infinity" not in text
    result = read_trial(tmp_path / "a")
    assert result is not None and result["metrics"] == {"epoch": 3}


def test_the_baseline_grows(tmp_path):
    write_baseline(tmp_path, {"val/accuracy": 1.0})
    assert write_baseline(tmp_path, {"bench/latency_ms": 2.0}) == baseline_of(tmp_path)
    assert baseline_of(tmp_path) == {"val/accuracy": 1.0, "bench/latency_ms": 2.0}
