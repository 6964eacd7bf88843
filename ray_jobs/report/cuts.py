"""What the trials of an experiment cut, layer by layer: a map of what is kept, and a table of each trial."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mamba.errors import FolderError
from pruning.record import ALL, Record, load_record
from pruning.rounds import round_folders
from ray_jobs.report.rows import finished
from ray_jobs.report.table import html_table

MOST = 60
"""Lines of the map; of more trials the first ones are drawn, and the page's tables have all."""


def records_of(folder: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Record], list[str]]:
    """The records of the finished trials: of a trial that cut once its own, of a series that of each round. One that is
    missing (earlier versions) is left out; so is one that is damaged or was changed, and a sentence says so."""
    found: dict[str, Record] = {}
    refused: list[str] = []
    for row in finished(rows):
        here = folder / row["trial"]
        for path in (here, *round_folders(here)):
            try:
                record = load_record(path)
            except FolderError as error:
                refused.append(str(error))
                continue
            if record is not None and record.rows:
                name = row["trial"] if path == here else f"{row['trial']}, {path.name}"
                found[name] = record
    return found, refused


def cut_map(records: Mapping[str, Record]) -> Figure | None:
    """Trial and cut downwards, layers across, coloured by the share that is kept; None where no trial cut by layers."""
    lines = {
        f"{name}: {what}": {layer: row.share for layer, row in record.of(what).items()}
        for name, record in records.items()
        for what in record.whats
        if ALL not in record.of(what)
    }
    lines = dict(list(lines.items())[:MOST])
    layers = list(dict.fromkeys(layer for line in lines.values() for layer in line))
    if not lines or len(layers) < 2:
        return None
    shares = np.array([[line.get(layer, np.nan) for layer in layers] for line in lines.values()])
    size = (min(4 + 0.3 * len(layers), 30.0), min(1.2 + 0.26 * len(lines), 30.0))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="viridis", aspect="auto", vmin=0, vmax=100)
    axis.set_yticks(range(len(lines)), list(lines), fontsize=7)
    axis.set_xticks(range(len(layers)), [layer.rpartition(".")[2] for layer in layers], fontsize=7)
    axis.set_xlabel("layer")
    axis.set_title("what each cut keeps of each layer, %", fontsize=10)
    figure.colorbar(image, label="kept, %")
    return figure


def cut_tables(records: Mapping[str, Record]) -> str:
    """HTML: a table of each record, folded; empty where there is none."""
    return "".join(
        f"<details><summary>{html.escape(name)}: {html.escape(in_short(record))}</summary>"
        f"{_table(record, f'cut-{i}')}</details>"
        for i, (name, record) in enumerate(records.items())
    )


def in_short(record: Record) -> str:
    """One line: each cut over all layers."""
    words = []
    for what in record.whats:
        total = record.total(what)
        percent = f"sparsity {total.sparsity:.1f} %" if total.unit == "weight" else f"{total.share:.1f} % kept"
        threshold = record.thresholds.get(what)
        words.append(f"{what} {percent}" + ("" if threshold is None else f" (threshold {threshold:.4g})"))
    return ", ".join(words)


def _table(record: Record, key: str) -> str:
    heads = ("layer", "cut", "unit", "before", "kept", "share", "sparsity")
    body = []
    for row in record.rows:
        shares = [f"{row.share:.1f} %", f"{row.sparsity:.1f} %" if row.unit == "weight" else ""]
        cells = (row.layer, row.what, row.unit, f"{row.before:,}", f"{row.kept:,}", *shares)
        body.append(("", [html.escape(cell) for cell in cells]))
    return html_table(heads, body, key=key)
