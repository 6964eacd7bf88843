"""What became slower, or takes more, from one file of results to another: beyond what the noise of either explains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.registry import BENCHMARKS
from benchmarks.results import Results, hardware, row_key
from mamba.errors import ConfigError

LEAST = 0.02
"""Relative change below which nothing is said, where ranges are known and do not overlap."""
UNKNOWN = 0.05
"""The same where a value has no range."""
HOW_LONG = ("seconds", "repeats", "epochs", "steps", "root")
"""Settings that do not change what is measured."""


@dataclass(frozen=True)
class Change:
    """A value of a row in both results."""

    benchmark: str
    row: str
    value: str
    before: float
    after: float
    verdict: str
    """worse, better or same."""


def changes(old: Results, new: Results) -> Iterator[Change]:
    """Every value that both have.

    Raises:
        ConfigError: a benchmark was measured on other hardware, with other settings, or as a toy in one of them; or the
            two have nothing in common.
    """
    common = [name for name in new if name in old and name in BENCHMARKS]
    if not common:
        raise ConfigError(f"nothing to compare: one has {', '.join(old) or 'nothing'}, the other {', '.join(new)}")
    for name in common:
        _check(name, old[name], new[name])
        before = {row_key(name, row): row for row in old[name]["rows"]}
        for row in new[name]["rows"]:
            earlier = before.get(row_key(name, row))
            for value, better in BENCHMARKS[name].better.items():
                if earlier is not None and _is_number(row.get(value)) and _is_number(earlier.get(value)):
                    verdict = _verdict(earlier, row, value, better)
                    words = " ".join(k for k in row_key(name, row) if k not in ("-", "None"))
                    yield Change(name, words, value, earlier[value], row[value], verdict)


def missing(old: Results, new: Results) -> list[str]:
    """Rows, in words, that were measured and are not any more, or failed now."""
    found = []
    for name in [n for n in new if n in old and n in BENCHMARKS]:
        now = {row_key(name, row): row for row in new[name]["rows"]}
        for row in old[name]["rows"]:
            key = row_key(name, row)
            for value in BENCHMARKS[name].better:
                if _is_number(row.get(value)) and not _is_number(now.get(key, {}).get(value)):
                    said = now.get(key, {}).get(value, "not measured")
                    found.append(f"{name}: {' '.join(key)}: {value} was {row[value]:,.4g}, now {said}")
    return found


def _check(name: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    if old["toy"] or new["toy"]:
        raise ConfigError(f"'{name}' was run as a toy: its numbers mean nothing")
    if hardware(old) != hardware(new):
        raise ConfigError(f"'{name}' was measured on {hardware(old)} and on {hardware(new)}; compare one machine's")
    for key in sorted(old["settings"].keys() | new["settings"].keys()):
        a, b = old["settings"].get(key), new["settings"].get(key)
        # rows that only one of them has are compared with none
        if a != b and key not in HOW_LONG and not (isinstance(a, list) and isinstance(b, list)):
            raise ConfigError(f"'{name}' was measured with {key} {a} and with {key} {b}")


def _verdict(before: dict[str, Any], after: dict[str, Any], key: str, better: str) -> str:
    sign = 1 if better == "up" else -1
    gain = sign * (after[key] / before[key] - 1) if before[key] else 0.0
    ends = [row.get(f"{key}_{end}") for row in (before, after) for end in ("low", "high")]
    if all(_is_number(end) for end in ends):
        low0, high0, low1, high1 = ends
        apart = low1 > high0 or high1 < low0
        told = apart and abs(gain) > LEAST
    else:
        told = abs(gain) > UNKNOWN
    return "same" if not told else "better" if gain > 0 else "worse"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
