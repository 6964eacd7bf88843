"""Spaces of kind rounds: what a series does as a trial, what is refused, what the report says; and presets in grids."""

from __future__ import annotations

import csv

import pytest
import torch

from mamba.config.cli import parse_sweep_args
from mamba.config.presets import get_preset
from mamba.config.schema import RunConfig
from mamba.errors import ConfigError
from mamba.runs import checkpoint as ckpt
from pruning import load_masks, rounds
from ray_jobs.launch.recipe import recipe_of
from ray_jobs.report.findings import findings
from ray_jobs.report.page import write_report
from ray_jobs.sweep import rounds as sweep_rounds
from ray_jobs.sweep.checks import check
from ray_jobs.sweep.experiment import Experiment, create
from ray_jobs.sweep.grid import Trial, expand
from ray_jobs.sweep.results import read_trial, rows
from ray_jobs.sweep.run import _time_series
from ray_jobs.sweep.space import Space, base_of, checked, load_space
from ray_jobs.sweep.trial import run_trial
from ray_jobs.tune import main as tune

VALUES = {"prune.method": "refill", "prune.rate": 0.5, "prune.rounds": 2, "optim.epochs": 2}


def quiet(_):
    """Nothing is done with reports."""


def series_space(**grid):
    return checked(Space(question="q", cost="c", kind="rounds", grids=[grid]))


def test_a_series_is_a_trial_and_its_report_shows_methods_side_by_side(shared_of):
    shared = shared_of("rounds")
    space = series_space(**{"prune.method": ["refill", "rsst"]})
    config = RunConfig(**shared.config)
    trials = [Trial(m, {**VALUES, "prune.method": m}) for m in ("refill", "rsst")]
    create(Experiment(space, trials, config.with_values({"out": shared.folder.parent, "name": shared.folder.name}),
                      None, None, None, 2), ["tune.py"])  # fmt: skip
    for trial in trials:
        result = run_trial(shared, trial.name, trial.values, quiet)
        assert result["status"] == "finished", result
        assert [row["density"] for row in result["rounds"]] == pytest.approx([1, 0.5, 0.25], abs=1e-3)
        last = result["rounds"][-1]
        assert result["metrics"]["test/accuracy"] == last["test_accuracy"]
        assert result["metrics"]["val/best_accuracy"] == last["val_accuracy"]
        assert "bench/images_per_s" not in result["metrics"], "timed beside other trials"
    _time_series(shared, quiet)
    for name in ("refill", "rsst"):
        result = read_trial(shared.folder / name)
        assert result["metrics"]["bench/images_per_s"] == result["rounds"][-1]["images_per_s"] > 0
        with (shared.folder / name / "rounds.csv").open() as file:
            assert all(float(row["images_per_s"]) > 0 and row["val_accuracy"] for row in csv.DictReader(file))
    assert sweep_rounds.models_to_time(shared.folder) == [], "timed again"
    table = rows(shared.folder)
    text = findings(table, {})
    assert "density 0.25:" in text and "refill" in text and "rsst" in text
    page = write_report(shared.folder, table, text).read_text()
    assert (shared.folder / "report" / "rounds.png").exists() and "density 0.25:" in page


