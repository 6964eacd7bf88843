"""Predictions of labelled images, as a page and in the terminal: classes, what is taken for what, worst mistakes."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from mamba.data.decode import read_rgb
from mamba.predict.outcome import Mistake, Outcome
from mamba.runs.confusion import Confusion
from mamba.runs.files import write_json, write_text
from ray_jobs.report.noise import standard_error
from ray_jobs.report.table import html_table, page

THUMBNAIL = 160
"""Pixels of a picture's longer side."""
GRID = 60
"""Classes up to which the matrix is a table with numbers; beyond, it is a picture."""
SHOWN = 30
"""Classes in the terminal's table."""


def sentences(found: Confusion) -> list[str]:
    """Accuracy with its standard error, and among the first five where that is counted."""
    right = int(found.hits.sum())
    error = standard_error(found.accuracy, found.images)
    said = [f"accuracy: {found.accuracy:.2f} % ± {error:.2f} ({right:,} of {found.images:,} images)"]
    if found.top5 is not None:
        said.append(f"among the first five: {found.top5:.2f} %")
    pairs = found.mixed_up(5)
    if pairs:
        said.append("most often mistaken: " + ", ".join(f"{a} for {b} ({n})" for a, b, n in pairs))
    return said


def class_rows(found: Confusion) -> list[tuple[str, str, str, str, str]]:
    """Class, images, percent recognised, percent right of what is taken for it, its most frequent mistake; the class
    that is recognised worst first, then those without images."""
    rows = []
    for name, images, recall, precision in found.worst_first():
        number = found.classes.index(name)
        others = found.counts[number].copy()
        others[number] = 0
        most = int(others.argmax())
        taken = f"{found.classes[most]} ({int(others[most])})" if others[most] else ""
        rows.append((name, f"{images:,}", _percent(recall), _percent(precision), taken))
    return rows


HEADS = ("class", "images", "recall, %", "precision, %", "most often taken for")


def show_outcome(console: Console, found: Confusion) -> None:
    """Print the sentences, and the classes that are recognised worst."""
    for sentence in sentences(found):
        console.print(sentence, markup=False)
    table = Table(box=None, pad_edge=False)
    for head in HEADS:
        table.add_column(head, justify="left" if head in (HEADS[0], HEADS[-1]) else "right")
    rows = class_rows(found)
    for row in rows[:SHOWN]:
        table.add_row(*row)
    console.print(table)
    if len(rows) > SHOWN:
        console.print(f"and {len(rows) - SHOWN} classes that are recognised better: see the page")


def write_outcome(out: Path, outcome: Outcome, about: Mapping[str, Any]) -> Path:
    """Write the page and the JSON of labelled images beside predictions.csv; returns the page.

    Args:
        out: predictions.csv; the others have its name and other endings.
        outcome: with a confusion matrix.
        about: the model, the images, what should be known of them; goes into both.
    """
    found = outcome.confusion
    assert found is not None
    metrics = {"accuracy": found.accuracy, "images": found.images}
    metrics |= {} if found.top5 is None else {"top5_accuracy": found.top5}
    write_json(out.with_suffix(".json"), {**about, **metrics, **found.to_dict()})
    there = out.with_suffix(".html")
    lines = [f"{key}: {value}" for key, value in about.items() if value] + sentences(found)
    write_text(
        there,
        page(
            f"Predictions of {about.get('model', 'a model')}",
            "".join(f"<p>{html.escape(line)}</p>" for line in lines),
            "<h2>Classes</h2>",
            html_table(HEADS, [("", [html.escape(cell) for cell in row]) for row in class_rows(found)], key="classes"),
            "<h2>What is taken for what</h2><p class=hint>A row for each true class, a column for each prediction.</p>",
            _matrix(found),
            f"<h2>Worst mistakes</h2>{_pictures(outcome.mistakes)}",
        ),
    )
    return there


def _matrix(found: Confusion) -> str:
    if len(found.classes) > GRID:
        data = io.BytesIO()
        Image.fromarray(found.picture()).save(data, "PNG")
        return f"<img src='data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}'>"
    names = [html.escape(name) for name in found.classes]
    rows = "".join(
        f"<tr><th>{name}</th>" + "".join(_cell(count, row.sum(), i == j) for j, count in enumerate(row)) + "</tr>"
        for i, (name, row) in enumerate(zip(names, found.counts, strict=True))
    )
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<div class=wide><table id=confusion><tr><th></th>{head}</tr>{rows}</table></div>"


def _cell(count: int, total: int, right: bool) -> str:
    share = count / total if total else 0.0
    colour = f"{'44,122,75' if right else '178,34,34'},{share:.2f}"
    return f"<td style='background:rgba({colour})'>{count or ''}</td>"


def _pictures(mistakes: Sequence[Mistake]) -> str:
    """Each with its name, its class, and what the model says."""
    if not mistakes:
        return "<p>None.</p>"
    figures = []
    for one in mistakes:
        words = (
            f"<b>{html.escape(one.label)}</b> ({100 * one.of_label:.1f} %) taken for "
            f"<b>{html.escape(one.said.label)}</b> ({100 * one.said.probability:.1f} %)<br>"
            f"<small>{html.escape(str(one.path.name).encode(errors='backslashreplace').decode())}</small>"
        )
        figures.append(
            f"<figure style='margin:0;width:{THUMBNAIL + 20}px'><img alt='' src='data:image/png;base64,"
            f"{_thumbnail(one.path)}' style='min-width:96px;image-rendering:pixelated'><figcaption>{words}</figcaption>"
            "</figure>"
        )
    return f"<div style='display:flex;flex-wrap:wrap;gap:1rem'>{''.join(figures)}</div>"


def _thumbnail(path: Path) -> str:
    image = read_rgb(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"
