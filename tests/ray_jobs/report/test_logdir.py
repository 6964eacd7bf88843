"""compare.py --tensorboard, read back through TensorBoard's own code."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mamba.runs.files import read_sealed, write_sealed
from ray_jobs.compare import main as compare
from ray_jobs.report.logdir import SHOWN, short_names
from tests.ray_jobs.report.experiments import left_behind, lost, run_left_behind, space_of
from tests.runs.test_tracking import hparams_table

SIZES = {"model/params": 1000, "model/macs": 5000, "val/loss": 1.0}


@pytest.fixture
def runs(tmp_path):
    """Trainings, one of them elsewhere, and an ablation with a trial that failed."""
    folder = tmp_path / "runs"
    for name, lr, best in (("low", 1e-4, 70.0), ("high", 1e-2, 91.0)):
        metrics = {
            "val/best_accuracy": best,
            "val/accuracy": best - 1,
            "test/accuracy": best,
            "train/loss": 0.5,
            **SIZES,
        }
        epochs = [{"val/accuracy": best - 9, "train/loss": 2.0}, {"val/accuracy": best - 1, "train/loss": 0.5}]
        result = {"status": "finished", "metrics": metrics, "seconds": 1.0}
        run_left_behind(folder / "digits" / name, result, epochs, optim__lr=lr)
    trials = [lost({"cut.linear_delta": rate}, 50 * rate, 90.0, **SIZES) for rate in (0.1, 0.3)]
    trials[0]["metrics"]["val/best_accuracy"] = trials[0]["metrics"]["val/accuracy"]
    trials.append({**lost({"cut.linear_delta": 0.5}, 9.0), "status": "failed", "metrics": {}})
    left_behind(folder / "ablation", space_of(grids=[{"cut.linear_delta": [0.1, 0.3, 0.5]}]), trials)
    return folder


def test_the_first_view_compares(runs, tmp_path, capsys):
    logdir = tmp_path / "logdir"
    assert compare([str(runs), "--tensorboard", str(logdir)]) == 0
    said = capsys.readouterr().out
    assert f"tensorboard --logdir {logdir}" in said and "pinnedCards=" in said
    experiment, groups = hparams_table(logdir)
    rows = {g.name: {m.name.tag: m.value for m in g.metric_values} for g in groups}
    assert list(rows) == sorted(rows) and all(len(name) <= SHOWN for name in rows)
    assert [name[2:] for name in sorted(rows)] == ["high", "delta-0.1", "delta-0.3", "low", "delta-0.5"], "ranked"
    first = {h.name for h in experiment.hparam_infos if h.differs}
    assert first >= {"experiment", "optim.lr", "cut.linear_delta"} and len(first) <= 5
    columns = {h.name for h in experiment.hparam_infos}
    assert columns >= {"status", "trial"} and not columns & {"optim.weight_decay", "model.name"}, "no constants"
    unasked = [m.name.tag for m in experiment.metric_infos[:5]]
    assert unasked[0] == "val/best_accuracy"
    ended = [shown for name, shown in rows.items() if not name.endswith("0.5")]
    assert all(set(unasked) <= set(shown) for shown in ended), "parallel coordinates draw every run that ended well"
    assert rows["1 high"]["val/best_accuracy"] == pytest.approx(91.0)
    assert rows["2 delta-0.1"]["val/best_accuracy"] == pytest.approx(85.0)
    assert {g.hparams["experiment"].string_value for g in groups} == {"digits", "ablation"}
    assert {g.hparams["status"].string_value for g in groups} == {"finished", "failed"}
    events = EventAccumulator(str(logdir / "1 high"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("val/accuracy")] == [(1, 82.0), (2, 90.0)], "by epochs"


def test_what_is_not_ours_is_not_replaced(runs, tmp_path, capsys):
    logdir = tmp_path / "logdir"
    for _ in range(2):  # its own folder is
        assert compare([str(runs), "--tensorboard", str(logdir)]) == 0
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("")
    capsys.readouterr()
    for target, words in (
        (tmp_path / "photos", "holds something else"),
        (runs / "tb", "lies within"),
        (runs, "lies wit"),
    ):
        assert compare([str(runs), "--tensorboard", str(target)]) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "photos" / "1.jpg").exists() and not (runs / "tb").exists()


def test_an_old_metric_that_some_lack_hides_no_run(runs, tmp_path):
    """Five metrics are drawn unasked; where fewer are everywhere, no other stands there."""
    file = runs / "ablation" / "cut.linear_delta-0.1" / "trial.json"
    tree = read_sealed(file)
    tree["metrics"].pop("val/loss")
    write_sealed(file, tree)
    assert compare([str(runs), "--tensorboard", str(tmp_path / "logdir")]) == 0
    experiment, groups = hparams_table(tmp_path / "logdir")
    shown = {m.name.tag for m in experiment.metric_infos}
    assert "val/loss" not in shown and "test/accuracy" not in shown
    assert sum(shown <= {m.name.tag for m in g.metric_values} for g in groups) == 4


def test_only_the_newest_run_has_its_picture(small_fit, tmp_path):
    import os

    for i, name in enumerate(("runs/a/old", "runs/a/new")):
        (tmp_path / name).mkdir(parents=True)
        small_fit(name, optim__epochs=1)
        os.utime(tmp_path / name / "result.json", (i, i + 2e9))
    assert compare([str(tmp_path / "runs"), "--tensorboard", str(tmp_path / "logdir")]) == 0
    events = EventAccumulator(str(tmp_path / "logdir" / "newest run"))
    events.Reload()
    assert events.Tags()["images"] == ["train/augmented, runs/a/new"]


def test_names_are_short_and_each_another():
    trials = ["x/linear_delta-0.3", "y/linear_delta-0.3", "x (baseline)", "z/a b!/..", "optimizer-muon_lr-0.003"] + [
        "w"
    ] * 9
    names = short_names(trials)
    assert len(set(names)) == len(trials) and all(len(name) <= SHOWN for name in names)
    assert names[0] == "01 delta-0.3" and names[2] == "03 baseline" and "/" not in "".join(names)
