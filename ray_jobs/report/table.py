"""Trials as a table: in the terminal, and as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mamba.runs.files import write_csv

COLUMNS = (
    *("val/best_accuracy", "val/accuracy", "val/drop", "test/accuracy"),
    *("model/params", "model/nonzero", "model/macs", "bench/images_per_s"),
)
"""Metrics that are shown, in this order."""


def show(rows: list[dict[str, Any]], first: Sequence[str] = ()) -> None:
    """One trial a row, and only the metrics that some trial has; `first` before the others."""
    table = Table(box=None, pad_edge=False)
    used = [c for c in dict.fromkeys((*first, *COLUMNS)) if any(c in row["metrics"] for row in rows)]
    for name in ("trial", "status", *used):
        table.add_column(name, justify="left" if name in ("trial", "status") else "right", no_wrap=True)
    for row in rows:
        values = [row["metrics"].get(c) for c in used]
        table.add_row(
            row["trial"], row["status"], *("" if v is None else f"{v:,.2f}".removesuffix(".00") for v in values)
        )
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=500)
    console.print(table)


def write_results(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One trial a line: name, status, reason, every value and metric that any trial has."""
    values = sorted({key for row in rows for key in row["values"]})
    metrics = sorted({key for row in rows for key in row["metrics"]})
    about = ("trial", "status", "reason", "seconds")
    lines = [{**{key: row[key] for key in about}, **row["values"], **row["metrics"]} for row in rows]
    write_csv(path, [*about, *values, *metrics], lines)
