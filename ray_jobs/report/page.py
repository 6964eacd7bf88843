"""An experiment's report: its figures as PNG, SVG and PDF files and as TensorBoard images, and one HTML page that needs
nothing else."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mamba.runs.folder import epochs_of
from mamba.runs.metrics import number
from pruning.record import Record
from ray_jobs.report.cuts import cut_map, cut_tables, records_of
from ray_jobs.report.figures import draw, is_accuracy
from ray_jobs.report.noise import images_in_words, images_of, standard_error
from ray_jobs.report.rows import best_of, finite, ranked, same_models, varied
from ray_jobs.report.table import COLUMNS, html_table, page
from ray_jobs.sweep import experiment
from ray_jobs.sweep.results import baseline_of, read_trial

Rows = Sequence[Mapping[str, Any]]
FORMATS = ("png", "svg", "pdf")


def write_report(folder: Path, rows: Rows, text: str) -> Path:
    """Write `folder`/report/ of any experiment, whatever its trials left; returns the page."""
    out = folder / "report"
    out.mkdir(exist_ok=True)
    told = experiment.load(folder)
    baseline = baseline_of(folder)
    images = images_of(rows, baseline)
    figures = draw(told.space, rows, baseline, images, _curves(folder, rows))
    records, refused = records_of(folder, rows)
    text = "\n".join([text, *(f"not taken for what was cut: {sentence}" for sentence in refused)])
    cuts = cut_map(records)
    if cuts is not None:
        figures["cuts"] = cuts
    if told.space.search and told.space.objectives:
        from ray_jobs.report.search_figures import optuna_figures

        figures |= optuna_figures(told.space, rows)
    for old in (path for ending in FORMATS for path in out.glob(f"*.{ending}")):
        old.unlink()
    for name, figure in figures.items():
        for ending in FORMATS:
            figure.savefig(out / f"{name}.{ending}", dpi=130)
            figure.set_layout_engine("none")  # it stays as laid out for the first
    _tensorboard(out, list(figures))
    there = out / "index.html"
    there.write_text(_page(folder, told, rows, text, list(figures), baseline, images, records))
    return there


def _curves(folder: Path, rows: Rows) -> dict[str, list[tuple[float, float]]]:
    """Of each trial that trained: the better of raw and averaged validation accuracy, epoch by epoch."""
    curves = {}
    for row in rows:
        try:
            epochs = epochs_of(folder / row["trial"])
        except (OSError, ValueError):  # a line that is damaged: the trial's result has what counts
            continue
        points = []
        for epoch in epochs:
            values = [finite(epoch.get(key)) for key in ("val/accuracy", "val/ema_accuracy")]
            known = [value for value in values if value is not None]
            if known and finite(epoch.get("epoch")) is not None:
                points.append((float(epoch["epoch"]), max(known)))
        if points:
            curves[row["trial"]] = points
    return curves


def _tensorboard(out: Path, names: Sequence[str]) -> None:
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    for old in out.glob("events*"):
        old.unlink()
    with SummaryWriter(str(out)) as writer:
        for name in names:
            writer.add_image(f"report/{name}", imread(out / f"{name}.png")[..., :3], 0, dataformats="HWC")


def _page(
    folder: Path,
    told: experiment.Experiment,
    rows: Rows,
    text: str,
    names: Sequence[str],
    baseline: Mapping[str, float],
    images: int,
    records: Mapping[str, Record],
) -> str:
    same = {k: v for k, v in rows[0]["values"].items() if k not in varied(rows, rows[0])} if len(rows) > 1 else {}
    facts = "".join(
        f"<dt>{k}</dt><dd>{html.escape(str(v))}</dd>" for k, v in about(folder, told, rows, same, images).items() if v
    )
    failed = [f"failed: {row['trial']}: {row['reason']}" for row in rows if row["status"] == "failed"]
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in (*text.splitlines(), *failed))
    objectives = told.space.objectives
    best = [row["trial"] for row in best_of(rows, objectives, baseline)] if objectives else []
    best = best if len(objectives) > 1 else best[:1]
    if objectives:
        rows = ranked(rows, *next(iter(objectives.items())))
    note = "" if not best else " Highlighted: " + ("the best." if len(objectives) == 1 else "the Pareto front.")
    error = " ± is the standard error that so many images give." if images else ""
    return page(
        folder.name,
        f"<dl>{facts}</dl><h2>In short</h2><ul>{lines}</ul>",
        f"<div class=figures>{''.join(_picture(folder, name) for name in names)}</div>",
        f'<h2>All trials</h2><p class=hint><a href="../results.csv">results.csv</a>.{note}{error} Click on a '
        "heading to sort.</p>",
        _table(rows, same, objectives, best, images),
        f"<h2>What was cut, layer by layer</h2>{cut_tables(records)}" if records else "",
    )


def about(
    folder: Path, told: experiment.Experiment, rows: Rows, same: Mapping[str, Any], images: int
) -> dict[str, Any]:
    """Where an experiment comes from: its question, command, machine, versions."""
    tree = read_tree(folder / experiment.FILE)
    results = (read_trial(folder / row["trial"]) or {} for row in rows)
    ran: dict[str, Any] = next((r for r in results if isinstance(r.get("hardware"), dict)), {})
    hardware, packages = ran.get("hardware", {}), dict(ran.get("versions", {}))
    if told.space.search:
        packages["optuna"] = version("optuna")
    machine = f"{hardware.get('gpu') or 'no GPU'}, {hardware.get('cpus', '?')} CPU cores ({hardware.get('cpu')})"
    return {
        "question": told.space.question,
        "command": tree.get("command"),
        "started": str(tree.get("started", "")).replace("T", " "),
        "hardware": machine if hardware else None,
        "versions": ", ".join(f"{name} {number}" for name, number in packages.items()),
        "checkpoint": told.checkpoint,
        "validation": images_in_words(images) if images else None,
        "all trials": ", ".join(f"{key} {number(value)}" for key, value in same.items()),
    }


def read_tree(path: Path) -> dict[str, Any]:
    """A JSON file's dictionary; empty where there is none that can be read."""
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _picture(folder: Path, name: str) -> str:
    data = base64.b64encode((folder / "report" / f"{name}.png").read_bytes()).decode()
    links = " ".join(f'<a href="{name}.{ending}">{ending.upper()}</a>' for ending in FORMATS)
    image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{name}: {links}</figcaption></figure>"


