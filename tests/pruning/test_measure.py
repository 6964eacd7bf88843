"""Speeds: in turns, with their range, and ratios that know their noise."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from mamba.models.model import Architecture, MambaModel
from mamba.models.ssm import BlockShape
from pruning import measure
from pruning.report import before_after_table


def test_speeds_are_taken_in_turns_and_carry_their_range(monkeypatch):
    """What else the machine does hits all models alike: the order is a b a b, not a a b b."""
    shape = BlockShape(d_inner=8, d_state=2, d_conv=3, mlp_hidden=8)
    models = [MambaModel(Architecture(8, 4, 3, 2, 4, 0.0, (shape,))) for _ in "ab"]
    order, values = [], iter([1.0, 10.0, 3.0, 30.0, 2.0, 20.0, 9.0, 90.0, 4.0, 40.0])

    def speed(model, batch_size, seconds, amp):
        order.append(models.index(model))
        return {"bench/latency_ms": next(values), "bench/images_per_s": 5.0, "bench/peak_memory_mib": 7.0}

    monkeypatch.setattr(measure, "TURNS", 5)
    monkeypatch.setattr(measure, "speed", speed)
    a, b = measure.speeds(models, 4, 0.1, device=torch.device("cpu"))
    assert order == [0, 1] * measure.TURNS
    assert (a["bench/latency_ms"], a["bench/latency_ms_low"], a["bench/latency_ms_high"]) == (3.0, 1.0, 9.0)
    assert b["bench/latency_ms"] == 30.0 and "bench/peak_memory_mib_low" not in b


@pytest.mark.parametrize(
    "after, words",
    [
        ((1.02, 0.9, 1.1), "1.02, within the noise"),
        ((2.0, 1.9, 2.2), "2.00 (1.73 to 2.75)"),
        ((2.0, None, None), "2.00"),
    ],
)
def test_a_ratio_of_times_within_the_noise_is_said(after, words):
    def timed(value, low, high):
        ends = {"_low": low, "_high": high}
        return {"bench/images_per_s": value} | {f"bench/images_per_s{k}": v for k, v in ends.items() if v is not None}

    before = timed(1.0, 0.8, 1.1) if after[1] else timed(1.0, None, None)
    table = before_after_table(before, timed(*after))
    assert words in list(table.columns[3].cells)
    Console(quiet=True).print(table)


def test_no_ratio_of_what_was_not_measured():
    assert measure.ratio({}, {"x": 1.0}, "x") is None and measure.ratio({"x": 0.0}, {"x": 1.0}, "x") is None
    assert measure.ratio({"x": float("nan")}, {"x": 1.0}, "x") is None
