"""Rows: fronts and orders."""

from __future__ import annotations

import math

from ray_jobs.report.findings import findings
from ray_jobs.report.noise import standard_error
from ray_jobs.report.rows import changed, front, ranked, score
from tests.ray_jobs.report.experiments import row

NAN, INF = math.nan, math.inf


def test_the_pareto_front_by_hand():
    def of(points, **modes):
        rows = [{"trial": str(i), "status": "finished", "metrics": dict(zip("xy", p, strict=False))}
                for i, p in enumerate(points)]  # fmt: skip
        rows.append({"trial": "early", "status": "stopped early", "metrics": {"x": -99, "y": 99}})
        return [tuple(row["metrics"].values()) for row in front(rows, modes)]

    points = [(1, 5), (2, 7), (3, 6), (2, 4), (4, 7), (1,)]
    assert of(points, y="max", x="min") == [(2, 7), (1, 5)]
    assert of(points, y="max", x="max") == [(4, 7)]
    assert of(points, y="min", x="min") == [(2, 4), (1, 5)]
    assert of(points, x="min") == [(1, 5), (1,)]
    assert of([], y="max") == []


def test_nan_is_on_no_front_and_last_in_every_order():
    rows = [row({}, trial=name, val__loss=v, model__macs=m) for name, v, m in
            (("nan", NAN, 5.0), ("good", 1.0, 10.0), ("inf", INF, 1.0), ("worse", 2.0, 20.0))]  # fmt: skip
    rows.append(row({}, "failed", "none"))
    rows.append(row({}, trial="null", val__loss=None))
    assert [r["trial"] for r in front(rows, {"val/loss": "min", "model/macs": "min"})] == ["good"]
    assert [r["trial"] for r in ranked(rows, "val/loss", "min")] == ["good", "worse", "nan", "inf", "none", "null"]
    assert [r["trial"] for r in ranked(rows, "val/loss", "max")][:2] == ["worse", "good"]


def test_the_score_is_the_accuracy_of_the_weights_that_are_kept():
    assert score(row({}, val__accuracy=60.0, val__best_accuracy=71.0)) == 71.0
    assert score(row({}, val__accuracy=60.0)) == 60.0, "a model that was measured"
    assert score(row({}, val__best_accuracy=-1.0)) is None, "older trials said so where nothing was validated"
    assert score(row({}, val__best_accuracy=NAN)) is None
    both = [row({}, trial="a", val__accuracy=60.0), row({}, trial="b", val__best_accuracy=71.0)]
    assert [r["trial"] for r in ranked(both, "val/best_accuracy", "max")] == ["b", "a"]


def test_the_standard_error_of_a_share():
    assert math.isclose(standard_error(90.0, 1000), 100 * math.sqrt(0.9 * 0.1 / 1000))
    assert standard_error(100.0, 3) > 10, "three images cannot show that an accuracy is exact"
    assert math.isnan(standard_error(50.0, 0))


def test_only_trials_whose_cost_is_not_the_dense_models_are_compared_by_it():
    rows = [row({}, trial="masked", model__macs=100.0), row({}, trial="smaller", model__macs=60.0)]
    assert [r["trial"] for r in changed(rows, ["val/accuracy", "model/macs"], {"model/macs": 100.0})] == ["smaller"]
    assert len(changed(rows, ["model/macs"], {})) == 2, "models that were trained have no dense one"


def test_a_grid_over_rounds_rate_is_no_component():
    """prune.rate is no component: the sentences about components looked for its points lost."""
    rows = [row({"prune.rate": r}, val__best_accuracy=90.0) for r in (0.2, 0.4)]
    assert findings(rows, {}).startswith("2 trials: 2 finished")
