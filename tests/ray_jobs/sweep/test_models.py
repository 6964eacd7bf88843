"""The model that a sweep's trial kept is used like any other."""

from __future__ import annotations

import json

import pytest

from ray_jobs.predict import main as predict
from ray_jobs.sweep.trial import run_trial
from tests.predict.test_pruned import write_labelled

CUT = {"cut.mlp": 0.5, "cut.linear_out": 0.4}


@pytest.mark.parametrize("structured", [True, False])
def test_a_fine_tuned_trial_predicts_as_it_was_measured(shared_of, small_data, tmp_path, structured):
    shared = shared_of()
    values = {**CUT, "cut.structured": structured, "cut.finetune_epochs": 2}
    result = run_trial(shared, "tuned", values, lambda metrics: None)
    assert result["status"] == "finished", result
    images = write_labelled(tmp_path / "images", small_data.test, small_data.classes)
    out = tmp_path / "p.csv"
    assert predict([str(shared.folder / "tuned"), str(images), "--out", str(out), "--device", "cpu"]) == 0
    accuracy = json.loads(out.with_suffix(".json").read_text())["accuracy"]
    assert accuracy == pytest.approx(result["metrics"]["test/accuracy"])


def test_a_trial_that_only_measured_keeps_no_model_and_the_error_says_so(shared_of, tmp_path, capsys):
    shared = shared_of()
    assert run_trial(shared, "measured", CUT, lambda metrics: None)["status"] == "finished"
    assert predict([str(shared.folder / "measured"), "x.png", "--out", str(tmp_path / "p.csv")]) == 2
    assert "keeps no model" in capsys.readouterr().err
