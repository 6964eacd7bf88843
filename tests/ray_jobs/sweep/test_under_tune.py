"""Sweeps under Tune, all on one cluster in this process."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time

import optuna
import pytest
import yaml

from mamba.runs.hparams import HPARAM_METRICS
from ray_jobs.ablate import main as ablate
from ray_jobs.compare import main as compare
from ray_jobs.sweep.space import load_space
from ray_jobs.tune import main as tune
from tests.runs.test_tracking import hparams_table, shown_status

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster"), pytest.mark.timeout(400)]

FAST = ["--model.d-model", "12", "--model.depth", "2", "--model.d-state", "4", "--data.batch-size", "128"]


@pytest.fixture(scope="module")
def cluster():
    """A local cluster of two CPUs that every sweep in this process connects to."""
    from ray_jobs.launch.cluster import connected

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        with connected(print) as found:
            yield found


def test_an_ablation_from_its_command_to_its_report(trained_on_digits, tmp_path, capsys, monkeypatch):
    """All three grids, of each component one rate; all rates: test_killed.py."""

    def of_one_rate(name):
        space = load_space(name)
        grids = [{key: values[-1:] if isinstance(values, list) else values for key, values in g.items()}
                 for g in space.grids]  # fmt: skip
        return space.model_copy(update={"grids": grids})

    monkeypatch.setattr("ray_jobs.sweep.space.load_space", of_one_rate)
    words = ["--checkpoint", str(trained_on_digits), "--out", str(tmp_path)]
    assert ablate(words) == 0
    folder = tmp_path / "ablation"
    with (folder / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len({row["trial"] for row in table}) == 7 + 2 + 3
    assert all(row["status"] == "finished" for row in table)
    assert [r["trial"] for r in table if r["bench/images_per_s"]] == [
        r["trial"] for r in table if "joint" in r["trial"]
    ]
    assert {p.name for p in (folder / "report").glob("*.png")} >= {"components.png", "layers.png", "joint.png"}
    columns, groups = hparams_table(tmp_path)
    assert {m.name.tag for m in columns.metric_infos} == set(HPARAM_METRICS), "Tune's own files took the tab over"
    assert [g.hparams["status"].string_value for g in groups] == ["finished"] * len(table)
    page = (folder / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64") >= 3
    said = capsys.readouterr().out
    assert "12/12" in said and f"report: {folder}/report/index.html" in said
    assert ablate(words) == 2
    assert "holds an experiment already" in capsys.readouterr().err
    assert compare([str(folder), "--csv", str(tmp_path / "all.csv")]) == 0
    assert "ablation/components-mlp-0.9," in (tmp_path / "all.csv").read_text()


@pytest.mark.long
def test_a_search_stopped_continued_and_extended(tmp_path, capsys):
    """SIGTERM, as `ray job stop` sends it: an orderly end with results so far; then the rest and one trial more, with
    the same study. Learning rates below optim.min_lr cannot be, which costs those trials alone."""
    words = [*FAST, "--space", "quickstart", "--trials", "4", "--out", str(tmp_path), "--optim.min-lr", "2e-3"]
    folder = tmp_path / "search"

    def stop():
        ends = time.monotonic() + 300
        while not list(folder.glob("trial-*/trial.json")) and time.monotonic() < ends:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert tune(words) == 130
    assert f"--resume {folder}" in capsys.readouterr().out and (folder / "results.csv").exists()
    before = {p: p.stat().st_mtime_ns for p in folder.glob("trial-*/trial.json")}
    assert tune(["--resume", str(folder), "--trials", "5"]) == 1
    assert "5 trials in all, 1 more than before" in capsys.readouterr().out
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in before.items()), "a trial that was over ran again"
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'study.db'}")
    states = {"COMPLETE": "finished", "PRUNED": "stopped early", "FAIL": "failed"}
    assert len(study.trials) == 5 and {"COMPLETE", "FAIL"} <= {t.state.name for t in study.trials} <= set(states)
    for t in study.trials:
        result = json.loads((folder / f"trial-{t.number:04d}" / "trial.json").read_text())
        assert result["values"]["optim.lr"] == pytest.approx(t.params["optim.lr"])
        assert result["status"] == states[t.state.name]
        assert (result["status"] == "failed") == (t.params["optim.lr"] < 2e-3)
        assert shown_status(folder / f"trial-{t.number:04d}") == result["status"]
    with (folder / "results.csv").open() as file:
        assert "failed" in {row["status"] for row in csv.DictReader(file)}


def test_a_grid_over_the_data_and_a_trial_that_diverges(tmp_path, capsys):
    """Each trial on the images that its keys say; the one whose loss is no number has failed, and is not the best."""
    space = {
        "question": "?", "cost": "3 trials", "kind": "train", "set": {"optim.epochs": 2, "optim.warmup_epochs": 0.0},
        "grids": [{"data.img_size": [8, 16]},
                  {"optim.lr": [1e30], "optim.grad_clip": [None], "optim.max_skipped": [1000]}],
    }  # fmt: skip
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    assert tune([*FAST, "--space", str(tmp_path / "space.yaml"), "--out", str(tmp_path), "--name", "grid"]) == 1
    with (tmp_path / "grid" / "results.csv").open() as file:
        table = {row["trial"]: row for row in csv.DictReader(file)}
    assert [row["status"] for row in table.values()].count("failed") == 1
    (bad,) = [row for row in table.values() if row["status"] == "failed"]
    assert "1e" in bad["trial"] and bad["reason"]
    assert len({row["model/macs"] for row in table.values() if row is not bad}) == 2
    assert f"failed: {bad['trial']}" in capsys.readouterr().out


@pytest.mark.long
def test_a_sweep_of_rounds_on_digits_from_its_command_to_its_report(tmp_path, capsys):
    space = {
        "question": "?", "cost": "2 series", "kind": "rounds",
        "set": {"prune.rounds": 1, "prune.ssm_rate": 0.5, "prune.mlp_rate": 0.7, "optim.epochs": 2,
                "optim.warmup_epochs": 0.0},
        "grids": [{"prune.method": ["refill", "rsst"]}],
    }  # fmt: skip
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    assert tune([*FAST, "--space", str(tmp_path / "space.yaml"), "--out", str(tmp_path), "--name", "two"]) == 0
    folder = tmp_path / "two"
    with (folder / "results.csv").open() as file:
        table = {row["trial"]: row for row in csv.DictReader(file)}
    assert set(table) == {"method-refill", "method-rsst"}
    assert all(float(row["bench/images_per_s"]) > 0 and float(row["prune/density"]) < 0.5 for row in table.values())
    assert (folder / "report" / "rounds.png").exists()
    assert "validation accuracy (and parameters) by density" in capsys.readouterr().out
    stamps = [p.stat().st_mtime_ns for p in folder.glob("*/trial.json")]
    assert tune(["--resume", str(folder)]) == 0
    assert [p.stat().st_mtime_ns for p in folder.glob("*/trial.json")] == stamps
    assert len(json.loads((folder / "method-rsst" / "trial.json").read_text())["rounds"]) == 2
