"""What the trials of a sweep say, on rows made by hand."""

from __future__ import annotations

import math

import pytest

from ray_jobs.report.findings import findings
from ray_jobs.report.rows import same_models
from tests.ray_jobs.report.experiments import lost, row

NAN = math.nan


def test_findings_say_what_the_numbers_say():
    rows = [
        lost({"cut.mlp": 0.5}, 0.2, model__nonzero=70),
        lost({"cut.mlp": 0.7}, 0.9, model__nonzero=60),
        lost({"cut.mlp": 0.9}, 7.0, model__nonzero=50),
        lost({"cut.linear_in": 0.5}, 0.5, model__nonzero=80),
        lost({"cut.conv1d": 0.3}, 6.0),
        *(lost({"cut.layer": i, "cut.mlp": 0.7}, float(i)) for i in range(6)),
        lost({"cut.mlp": 0.7, "cut.linear_out": 0.7}, 3.0, model__params=50, bench__images_per_s=30.0),
        row({"cut.mlp": 0.95}, "failed"),
    ]
    dense = {"val/accuracy": 90.0, "model/params": 100, "model/nonzero": 100, "bench/images_per_s": 20.0}
    text = findings(rows, dense)
    assert "components by the highest rate that costs at most 1.00 points" in text, "the threshold is said"
    assert "prune first: mlp up to 0.7 costs 0.90 points (weights zeroed, 40.0 % of the model's parameters)" in text
    assert "2. linear_in up to 0.5 costs 0.50 points (weights zeroed, 20.0 % of the model's parameters)" in text
    assert "careful: conv1d costs 6.00 points already at 0.3" in text and "prune first: conv1d" not in text
    assert "matter least, points lost: 0 (0.00), 1 (1.00), 2 (2.00)" in text
    assert "not to touch, points lost: 5 (5.00), 4 (4.00), 3 (3.00)" in text
    few = findings(rows[5:9], {}).splitlines()
    assert few[1:] == ["blocks that matter least, points lost: 0 (0.00), 1 (1.00)",
                       "blocks not to touch, points lost: 3 (3.00), 2 (2.00)"]  # fmt: skip
    assert "3.00 points, 50 % of the parameters, 1.50 times the throughput" in text


def test_where_all_components_cost_the_same_none_is_first():
    """ "prune first" stood before all seven, whatever they cost."""
    names = ("linear_out", "mlp", "linear_gate", "linear_in", "conv1d", "linear_B_C", "linear_delta")
    rows = [lost({f"cut.{name}": rate}, 0.01 * i) for i, name in enumerate(names) for rate in (0.3, 0.9)]
    text = findings(rows, {"val/accuracy": 90.0, "val/images": 1000})
    assert "prune first" not in text and "none comes first" in text
    sharp = findings(rows, {"val/accuracy": 90.0})  # how coarse the split is nobody knows: the numbers decide
    assert sharp.count("prune first") == 1 and "prune first: linear_out up to 0.9" in sharp
    assert "7. linear_delta up to 0.9 costs 0.06 points" in sharp


def test_trials_that_differ_in_more_than_their_rate_are_not_taken_for_each_other():
    rows = [lost({"cut.mlp": r, "cut.criterion": c}, d) for r, c, d in
            ((0.5, "l1", 0.1), (0.5, "random", 8.0), (0.7, "l1", 0.4), (0.7, "random", 9.0))]  # fmt: skip
    text = findings(rows, {"val/accuracy": 90.0})
    assert "mlp (criterion l1) up to 0.7 costs 0.40" in text and "careful: mlp (criterion random) costs 8.00" in text
    seeds = [lost({"cut.mlp": 0.5, "seed": s}, d) for s, d in ((0, 0.2), (1, 0.6))]
    assert "mlp up to 0.5 costs 0.40 points" in findings(seeds, {"val/accuracy": 90.0}), "a mean over seeds"


