"""What a cut did, to read: a table, a figure, and the picture that a run's backends show."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pruning.record import ALL, FILE, Record, Row

PICTURE = "prune/cut"
"""The tag of a cut's picture in a run's backends."""


def cut_table(record: Record) -> Table:
    """One layer a row, each cut with its units before, those kept, and their share; of single weights the sparsity. The
    last rows: all layers together, and the threshold where all were ranked together."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    units = {what: record.total(what).unit for what in record.whats}
    for what in record.whats:
        table.add_column(f"{what}\n{units[what]}s", justify="right", no_wrap=True)
        table.add_column("\nkept", justify="right", no_wrap=True)
        table.add_column("\nsparsity" if units[what] == "weight" else "\nshare", justify="right", no_wrap=True)
    layers = [layer for layer in dict.fromkeys(row.layer for row in record.rows) if layer != ALL]
    for layer in layers:
        table.add_row(layer, *_cells(record.of(what).get(layer) for what in record.whats))
    if len(layers) != 1:
        table.add_row(ALL, *_cells(record.total(what) for what in record.whats), style="bold")
    if record.thresholds:
        values = [record.thresholds.get(what) for what in record.whats]
        cells = [cell for value in values for cell in ("", "" if value is None else f"{value:.4g}", "")]
        table.add_row("threshold", *cells)
    return table


def _cells(rows: Iterable[Row | None]) -> list[str]:
    cells = []
    for row in rows:
        if row is None:
            cells += ["", "", ""]
        else:
            percent = row.sparsity if row.unit == "weight" else row.share
            cells += [f"{row.before:,}", f"{row.kept:,}", f"{percent:.1f} %"]
    return cells


def cut_figure(record: Record) -> Any:
    """The share that each layer keeps, a panel for each cut; a cut that is no layer's (whole blocks) has one bar."""
    from matplotlib.figure import Figure

    whats = record.whats
    figure = Figure(figsize=(7, 0.6 + 1.7 * max(1, len(whats))), layout="constrained")
    panels = figure.subplots(max(1, len(whats)), 1, squeeze=False)[:, 0]
    for axis, what in zip(panels, whats, strict=False):
        some, total = record.of(what), record.total(what)
        shares = [row.share for row in some.values()]
        axis.bar(range(len(some)), shares, color="#2a6f97")
        axis.axhline(total.share, color="#d1495b", linewidth=1)
        axis.set_ylim(0, 105)
        axis.set_ylabel(f"{total.unit}s kept, %")
        names = [layer.rpartition(".")[2] for layer in some]
        every = max(1, len(names) // 24)
        axis.set_xticks(range(0, len(names), every), names[::every], fontsize=7)
        threshold = record.thresholds.get(what)
        words = "" if threshold is None else f", threshold {threshold:.4g}"
        axis.set_title(
            f"{what}: {total.kept:,} of {total.before:,} {total.unit}s ({total.share:.1f} %){words}", fontsize=9
        )
    return figure


def cut_picture(record: Record) -> Tensor:
    """`cut_figure` as a backend takes it: (3, height, width), values from 0 to 1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = cut_figure(record)
    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def whole_lines() -> Console:
    """A console for tables: as wide as the terminal, and in files and pipes so wide that no line is broken."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=500)


def print_cut(record: Record, folder: Path) -> None:
    """The table in the terminal, its lines whole, and where it is kept."""
    console = whole_lines()
    console.print("what was cut, layer by layer:")
    console.print(cut_table(record))
    console.print(f"kept in {folder / FILE}", markup=False, soft_wrap=True)
