"""What pruning bought, to read: a table before and after, a table and a figure over rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mamba.runs.metrics import metric
from pruning.measure import TIMED, ratio
from pruning.rounds import accuracy_of

ROWS = (
    *("val/accuracy", "test/accuracy", "model/params", "model/nonzero", "model/sparsity", "model/macs"),
    *("bench/latency_ms", "bench/images_per_s", "bench/peak_memory_mib"),
)
"""Metrics of the table before and after."""


def before_after_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """One metric a row: dense, pruned, ratio. What was not measured says so; a ratio of times has its range, or is
    within the noise."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("before", "after", "ratio"):
        table.add_column(name, justify="right")
    for key in ROWS:
        shown = metric(key)
        if key == "test/accuracy" and key not in before:  # nothing is chosen by it where something else can be
            continue
        if key not in before:
            table.add_row(shown.label, "not measured", "", "")
            continue
        times = ratio(before, after, key)
        words = "" if times is None else f"{times.value:.2f}{times.note}" if key in TIMED else f"{times.value:.3f}"
        table.add_row(shown.label, shown.text(before[key]), shown.text(after.get(key)), words)
    return table


def rounds_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One round a row."""
    table = Table(box=None, pad_edge=False)
    words = accuracy_of(rows[0])[1]
    names = ("round", "density", "parameters", "not zero", "MACs", f"{words} accuracy", "images/s", "latency")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["round"]),
            f"{row['density']:.4f}",
            f"{row['params']:,}",
            f"{row['nonzero']:,}",
            f"{row['macs']:,}",
            f"{accuracy_of(row)[0]:.2f} %",
            f"{row['images_per_s']:,.0f}" if row["images_per_s"] else "not measured",
            f"{row['latency_ms']:.2f} ms" if row["latency_ms"] else "not measured",
        )
    return table


def rounds_figure(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Accuracy against parameters and against measured throughput, a point a round; written as rounds.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, key, label in ((left, "params", "parameters"), (right, "images_per_s", "images per second")):
        known = [row for row in rows if row[key] is not None]
        axis.plot([row[key] for row in known], [accuracy_of(row)[0] for row in known], "o-", color="#2a6f97")
        for row in known:
            place = (row[key], accuracy_of(row)[0])
            axis.annotate(str(row["round"]), place, textcoords="offset points", xytext=(4, 4))
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    left.invert_xaxis()
    left.set_ylabel(f"{accuracy_of(rows[0])[1]} accuracy, %")
    path = folder / "rounds.png"
    figure.savefig(path, dpi=150)
    return path
