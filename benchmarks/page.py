"""The tables of docs/BENCHMARKS.md, written between their marks from one file of results.

A region begins with `<!-- benchmark NAME -->` and ends with `<!-- end NAME -->`; what stands outside of regions is
written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.registry import BENCHMARKS, Benchmark, resolved
from benchmarks.results import Results, hardware
from mamba.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "BENCHMARKS.md"
RESULTS = ROOT / "docs" / "results" / "benchmarks.json"
MEANINGS = {
    "training_images_per_s": "Training, images/s",
    "forward_images_per_s": "Forward, images/s",
    "training_mib_per_image": "Memory of an image in training, MiB",
    "forward_mib_per_image": "Memory of an image forward, MiB",
}


def written(page: str, results: Results) -> str:
    """The page with every region made anew.

    Raises:
        ConfigError: a benchmark has no region, or two, or a region no benchmark.
    """
    marks = re.findall(r"^<!-- benchmark (\S+) -->$", page, re.MULTILINE)
    for name in marks:
        if name not in BENCHMARKS:
            raise ConfigError(f"{PAGE.name} has a region for '{name}', which is no benchmark")
    for name, benchmark in BENCHMARKS.items():
        pattern = re.compile(rf"^<!-- benchmark {name} -->$.*?^<!-- end {name} -->$", re.MULTILINE | re.DOTALL)
        if len(pattern.findall(page)) != 1 or marks.count(name) != 1:
            raise ConfigError(
                f"{PAGE.name} needs one region for '{name}': <!-- benchmark {name} --> ... <!-- end {name} -->"
            )
        region = f"<!-- benchmark {name} -->\n{section(benchmark, results.get(name))}\n<!-- end {name} -->"
        page = pattern.sub(lambda _, text=region: text, page)
    return page


def section(benchmark: Benchmark, result: dict[str, Any] | None) -> str:
    """What stands in a region: how and where it was measured, and the tables."""
    if result is None:
        return "Not measured with today's code."
    about = result["about"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if k in ("torch", "triton"))
    load = f", load average {about['load'][0]:.1f} before and {about['load'][1]:.1f} after" if about.get("load") else ""
    where = f"{hardware(result)}, {versions}, {about['date']}, commit {about['code_revision']}{load}"
    parts = [f"{benchmark.note}\n\n`{about['command']}`: {where}."]
    rows = result["rows"]
    if benchmark.across:
        key, values = benchmark.across
        parts += [f"**{MEANINGS[value]}**\n\n{across(benchmark, rows, key, value)}" for value in values]
    else:
        parts.append(table(benchmark.columns, rows))
    if benchmark.figure:
        parts.append(f"![{benchmark.title}]({benchmark.figure[1]})")
    return "\n\n".join(parts)


def table(columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; a column in which no row has anything is left out."""
    shown = {key: head for key, head in columns.items() if any(row.get(key) not in (None, "-") for row in rows)}
    lines = [_line(shown.values()), _line("---" for _ in shown)]
    lines += [_line(_cell(row, key) for key in shown) for row in rows]
    return "\n".join(lines)


def across(benchmark: Benchmark, rows: Sequence[dict[str, Any]], key: str, value: str) -> str:
    """One value's table: a row a model, a column a value of `key` (with its tokens, where they are known)."""
    places = sorted({row[key] for row in rows})
    shown = benchmark.columns
    grouped: dict[tuple[str, ...], dict[Any, dict[str, Any]]] = {}
    for row in rows:
        name = tuple(_cell(row, k) for k in shown if k != "params")
        grouped.setdefault(name, {})[row[key]] = row
    heads = [h for k, h in shown.items() if k != "params"]
    lines = [_line([*heads, *(str(place) for place in places)]), _line("---" for _ in [*heads, *places])]
    for name, found in grouped.items():
        lines.append(_line([*name, *(_cell(found.get(place, {}), value) for place in places)]))
    return "\n".join(lines)


def draw(results: Results) -> None:
    """The figures of what was measured, beside the page."""
    for name, result in results.items():
        figure = BENCHMARKS[name].figure
        if figure:
            resolved(figure[0])(result["rows"], PAGE.parent / figure[1])


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def _cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    if isinstance(value, str):
        return " ".join(value.split())[:80]
    text = number(value)
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    if isinstance(low, int | float) and isinstance(high, int | float) and number(low) != number(high):
        text += f" ({number(low)} to {number(high)})"
    return text


def number(value: float) -> str:
    """Three or four digits that mean something."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{round(value):,}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"
