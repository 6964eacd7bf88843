"""What pruning bought, to read: a table before and after, a table and a figure over rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

ROWS = {
    "test/accuracy": ("test accuracy", "{:.2f} %"),
    "model/params": ("parameters", "{:,.0f}"),
    "model/nonzero": ("of them not zero", "{:,.0f}"),
    "model/sparsity": ("zeros among prunable weights", "{:.1f} %"),
    "model/macs": ("MACs per image, scan counted", "{:,.0f}"),
    "bench/latency_ms": ("latency, one image", "{:.3f} ms"),
    "bench/images_per_s": ("throughput", "{:,.0f} images/s"),
    "bench/peak_memory_mib": ("peak memory", "{:,.0f} MiB"),
}


def before_after_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """One metric a row: dense, pruned, ratio. What was not measured says so."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("before", "after", "ratio"):
        table.add_column(name, justify="right")
    for key, (label, form) in ROWS.items():
        if key not in before:
            table.add_row(label, "not measured", "", "")
            continue
        ratio = f"{after[key] / before[key]:.3f}" if before[key] else ""
        table.add_row(label, form.format(before[key]), form.format(after[key]), ratio)
    return table


def rounds_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One round a row."""
    table = Table(box=None, pad_edge=False)
    names = ("round", "density", "parameters", "not zero", "MACs", "test accuracy", "images/s", "latency")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["round"]),
            f"{row['density']:.4f}",
            f"{row['params']:,}",
            f"{row['nonzero']:,}",
            f"{row['macs']:,}",
            f"{row['test_accuracy']:.2f} %",
            f"{row['images_per_s']:,.0f}",
            f"{row['latency_ms']:.2f} ms",
        )
    return table


def rounds_figure(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Accuracy against parameters and against measured throughput, a point a round; written as rounds.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, key, label in ((left, "params", "parameters"), (right, "images_per_s", "images per second")):
        axis.plot([row[key] for row in rows], [row["test_accuracy"] for row in rows], "o-", color="#2a6f97")
        for row in rows:
            place = (row[key], row["test_accuracy"])
            axis.annotate(str(row["round"]), place, textcoords="offset points", xytext=(4, 4))
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    left.invert_xaxis()
    left.set_ylabel("test accuracy, %")
    path = folder / "rounds.png"
    figure.savefig(path, dpi=150)
    return path
