"""Studies: whose they are, what they are told, how they go on after a death, and without their file."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3

import optuna
import pytest

from mamba.config.schema import RunConfig
from mamba.errors import ConfigError
from ray_jobs.sweep import experiment
from ray_jobs.sweep.results import TRIAL, write_trial
from ray_jobs.sweep.run import _search
from ray_jobs.sweep.searcher import StudyTrials
from ray_jobs.sweep.space import Space, checked, load_space
from ray_jobs.sweep.study import OWNER, check_storage, new_id, open_study
from ray_jobs.sweep.warm_start import best_of
from ray_jobs.tune import main as tune

SPACE = load_space("quickstart")


def make(tmp_path, name="exp", space=SPACE, count=4, storage=None, warm=None):
    config = RunConfig().with_values({"out": tmp_path, "name": name, "data.dataset": "digits"})
    own = experiment.Experiment(space, [], config, None, None, storage, count, warm_start=warm)
    return own, experiment.create(own, ["tune.py"])


def leave(folder, handed, metrics, status="finished"):
    result = {"status": status, "metrics": metrics, "values": handed["values"]}
    return write_trial(folder / handed["trial"], result)


def test_a_study_goes_on_after_its_sweep_died(tmp_path):
    """Rows that were running: one whose trial had left its result counts, the other runs again, as it was."""
    own, folder = make(tmp_path)
    first = _search(own, folder)
    handed = [first.suggest(str(i)) for i in range(3)]
    results = [leave(folder, handed[i], {"val/best_accuracy": 90.0 + i}) for i in range(2)]
    first.settled("trial-0000", results[0])  # the sweep dies before it hears of the second
    again = _search(own, folder)
    assert [t.state.name for t in again.study.trials] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert again.suggest("x") == handed[2], "an interrupted trial got other parameters"
    fresh = again.suggest("y")
    assert fresh["trial"] == "trial-0003" and fresh["values"] != handed[0]["values"]
    assert again.suggest("z") == "FINISHED" and again.exhausted()
    assert optuna.study.get_all_study_names(f"sqlite:///{folder / 'study.db'}") == [folder.name]


def test_a_lost_study_is_made_again_from_the_trials_own_values(tmp_path):
    """New parameters were paired with the metrics of other trials, and the sweep ended well."""
    own, folder = make(tmp_path)
    first = _search(own, folder)
    handed = [first.suggest(str(i)) for i in range(4)]
    for i, status in enumerate(["finished", "stopped early", "failed"]):
        leave(folder, handed[i], {"val/best_accuracy": 50.0 + i} if i < 2 else {}, status)
    (folder / "study.db").unlink()
    again = _search(own, folder)
    assert [t.state.name for t in again.study.trials] == ["COMPLETE", "PRUNED", "FAIL"]
    assert [t.params for t in again.study.trials] == [
        {k: v for k, v in h["values"].items() if k in SPACE.search} for h in handed[:3]
    ]
    assert again.study.best_value == 50.0
    assert again.suggest("x")["trial"] == "trial-0003"


def test_a_study_whose_parameters_are_not_those_of_the_trials_is_refused(tmp_path):
    """What was drawn next followed from results at points where nothing had run."""
    own, folder = make(tmp_path)
    first = _search(own, folder)
    handed = first.suggest("0")
    first.settled(handed["trial"], leave(folder, handed, {"val/best_accuracy": 50.0}))
    assert _search(own, folder).study.best_value == 50.0
    with contextlib.closing(sqlite3.connect(folder / "study.db")) as base, base:
        base.execute("UPDATE trial_params SET param_value = 0.0031 WHERE param_name = 'optim.lr'")
    with pytest.raises(
        ConfigError, match=r"study.db says optim.lr 0.0031 of trial-0000, which ran with 0.00\d+: .*remove"
    ):
        _search(own, folder)
    (folder / "study.db").unlink()
    assert _search(own, folder).study.best_value == 50.0


def test_a_trial_whose_result_is_gone_or_damaged_runs_again_as_it_was(tmp_path):
    own, folder = make(tmp_path, count=3)
    first = _search(own, folder)
    handed = [first.suggest(str(i)) for i in range(3)]
    for i, trial in enumerate(handed):
        first.settled(trial["trial"], leave(folder, trial, {"val/best_accuracy": 90.0 + i}))
    (folder / "trial-0000" / TRIAL).write_text("{")
    (folder / "trial-0002" / TRIAL).unlink()
    again = _search(own, folder)
    assert [again.suggest("a"), again.suggest("b"), again.suggest("c")] == [handed[0], handed[2], "FINISHED"]
    again.settled("trial-0000", leave(folder, handed[0], {"val/best_accuracy": 90.0}))
    assert again.exhausted() and len(again.study.trials) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_what_is_no_number_is_told_as_a_failure(tmp_path, value):
    own, folder = make(tmp_path)
    search = _search(own, folder)
    good, bad = search.suggest("good"), search.suggest("bad")
    search.on_trial_result("bad", {"epoch": 1, "val/best_accuracy": value if value is not None else math.nan})
    search.settled(bad["trial"], leave(folder, bad, {} if value is None else {"val/best_accuracy": value}))
    search.settled(good["trial"], leave(folder, good, {"val/best_accuracy": 1.0}))
    assert [t.state.name for t in search.study.trials] == ["COMPLETE", "FAIL"]
    assert search.study.best_trial.number == 0 and not search.study.trials[1].intermediate_values


def test_reports_count_epochs(tmp_path):
    own, folder = make(tmp_path)
    search = _search(own, folder)
    search.suggest("a")
    search.on_trial_result("a", {"epoch": 9, "training_iteration": 1, "val/best_accuracy": 50.0})
    assert search.study.trials[0].intermediate_values == {9: 50.0}


def test_a_study_belongs_to_one_experiment(tmp_path, capsys):
    """Two experiments of one name took each other's trials."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    own, folder = make(tmp_path / "first", storage=url)
    assert _search(own, folder).study.user_attrs[OWNER] == own.id
    other = RunConfig().with_values({"out": tmp_path / "second", "name": "exp", "data.dataset": "digits"})
    with pytest.raises(ConfigError, match="holds a study 'exp' already, of another experiment"):
        experiment.create(experiment.Experiment(SPACE, [], other, None, None, url, 3), [])
    assert not (tmp_path / "second").exists()
    with pytest.raises(ConfigError, match="of another experiment: its trials are not those"):
        open_study(SPACE, folder, url, 0, new_id())
    words = ["--space", "quickstart", "--storage", url, "--name", "exp", "--out", str(tmp_path / "third")]
    assert tune(words) == 2 and not (tmp_path / "third").exists()
    assert "of another experiment" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url, words",
    [
        ("nonsense", "Could not parse"),
        ("http://here", "Can't load plugin"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:////nowhere/at/all.db", "there is no folder /nowhere/at"),
        ("oracle://user@host/name", "oracle"),
    ],
)
def test_a_bad_storage_is_a_sentence_before_a_folder_is_made(tmp_path, capsys, url, words):
    with pytest.raises(ConfigError, match=words):
        check_storage(url)
    assert tune(["--space", "quickstart", "--storage", url, "--out", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_storage_that_is_no_database_is_a_sentence(tmp_path):
    (tmp_path / "study.db").write_text("no database" * 1000)
    with pytest.raises(ConfigError, match="cannot be used"):
        check_storage(f"sqlite:///{tmp_path / 'study.db'}")


def test_a_search_takes_more_trials(tmp_path, capsys):
    own, folder = make(tmp_path, count=2)
    search = _search(own, folder)
    for i in range(2):
        trial = search.suggest(str(i))
        search.settled(trial["trial"], leave(folder, trial, {"val/best_accuracy": 1.0}))
    assert search.exhausted()
    assert experiment.more_trials(folder, 5) == 2
    more = _search(experiment.load(folder), folder)
    assert [more.suggest(str(i))["trial"] for i in range(3)] == ["trial-0002", "trial-0003", "trial-0004"]
    assert more.exhausted()
    with pytest.raises(ConfigError, match="has 5 trials to draw; valid: 5 to"):
        experiment.more_trials(folder, 4)
    assert tune(["--resume", str(folder), "--trials", "1"]) == 2 and "valid: 5 to" in capsys.readouterr().err


def test_a_search_starts_from_anothers_best(tmp_path):
    own, folder = make(tmp_path)
    search = _search(own, folder)
    handed = [search.suggest(str(i)) for i in range(3)]
    for i, score in enumerate([50.0, 90.0, math.nan]):
        search.settled(handed[i]["trial"], leave(folder, handed[i], {"val/best_accuracy": score}))
    wider = Space.model_validate({**SPACE.model_dump(by_alias=True), "search": {
        **SPACE.model_dump()["search"], "optim.weight_decay": {"low": 0.0, "high": 0.1}}})  # fmt: skip
    warm = best_of(folder, checked(wider))
    assert warm == [{k: handed[1]["values"][k] for k in SPACE.search}]
    second, place = make(tmp_path, "second", checked(wider), warm=warm)
    first, other = (s := _search(second, place)).suggest("a"), s.suggest("b")
    assert {k: first["values"][k] for k in SPACE.search} == warm[0] and "optim.weight_decay" in first["values"]
    assert other["values"]["optim.lr"] != warm[0]["optim.lr"]
    assert len(_search(second, place).study.trials) == 2, "enqueued again by a sweep that is continued"
    narrow = Space.model_validate(
        {**SPACE.model_dump(by_alias=True), "search": {"optim.lr": {"low": 10.0, "high": 11.0}}}
    )
    with pytest.raises(ConfigError, match="none of its best values is within this space"):
        best_of(folder, checked(narrow))
    with pytest.raises(ConfigError, match="holds no experiment"):
        best_of(tmp_path / "nowhere", SPACE)


def test_conditional_keys_are_drawn_where_they_hold(tmp_path):
    search = {"data.mixup": {"choices": [0.0, 0.8]},
              "data.mix_prob": {"low": 0.1, "high": 1.0, "when": {"data.mixup": {"above": 0}}}}  # fmt: skip
    space = checked(
        Space(question="q", cost="c", kind="train", search=search, objectives={"val/loss": "min"}, trials=30)
    )
    own, folder = make(tmp_path, space=space, count=30)
    drawn = _search(own, folder)
    assert isinstance(drawn, StudyTrials)
    for i in range(10):
        trial = drawn.suggest(str(i))
        assert ("data.mix_prob" in trial["values"]) == (trial["values"]["data.mixup"] > 0)
        drawn.settled(trial["trial"], leave(folder, trial, {"val/loss": float(i)}))
    (folder / "study.db").unlink()
    assert len(_search(own, folder).study.trials) == 10


def test_an_older_experiment_without_an_owner_goes_on(tmp_path):
    _, folder = make(tmp_path)
    tree = json.loads((folder / "experiment.json").read_text())
    for key in ("id", "warm_start", "checksum"):
        del tree[key]
    (folder / "experiment.json").write_text(json.dumps(tree))
    loaded = experiment.load(folder)
    assert loaded.id is None
    assert _search(loaded, folder).suggest("a")["trial"] == "trial-0000"
