"""Series of rounds among the rows of trials: which repeat each other, and what each round came to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pruning.rounds import accuracy_of
from ray_jobs.report.noise import standard_error
from ray_jobs.report.rows import AnyRow, Row, finished, measured, setting


@dataclass(frozen=True)
class Point:
    """One round over the series that repeat each other."""

    density: float
    accuracy: float
    """Mean validation accuracy, percent; without a validation split the test accuracy."""
    low: float
    high: float
    """Of several seeds the range; of one the accuracy less and more its standard error, where that is known."""
    params: float
    seeds: int


def by_series(rows: Sequence[AnyRow]) -> dict[str, dict[str, list[AnyRow]]]:
    """The finished series of rounds: setting -> method -> series that repeat each other. The setting says what tells
    series apart besides method and seed; empty where nothing does."""
    some = [row for row in finished(rows) if row.get("rounds")]
    found: dict[str, dict[str, list[AnyRow]]] = {}
    for row in some:
        words = setting(some, row, {"prune.method"})
        found.setdefault(words, {}).setdefault(str(row["values"].get("prune.method", "series")), []).append(row)
    return found


def over_rounds(series: Sequence[Row]) -> list[Point]:
    """Round by round, over series that differ in their seed alone; as far as all of them go."""
    points = []
    for some in zip(*(row["rounds"] for row in series), strict=False):
        values = [accuracy_of(one)[0] for one in some]
        mean, low, high = statistics.fmean(values), min(values), max(values)
        images = measured(series[0], "val/images")
        if len(values) == 1 and images:
            error = standard_error(mean, images)
            low, high = mean - error, mean + error
        density = statistics.fmean(float(one["density"]) for one in some)
        params = statistics.fmean(float(one["params"]) for one in some)
        points.append(Point(density, mean, low, high, params, len(values)))
    return points