def test_a_series_goes_on_where_its_sweep_was_killed(shared_of, monkeypatch):
    shared = shared_of("rounds")
    whole = run_trial(shared, "whole", VALUES, quiet)
    fit, trained = sweep_rounds.fit, []

    def killed(config, process, folder, *rest):
        trained.append(folder.name)
        if folder.name == "round-01" and trained.count("round-01") == 1:
            raise KeyboardInterrupt
        return fit(config, process, folder, *rest)

    monkeypatch.setattr(sweep_rounds, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        run_trial(shared, "parts", VALUES, quiet)
    again = run_trial(shared, "parts", VALUES, quiet)
    assert trained == ["round-00", "round-01", "round-01", "round-02"]
    same = ("density", "params", "test_accuracy", "val_accuracy")
    assert [[r[k] for k in same] for r in again["rounds"]] == [[r[k] for k in same] for r in whole["rounds"]]


def test_own_rates_rank_channels_and_neurons_apart(shared_of):
    shared = shared_of("rounds")
    values = {**VALUES, "prune.method": "magnitude", "prune.ssm_rate": 0.25, "prune.mlp_rate": 0.75}
    result = run_trial(shared, "own", values, quiet)
    for number in (1, 2):
        masks = load_masks(shared.folder / "own" / f"round-{number:02d}" / "start" / rounds.SURVIVORS)
        for part, rate in (("mixer", 0.25), ("mlp", 0.75)):
            some = [m for n, m in masks.items() if (".mlp." in n) == (part == "mlp")]
            left = sum(int(m.sum()) for m in some) / sum(m.numel() for m in some)
            assert left == pytest.approx((1 - rate) ** number, abs=1e-3), part
    assert result["rounds"][1]["density"] != pytest.approx(0.5, abs=1e-3)


def test_without_own_rates_all_weights_are_ranked_together(small_config, trained):
    model, _ = ckpt.load_model(trained)
    prune = small_config(prune__method="refill", prune__rate=0.5).prune
    together = rounds.survivors_of_round(model, {}, prune, 1)
    apart = rounds.survivors_of_round(model, {}, prune.model_copy(update={"ssm_rate": 0.5}), 1)
    assert together.keys() == apart.keys()
    assert any(not torch.equal(together[n], apart[n]) for n in together)


@pytest.mark.parametrize(
    "parts, words",
    [
        ({"prune.rounds": [1, 2]}, "prune.method 'none' prunes nothing"),
        ({"prune.method": ["refill"], "prune.round": [1]}, "prune.round is set by the rounds themselves"),
        ({"prune.method": ["refill"], "cut.mlp": [0.5]}, "cuts a trained model"),
        ({"prune.method": ["refill"], "prune.target": ["mlp"], "prune.ssm_rate": [0.5]}, "no effect with prune.target"),
        ({"prune.method": ["refill"], "prune.ceiling": [0.1, 0.2]}, "are the same: prune.ceiling has no effect"),
        ({"prune.method": ["refill"], "prune.ssm_rate": [0.1], "prune.mlp_rate": [0.1], "prune.rate": [0.1, 0.2]},
         "are the same: prune.rate has no effect"),
    ],
)  # fmt: skip
def test_series_that_cannot_be_are_refused_before_anything_starts(parts, words):
    space = series_space(**parts)
    with pytest.raises(ConfigError, match=words):
        check(space, expand(space, 0), get_preset("quickstart"))


def parsed(*words):
    args = parse_sweep_args(list(words), recipe_of=recipe_of)
    space = load_space(args.space)
    return space, base_of(space, args), args


def test_the_spaces_of_rounds_start_from_their_preset():
    for name, trials in (("rounds_70", 4), ("rounds_quick", 2)):
        space, config, args = parsed("--space", name, "--seed", "3")
        assert config.data.augment == get_preset("v2").data.augment and config.seed == 3
        found = expand(space, 0, given=args.over)
        assert len(found) == trials and {t.values["prune.method"] for t in found} == {"refill", "rsst"}
        check(space, found, config)
    assert parsed("--space", "rounds_70", "--preset", "cct")[1].model.stem == "cct"


def test_a_space_over_presets_is_those_presets_with_what_the_command_line_gave():
    space, config, args = parsed("--space", "stages", "--optim.amp", "off", "--optim.epochs", "30")
    trials = expand(space, 0, given=args.over)
    check(space, trials, config)
    assert len(trials) == 8 and trials[0].name == "dataset-cifar10_preset-v1"
    for trial in trials:
        name = trial.name.rpartition("-")[2]
        wanted = get_preset(name).with_values(
            {"optim.amp": "off", "optim.epochs": 30, "data.dataset": trial.values["data.dataset"], "name": config.name}
        )
        assert config.with_values(trial.values).resolve() == wanted.resolve()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--space", "stages", "--preset", "v2"], "--preset: the space varies presets"),
    ],
)
def test_what_the_space_decides_cannot_be_given(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parsed(*words)


def test_what_a_space_of_rounds_sets_cannot_be_typed(capsys):
    assert tune(["--space", "rounds_70", "--prune.rate", "0.5", "--dry-run"]) == 2
    assert "the search space sets prune.rate 0.7 for all trials" in capsys.readouterr().err


@pytest.mark.parametrize(
    "parts, words",
    [
        ({"grids": [{"preset": ["v3"]}]}, "unknown preset 'v3'"),
        ({"grids": [{"preset": ["v1"]}, {"optim.lr": [0.1]}]}, "it stands in each"),
        ({"kind": "measure", "grids": [{"preset": ["v1"]}]}, "kind measure trains none"),
        ({"preset": "v9", "grids": [{"optim.lr": [0.1]}]}, "unknown preset 'v9'"),
    ],
)
def test_presets_that_cannot_be(parts, words):
    with pytest.raises(ConfigError, match=words):
        checked(Space(**{"question": "q", "cost": "c", "kind": "train", **parts}))


def test_two_presets_that_are_the_same_here():
    space = checked(Space(question="q", cost="c", kind="train", grids=[{"preset": ["v2", "stage2"]}]))
    with pytest.raises(ConfigError, match="presets v2 and stage2 are the same"):
        expand(space, 0)
