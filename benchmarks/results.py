"""One file of results: per benchmark where and how it was measured, its settings and its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.registry import BENCHMARKS
from mamba.errors import ConfigError
from mamba.runs.files import read_json, write_json

FORMAT = 1
Results = dict[str, dict[str, Any]]
"""Benchmark -> about (hardware, versions, date, commit, command, load), settings, toy, rows."""


def read(path: Path) -> Results:
    """Raises ConfigError for a file that is missing, damaged, or none of ours."""
    try:
        tree = read_json(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    if tree.get("format") != FORMAT or not isinstance(tree.get("benchmarks"), dict):
        raise ConfigError(f"{path} holds no results of benchmarks/run.py (format {FORMAT})")
    return tree["benchmarks"]


def write(path: Path, results: Results) -> None:
    """In the registry's order."""
    ordered = {name: results[name] for name in BENCHMARKS if name in results}
    write_json(path, {"format": FORMAT, "benchmarks": ordered})


def merged(into: Results, *others: Results) -> Results:
    """Later ones replace a benchmark's results as a whole. Raises ConfigError for a toy, and for one without a row that
    was measured."""
    found = dict(into)
    for results in others:
        for name, result in results.items():
            if result["toy"]:
                raise ConfigError(f"the results of '{name}' are a toy's: their numbers mean nothing; measure again")
            if not result["rows"]:
                raise ConfigError(f"the results of '{name}' have no row")
            found[name] = result
    return found


def hardware(result: dict[str, Any]) -> str:
    """The machine in words."""
    about = result["about"]["hardware"]
    return about["gpu"] or f"{about['cpu']}, {about['cpus']} cores"


def row_key(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in BENCHMARKS[name].keys)


def check_rows(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Raises ConfigError where two rows have the same key: a table would show one as the other."""
    keys = [row_key(name, row) for row in rows]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"two rows of '{name}' are both {' '.join(key)}")
