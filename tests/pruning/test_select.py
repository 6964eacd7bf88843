"""Exactly the asked share, by any scores, with ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba.errors import ConfigError
from pruning.select import choose_elements, choose_units, lowest

layers = st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=20), min_size=1, max_size=6)
rates = st.floats(0, 0.999)


def tensors(values):
    return [torch.tensor(v, dtype=torch.float64) for v in values]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_lowest_takes_exactly_the_lowest(values, data):
    count = data.draw(st.integers(0, len(values)))
    chosen = lowest(torch.tensor(values, dtype=torch.float64), count)
    assert int(chosen.sum()) == count
    ranked = sorted(range(len(values)), key=lambda i: (values[i], i))
    assert set(chosen.nonzero().flatten().tolist()) == set(ranked[:count])


@given(layers, rates, st.sampled_from(["global", "layerwise"]))
def test_elements_go_by_exactly_the_rate(values, rate, scope):
    scores = tensors(values)
    keep = choose_elements(scores, rate, scope)
    if scope == "global":
        n = sum(len(s) for s in scores)
        assert sum(int((~k).sum()) for k in keep) == round(rate * n)
        gone = [float(v) for s, k in zip(scores, keep, strict=True) for v in s[~k]]
        left = [float(v) for s, k in zip(scores, keep, strict=True) for v in s[k]]
        assert not gone or not left or max(gone) <= min(left)
    else:
        assert [int((~k).sum()) for k in keep] == [round(rate * len(s)) for s in scores]


@given(layers, rates, st.integers(1, 2), st.sampled_from(["global", "layerwise"]))
def test_units_go_by_exactly_the_rate_and_leave_the_floor(values, rate, floor, scope):
    scores = tensors(values)
    sizes = [len(s) for s in scores]
    wanted = [round(rate * n) for n in sizes] if scope == "layerwise" else [round(rate * sum(sizes))]
    room = [n - floor for n in sizes] if scope == "layerwise" else [sum(n - floor for n in sizes)]
    if any(w > r for w, r in zip(wanted, room, strict=True)):
        with pytest.raises(ConfigError, match="floor"):
            choose_units(scores, rate, scope, floor)
        return
    keep = choose_units(scores, rate, scope, floor)
    gone = [int((~k).sum()) for k in keep]
    assert (gone == wanted) if scope == "layerwise" else (sum(gone) == wanted[0])
    assert all(int(k.sum()) >= floor for k in keep)


@given(layers, st.floats(0, 0.6), st.sampled_from([2, 4, 8]))
def test_widths_are_rounded_to_the_multiple(values, rate, multiple):
    scores = tensors(values)
    exact = choose_units(scores, rate, "global")
    for s, k, e in zip(scores, choose_units(scores, rate, "global", 1, multiple), exact, strict=True):
        width = int(k.sum())
        assert width == len(s) or width % multiple == 0
        assert abs(width - int(e.sum())) <= multiple or width == len(s)
        assert not k.any() or not (~k).any() or float(s[k].min()) >= float(s[~k].max())