def _table(rows: Rows, same: Mapping[str, Any], objectives: Mapping[str, str], best: Sequence[str], images: int) -> str:
    keys = [key for key in dict.fromkeys(k for row in rows for k in row["values"]) if key not in same]
    asked = {*objectives, *COLUMNS}
    metrics = {k for row in rows for k in row["metrics"] if k in asked or not k.startswith(("train/", "step/"))}
    columns = [k for k in dict.fromkeys((*objectives, *COLUMNS)) if k in metrics]
    others = sorted(metrics - set(columns) - {"epoch", "val/images"})
    first = len(objectives) or len(columns)  # a grid's trials say their values by name
    again = same_models(rows)
    told_why = any(row["reason"] for row in rows) or bool(again)
    heads = ["trial", "status", *["reason"] * told_why, *columns[:first], *keys, *columns[first:], *others]
    body = []
    for row in rows:
        timed = {} if row["trial"] not in again else dict.fromkeys((m for m in metrics if m.startswith("bench/")), "")
        shown = {**row["metrics"], **timed}
        measured = [metric_cell(k, shown.get(k), images) for k in (*columns, *others)]
        values = [html.escape(number(row["values"].get(k, ""))) for k in keys]
        reason = f"the same model as {again[row['trial']]}" if row["trial"] in again else row["reason"]
        cells = [html.escape(row["trial"]), html.escape(row["status"]), *[html.escape(reason)] * told_why]
        cells += [*measured[:first], *values, *measured[first:]]
        body.append(("best" if row["trial"] in best else row["status"].replace(" ", "-"), cells))
    return html_table(heads, body, more=len(heads) - len(others))


def metric_cell(key: str, value: Any, images: int) -> str:
    """A metric in a page's table; an accuracy with the standard error that its images give."""
    if value is None or value == "":
        return ""
    known = finite(value)
    if known is None:
        return html.escape(str(value))
    if is_accuracy(key) and images:
        return f"{known:.2f} ± {standard_error(known, images):.2f}"
    return number(value)
