"""Each metric once: labels, formats, order; NaN never wins."""

from __future__ import annotations

import math

import pytest

from mamba.runs.metrics import METRICS, Metric, best_accuracy, metric, number


def test_nan_and_missing_values_come_last_whichever_way_is_better():
    for key, best in (("val/accuracy", 3.0), ("val/loss", 1.0)):
        values = [math.nan, 2.0, None, 3.0, 1.0]
        ordered = sorted(values, key=metric(key).rank)
        assert ordered[0] == best and ordered[3] in (None, ordered[3]) and not {1.0, 2.0, 3.0} & set(ordered[3:])
    assert sorted([1.0, 2.0], key=lambda v: metric("val/accuracy").rank(v, "down"))[0] == 1.0


def test_texts():
    assert metric("test/accuracy").text(91.234) == "91.23 %" and metric("model/params").text(1234567) == "1,234,567"
    assert metric("test/accuracy").text(math.nan) == "not finite" and metric("test/accuracy").text(None) == ""
    assert metric("lr/head").title == "lr/head" and metric("bench/latency_ms").title == "latency, one image, ms"


@pytest.mark.parametrize(
    "metrics, expected",
    [
        ({"val/best_accuracy": 90.0, "val/accuracy": 80.0}, 90.0),
        ({"val/accuracy": 80.0, "val/ema_accuracy": 85.0}, 85.0),
        ({"val/accuracy": 80.0, "val/ema_accuracy": math.nan}, 80.0),
        ({"val/best_accuracy": None, "val/accuracy": 70.0}, 70.0),
        ({"train/loss": 1.0}, math.nan),
    ],
)
def test_how_good_the_kept_weights_are(metrics, expected):
    assert best_accuracy(metrics) == pytest.approx(expected, nan_ok=True)


def test_every_metric_that_a_run_writes_is_listed(small_fit):
    result = small_fit(optim__epochs=1)
    assert set(result["metrics"]) <= set(METRICS)


def test_a_metric_of_ones_own(monkeypatch):
    monkeypatch.setitem(METRICS, "val/f1", Metric("val/f1", "F1", "%", "{:.1f}", "up"))
    assert metric("val/f1").text(12.34) == "12.3 %"


def test_one_way_to_write_numbers():
    written = [number(v) for v in (3, 3.0, 1234567.8, 0.123456, 0.99999, 1e-5, True, None, "a", math.nan)]
    assert written == ["3", "3", "1,234,568", "0.1235", "0.99999", "1e-05", "True", "None", "a", "nan"]
    assert [number(v, 2) for v in (0.1234, 12.0, 0.995)] == ["0.12", "12", "0.995"]
    assert [number(v, 3, units=True) for v in (327000, 5441000.0, 2e9, 0.003)] == ["327k", "5.44M", "2G", "0.003"]