def test_images_behind_an_accuracy_and_its_standard_error_are_said():
    baseline = {"val/accuracy": 90.0, "val/images": 100.0}
    assert findings([lost({"cut.mlp": 0.5}, 1.0)], baseline).splitlines()[1] == (
        "baseline: 90.00 % ± 3.00 (standard error) on the validation split of 100 images: one is 1 points"
    )
    three = findings([lost({"cut.mlp": 0.5}, 0.0, 100.0)], {"val/accuracy": 100.0, "val/images": 3.0})
    assert "3 images: one is 33 points" in three and "± 0.00" not in three
    assert "too few validation images to say what a cut costs: 3 of them are 100 points" in three


def test_speed_within_the_noise_is_said():
    def joint(speed, low, high):
        ranges = {"bench/images_per_s": speed, "bench/images_per_s_low": low, "bench/images_per_s_high": high}
        cut = {"cut.mlp": 0.7, "cut.linear_out": 0.7, "cut.structured": True}
        return findings([lost(cut, 0.1, **ranges)], dense)

    dense = {"bench/images_per_s": 100.0, "bench/images_per_s_low": 80.0, "bench/images_per_s_high": 110.0}
    assert "1.02 times the throughput, within the noise" in joint(102.0, 95.0, 105.0)
    assert "2.00 times the throughput (1.73 to 2.62)" in joint(200.0, 190.0, 210.0)


def test_the_same_model_is_said_not_timed_twice():
    """A channel takes its gate along: units of linear_out at 0.7 hold those of linear_gate at 0.5."""
    cut = {"cut.structured": True, "cut.linear_out": 0.7, "cut.mlp": 0.7}
    sizes = {"model/params": 5, "model/nonzero": 5, "model/macs": 7}
    rows = [
        lost(cut, 1.0, **sizes, **{"bench/images_per_s": 100.0}),
        lost({**cut, "cut.linear_gate": 0.5}, 1.0, **sizes, **{"bench/images_per_s": 130.0}),
        lost({**cut, "cut.linear_gate": 0.8}, 2.0, **{**sizes, "model/params": 4}),
    ]
    assert same_models(rows) == {rows[1]["trial"]: rows[0]["trial"]}
    elements = lost({**cut, "cut.linear_gate": 0.5, "cut.gate_elements": True}, 1.0, **sizes)
    assert same_models([rows[0], elements]) == {}, "single weights of the gate are another cut"
    text = findings(rows, {"bench/images_per_s": 50.0})
    assert "linear_gate 0.5: the same model as linear_out 0.7, mlp 0.7" in text
    assert "2.00 times" in text and "2.60 times" not in text and text.count("the same model") == 1


def test_findings_are_means_over_seeds_best_first():
    def trained(name, best, seed=0, status="finished", **metrics):
        best = {} if best is None else {"val/best_accuracy": best}
        return row({"model.stem": name, "seed": seed}, status, f"{name}-seed{seed}", **best, **metrics)

    rows = [
        trained("slow", 71.0, val__accuracy=60.0),
        trained("slow", 69.0, 1, val__accuracy=60.0),
        trained("faster", 82.0, 9),
        trained("faster", 80.0, 10),
        trained("alone", 99.0),
        trained("stopped", 99.0, status="stopped early"),
        trained("stopped", 99.0, 1, status="stopped early"),
        trained("diverged", NAN),
        trained("diverged", 99.0, 1),
        trained("without", None),
        trained("without", None, 1),
        {**trained("other", 99.0), "values": {}},
        {**trained("other", 99.0, 1), "values": {}},
    ]
    assert findings(rows, {}).splitlines()[1:] == [
        "faster    81.00 ± 1.41 % over 2 seeds (80.00 to 82.00)",
        "slow      70.00 ± 1.41 % over 2 seeds (69.00 to 71.00)",
        "diverged  99.00 % over 1 seed (99.00 to 99.00); 1 more without an accuracy",
    ]
    only = [row({"seed": i}, trial=f"seed-{i}", val__accuracy=50.0 + i) for i in (0, 1)]
    assert findings(only, {}).splitlines()[1] == "all trials  50.50 ± 0.71 % over 2 seeds (50.00 to 51.00)"


