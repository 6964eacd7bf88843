"""Everything that finished, side by side: in the terminal a table for each data set and split, and one page of all
experiments and runs with links."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mamba.errors import ConfigError
from mamba.runs.metrics import METRICS, SCORE, metric, number
from ray_jobs.report.collect import Found, merged
from ray_jobs.report.noise import images_in_words
from ray_jobs.report.rows import measured, ranked, score
from ray_jobs.report.table import COLUMNS, html_table, page, show
from ray_jobs.sweep import experiment
from ray_jobs.sweep.results import baseline_of, rows

Rows = list[dict[str, Any]]
NOTE = "± is the standard deviation over seeds, or the standard error that the images give; click on a heading to sort"

TITLE = "Experiments and runs"
TABLE = "trial,status,reason,seconds,experiment,group"
"""How the two files begin that compare.py writes."""


def groups_of(found: Sequence[dict[str, Any]], by: str) -> Iterator[tuple[str, Rows, Rows]]:
    """(data and split in words, its rows from the best to the worst, those that cannot be ranked), seeds merged."""
    mode = "min" if METRICS.get(by) and metric(by).better == "down" else "max"
    for name in sorted({row["group"] for row in found}):
        some = ranked(merged([row for row in found if row["group"] == name]), by, mode)
        known = [row for row in some if (score(row) if by == SCORE else measured(row, by)) is not None]
        if by == SCORE and name.endswith("no validation split"):
            known = []
        images = {row["images"] for row in some} - {0}
        words = f"{name} ({images_in_words(images.pop())})" if len(images) == 1 else name
        yield words, known, [row for row in some if row not in known]


def show_groups(found: Sequence[dict[str, Any]], by: str) -> None:
    """Print a table for each data set and split."""
    for name, known, unranked in groups_of(found, by):
        print(f"\n{name}; ranked by {by}" if known else f"\n{name}; not ranked")
        if known:
            show(known, first=[by])
        if unranked:
            if known:
                print(f"not ranked, without {by}:")
            show(unranked, first=[by])


def check_places(table: Path | None, index: Path | None) -> None:
    """Raises ConfigError where compare.py would write over what it did not write."""
    if table is not None and table == index:
        raise ConfigError(f"--csv and --html are both {table}; choose two places")
    for key, path, begins in (("--csv", table, TABLE), ("--html", index, f"<title>{TITLE}</title>")):
        if path is not None and path.is_file() and begins not in path.read_bytes()[:1000].decode(errors="replace"):
            raise ConfigError(f"{key} {path} is there already, and compare.py did not write it; choose another place")


def write_index(path: Path, found: Found, by: str) -> Path:
    """Write the page; returns its path.

    Raises:
        ConfigError: it cannot be written.
    """
    parts = []
    if found.experiments:
        lines = [("", _experiment(folder, path.parent)) for folder in found.experiments]
        heads = ("experiment", "kind", "started", "trials", "failed", "best", "baseline", "question")
        parts.append(f"<h2>Experiments</h2>{html_table(heads, lines, key='experiments')}")
    for i, (name, known, unranked) in enumerate(groups_of(found.rows, by)):
        note = f"ranked by {html.escape(by)}; {NOTE}" if known else "not ranked"
        table = _group([*known, *unranked], by, path.parent, i)
        parts.append(f"<h2>{html.escape(name)}</h2><p class=hint>{note}</p>{table}")
    if found.skipped:
        parts.append("<h2>Left out</h2><ul>" + "".join(f"<li>{html.escape(s)}</li>" for s in found.skipped) + "</ul>")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(TITLE, *parts))
    except OSError as error:
        raise ConfigError(f"the page {path} cannot be written: {error.strerror or error}") from None
    return path


def _experiment(folder: Path, start: Path) -> list[str]:
    told, trials = experiment.load(folder), rows(folder)
    objective, mode = told.space.first_objective
    best = next(iter(ranked([r for r in trials if r["status"] == "finished"], objective, mode)), None)
    top = None if best is None else score(best) if objective == SCORE else measured(best, objective)
    said = f"{html.escape(objective)} {number(top)}" if top is not None else ""
    report = folder / "report" / "index.html"
    try:
        started = str(json.loads((folder / experiment.FILE).read_text()).get("started", "")).replace("T", " ")
    except ValueError:
        started = ""
    dense = baseline_of(folder).get("val/accuracy")
    failed = sum(row["status"] == "failed" for row in trials)
    cells = [told.space.kind, started, f"{len(trials)} of {told.count}", str(failed)]
    name = _link(report if report.exists() else folder, start, folder.name)
    return [name, *map(html.escape, cells), said, number(dense) if dense is not None else "",
            html.escape(told.space.question)]  # fmt: skip


def _group(some: Rows, by: str, start: Path, i: int) -> str:
    metrics = {key for row in some for key in row["metrics"]}
    columns = [key for key in dict.fromkeys((by, *COLUMNS)) if key in metrics]
    keys = sorted(
        {k for row in some for k in row["values"] if any(r["values"].get(k, ...) != row["values"][k] for r in some)}
    )
    lines = []
    for row in some:
        cells = [_link(row["path"], start, row["trial"]), html.escape(row["status"])]
        cells += [_cell(row, key) for key in columns]
        cells += [html.escape(number(row["values"].get(key, ""))) for key in keys]
        lines.append((str(row["status"]).replace(" ", "-"), cells))
    return html_table(["trial", "status", *columns, *keys], lines, more=2 + len(columns), key=f"group-{i}")


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = score(row) if key == SCORE else row["metrics"].get(key)
    if value is None:
        return ""
    return (
        f"{value:.2f} ± {row['error']:.2f}" if key == SCORE and row["error"] is not None else html.escape(number(value))
    )


def _link(target: Path, start: Path, words: str) -> str:
    where = Path(os.path.relpath(target.resolve(), start.resolve())).as_posix()
    return f'<a href="{html.escape(where)}">{html.escape(words)}</a>'
