"""Trials as a table: in the terminal, as CSV, and in HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mamba.errors import ConfigError
from mamba.runs.files import write_csv
from mamba.runs.metrics import SCORE
from pruning.show import whole_lines
from ray_jobs.report.rows import finite

COLUMNS = (
    *("val/best_accuracy", "val/accuracy", "val/drop", "test/accuracy"),
    *("prune/density", "model/params", "model/nonzero", "model/macs", "bench/images_per_s"),
    *("train/epoch_s", "train/peak_memory_mib"),
)
"""Metrics that are shown, in this order."""


def show(rows: Sequence[Mapping[str, Any]], first: Sequence[str] = ()) -> None:
    """One trial a row, and only the metrics that some trial has; `first` before the others; a row's `error` stands
    behind its score."""
    table = Table(box=None, pad_edge=False)
    used = [c for c in dict.fromkeys((*first, *COLUMNS)) if any(c in row["metrics"] for row in rows)]
    for name in ("trial", "status", *used):
        table.add_column(name, justify="left" if name in ("trial", "status") else "right", no_wrap=True)
    for row in rows:
        cells = {c: cell(row["metrics"].get(c)) for c in used}
        if cells.get(SCORE) and row.get("error") is not None:
            cells[SCORE] = f"{row['metrics'][SCORE]:.2f} ± {row['error']:.2f}"
        table.add_row(row["trial"], row["status"], *cells.values())
    whole_lines().print(table)


def cell(value: Any) -> str:
    """A metric in the terminal's table."""
    if value is None:
        return ""
    return f"{value:,.2f}".removesuffix(".00") if finite(value) is not None else str(value)


def write_results(path: Path, rows: Sequence[Mapping[str, Any]], about: Sequence[str] = ()) -> None:
    """One trial a line: name, status, reason, seconds, `about`, every value and metric that any trial has.

    Raises:
        ConfigError: the file cannot be written.
    """
    values = sorted({key for row in rows for key in row["values"]})
    metrics = sorted({key for row in rows for key in row["metrics"]})
    facts = ("trial", "status", "reason", "seconds", *about)
    lines = [{**{key: row.get(key) for key in facts}, **row["values"], **row["metrics"]} for row in rows]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(path, list(dict.fromkeys((*facts, *values, *metrics))), lines)
    except OSError as error:
        raise ConfigError(f"the table {path} cannot be written: {error.strerror or error}") from None


def html_table(
    heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], more: int | None = None, key: str = "all"
) -> str:
    """A table that sorts by a click; ours beside pandas' `to_html`, which marks no rows and hides no columns.

    Args:
        heads: one a column.
        rows: a CSS class and the cells, as HTML, of each row.
        more: the column from which on all are shown only when asked for; None: all are shown.
        key: of the page's box that asks for them; each table its own.
    """
    more = len(heads) if more is None else more

    def line(tag: str, cells: Sequence[str], kind: str) -> str:
        marked = (f"<{tag}{' class=more' * (i >= more)}>{c}</{tag}>" for i, c in enumerate(cells))
        return f'<tr class="{kind}">' + "".join(marked) + "</tr>"

    head = line("th", [html.escape(h).replace("/", "/<wbr>").replace(".", ".<wbr>") for h in heads], "head")
    body = "".join(line("td", cells, kind) for kind, cells in rows)
    box = (
        f"<p class=hint><label><input type=checkbox id={key} onchange=\"document.getElementById('table-{key}')"
        f".classList.toggle('whole')\"> all {len(heads)} columns</label></p>"
    )
    return (
        f"{box * (more < len(heads))}<div class=wide><table id=table-{key}><thead>{head}</thead><tbody>{body}</tbody>"
        "</table></div>"
    )


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem;color:#222}"
    ".figures{display:flex;flex-wrap:wrap;gap:1.5rem;align-items:flex-start}figure{margin:0;max-width:100%}"
    "figcaption,.hint{font-size:12px;color:#666}"
    "img{max-width:100%;zoom:.77}table{border-collapse:collapse;font-size:12px}"
    "td,th{border-bottom:1px solid #ddd;padding:2px 8px;text-align:right;white-space:nowrap}"
    "th{cursor:pointer;white-space:normal;vertical-align:bottom}td.words,td:nth-child(2){text-align:left}"
    "td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:#fff}"
    "table:not(.whole) .more{display:none}"
    "tr.best td{background:#fdeef0}tr.baseline td{background:#f3f3f3}tr.failed td{color:#b00020}"
    "tr.stopped-early td{color:#777}.wide{overflow-x:auto}dt{float:left;clear:left;width:8rem;color:#666}"
    "dd{margin-left:8rem}"
)
SORT = (
    "document.querySelectorAll('th').forEach(h=>h.onclick=()=>{const i=h.cellIndex,b=h.closest('table').tBodies[0],"
    "v=r=>{const t=r.cells[i].textContent.trim(),n=parseFloat(t.replace(/,/g,''));"
    "return t===''||/^(nan|not finite|-?inf)/i.test(t)?null:isNaN(n)?t:n};"
    "h.up=!h.up;[...b.rows].sort((p,q)=>{const x=v(p),y=v(q);if(x===null||y===null)return (x===null)-(y===null);"
    "return (x>y?1:x<y?-1:0)*(h.up?1:-1)}).forEach(r=>b.append(r))})"
)
"""Sorts a table by the column that was clicked on; what is empty or no number of a diverged trial stays last."""


def page(title: str, *parts: str) -> str:
    """A page that needs nothing else."""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}"
        f"<script>{SORT}</script></html>\n"
    )