def test_the_best_of_a_search_follows_the_direction_and_is_never_nan():
    rows = [row({"optim.lr": 10.0**-i}, trial=f"trial-000{i}", val__loss=v) for i, v in enumerate((2.0, NAN, 1.0, 3.0))]
    best = [line for line in findings(rows, {}, {"val/loss": "min"}).splitlines() if line.startswith("best:")]
    assert best == ["best: trial-0002: val/loss 1 with optim.lr 0.01"]
    worst = [line for line in findings(rows, {}, {"val/loss": "max"}).splitlines() if line.startswith("best:")]
    assert worst == ["best: trial-0003: val/loss 3 with optim.lr 0.001"]
    only = findings(rows[1:2], {}, {"val/loss": "min"})
    assert "best" not in only


def test_the_best_of_a_search_says_how_many_are_as_good():
    rows = [row({"optim.lr": lr}, trial=f"t{lr}", val__best_accuracy=a, val__images=100.0)
            for lr, a in ((1.0, 90.0), (2.0, 88.0), (3.0, 80.0))]  # fmt: skip
    assert findings(rows, {}, {"val/best_accuracy": "max"}).splitlines()[-1] == (
        "1 other within its standard error, 3.00 points"
    )


@pytest.mark.parametrize("structured", [False, True])
def test_no_front_through_trials_that_changed_nothing(structured):
    """Masked trials do the dense model's work."""
    baseline = {"val/accuracy": 90.0, "model/macs": 100.0}
    rows = [lost({"cut.mlp": r, "cut.structured": structured}, d, model__macs=100.0 - 40 * r * structured)
            for r, d in ((0.2, 1.0), (0.4, 3.0), (0.6, 2.0))]  # fmt: skip
    text = findings(rows, baseline, {"val/accuracy": "max", "model/macs": "min"})
    if structured:
        assert "Pareto front, 2 trials" in text
    else:
        assert "front" not in text and "every trial has the same model/macs, 100: it sets none apart" in text
        assert "best: cut.mlp-0.2" in text


def test_what_repair_gave_back_is_said_for_each_cut():
    def cut(repair: bool, drop: float, **rates: float):
        values = {f"cut.{name}": rate for name, rate in rates.items()}
        return lost({"cut.repair": repair, "cut.structured": True, **values}, drop, model__params=50, model__nonzero=50)

    rows = [cut(False, 16.0, mlp=0.7, linear_out=0.5), cut(True, 4.0, mlp=0.7, linear_out=0.5)]
    rows += [cut(False, 0.2, linear_gate=0.3), cut(True, 0.1, linear_gate=0.3)]
    text = findings(rows, {"val/accuracy": 90.0, "val/images": 5000, "model/params": 100, "model/nonzero": 100})
    assert "together (units removed, repair False): mlp 0.7, linear_out 0.5: 16.00 points" in text
    assert "together (units removed, repair True): mlp 0.7, linear_out 0.5: 4.00 points" in text
    assert "repair of mlp 0.7, linear_out 0.5: 16.00 points lost without, 4.00 with; 75 % given back" in text
    assert text.count("given back") == 1, "a share of nothing says nothing"


def test_a_cut_that_takes_nothing_is_not_advised():
    kept = {"model__params": 100, "model__nonzero": 100}
    rows = [lost({"cut.block": 0.1, "cut.structured": True}, 0.0, **kept)]
    rows += [lost({"cut.mlp": 0.5, "cut.structured": True}, 0.4, model__params=80, model__nonzero=80)]
    text = findings(rows, {"val/accuracy": 90.0, "val/images": 5000, "model/params": 100, "model/nonzero": 100})
    assert "block at 0.1 takes nothing from this model" in text and "block up to" not in text


def test_trials_on_other_images_are_said_to_be(tmp_path):
    """Means over seeds of two data sets stood in one order without a word."""
    some = [row({"data.dataset": name, "seed": seed}, **{"val/best_accuracy": value + seed})
            for name, value in (("digits", 90.0), ("cifar10", 60.0)) for seed in (0, 1)]  # fmt: skip
    assert "trials differ in data.dataset (digits, cifar10): accuracies of one are not those" in findings(some, {})
    assert "differ in" not in findings(some[:2], {})
    fractions = [row({"data.val_fraction": 0.2}, **{"val/best_accuracy": 5.0}), row({}, **{"val/best_accuracy": 4.0})]
    assert "trials differ in data.val_fraction (0.2, the others' own)" in findings(fractions, {})
