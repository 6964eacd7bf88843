"""What rows of trials are: which component each one cuts, which are repeats, which is best.

A row is what `ray_jobs.sweep.results.rows` gives: trial, status, reason, values, metrics, seconds. Nothing here
takes for granted that a trial has a certain value or metric: a space may vary any key. A metric that is not a finite
number is none, so that what diverged is on no front, in no mean, and last in every order.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from mamba.runs.metrics import SCORE
from pruning.components import COMPONENTS, ELEMENT
from ray_jobs.sweep.front import unbeaten

Row = Mapping[str, Any]
AnyRow = TypeVar("AnyRow", bound=Mapping[str, Any])
COSTS = {"model/macs": "min", "model/nonzero": "min", "bench/images_per_s": "max"}
"""What accuracy is drawn against, and which way is better."""
RATES = {f"cut.{name}": name for name, component in COMPONENTS.items() if component.refused is None}
"""Keys of one cut's rates, and their components."""


def measured(row: Row, key: str) -> float | None:
    """A row's metric where it is a finite number, else None."""
    return finite(row["metrics"].get(key))


def finite(value: Any) -> float | None:
    """The value where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def score(row: Row) -> float | None:
    """Validation accuracy of the weights that are kept; of a model that was only measured, its accuracy."""
    best = measured(row, SCORE)
    if best is None:
        best = measured(row, "val/accuracy")
    return best if best is not None and best >= 0 else None  # older trials without a split say -1


def finished(rows: Iterable[AnyRow]) -> list[AnyRow]:
    return [row for row in rows if row["status"] == "finished"]


# --- what was cut ----------------------------------------------------------------------------------------------------


def cut_of(row: Row) -> dict[str, float]:
    """Component -> rate above 0 of a trial."""
    rates = {RATES[key]: finite(value) for key, value in row["values"].items() if key in RATES}
    return {name: rate for name, rate in rates.items() if rate is not None and rate > 0}


def layer_of(row: Row) -> int | None:
    """The only block that a trial cuts; None: all."""
    layer = finite(row["values"].get("cut.layer"))
    return None if layer is None else int(layer)


def by_component(rows: Sequence[AnyRow]) -> dict[str, dict[float, list[AnyRow]]]:
    """Of the finished trials that cut one component in all blocks and know what it cost: component -> rate -> trials.
    Where trials differ in more than rate and seed (the score, the scope), each setting is a component of its own."""
    some = [
        r for r in finished(rows) if len(cut_of(r)) == 1 and layer_of(r) is None and measured(r, "val/drop") is not None
    ]
    found: dict[str, dict[float, list[AnyRow]]] = {}
    for row in some:
        ((name, rate),) = cut_of(row).items()
        words = setting(some, row, RATES)
        found.setdefault(f"{name} ({words})" if words else name, {}).setdefault(rate, []).append(row)
    return found


def by_layer(rows: Sequence[AnyRow]) -> dict[str, dict[int, list[AnyRow]]]:
    """Of the finished trials that cut one block and know what it cost: setting -> block -> trials. The setting is empty
    where trials differ in nothing but block and seed."""
    some = [row for row in finished(rows) if layer_of(row) is not None and measured(row, "val/drop") is not None]
    found: dict[str, dict[int, list[AnyRow]]] = {}
    for row in some:
        layer = layer_of(row)
        assert layer is not None
        words = setting(some, row, {"cut.layer"})
        found.setdefault(words, {}).setdefault(layer, []).append(row)
    return found


def joint(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """The finished trials that cut several components in all blocks and know what it cost."""
    return [
        row
        for row in finished(rows)
        if len(cut_of(row)) > 1 and layer_of(row) is None and measured(row, "val/drop") is not None
    ]


def same_models(rows: Sequence[Row]) -> dict[str, str]:
    """Trials whose units removed are those of an earlier trial, name -> the earlier's: components of one group (a
    channel takes its gate along) are cut as far as the one with the highest rate."""
    first: dict[str, Row] = {}
    same = {}
    for row in finished(rows):
        rates = cut_of(row)
        if not rates or not row["values"].get("cut.structured"):
            continue
        groups: dict[str, float] = {}
        for name, rate in rates.items():
            component = COMPONENTS[name]
            unit = component.groups.get(component.structured or "", f"{name}:{component.structured}")
            if name == "linear_gate" and row["values"].get("cut.gate_elements"):
                unit = f"{name}:{ELEMENT}"
            groups[unit] = max(rate, groups.get(unit, 0.0))
        others = {k: v for k, v in row["values"].items() if k not in RATES}
        key = json.dumps([groups, others], sort_keys=True, default=str)
        earlier = first.setdefault(key, row)
        sizes = ("model/params", "model/nonzero", "model/macs")
        if earlier is not row and all(measured(earlier, size) == measured(row, size) for size in sizes):
            same[row["trial"]] = earlier["trial"]
    return same


def repaired(rows: Sequence[AnyRow]) -> list[tuple[AnyRow, AnyRow]]:
    """The finished trials that know what they cost and differ in nothing but `cut.repair`: without it, and with it."""
    found: dict[str, dict[bool, AnyRow]] = {}
    for row in finished(rows):
        if measured(row, "val/drop") is not None and isinstance(row["values"].get("cut.repair"), bool):
            others = {k: v for k, v in row["values"].items() if k != "cut.repair"}
            found.setdefault(json.dumps(others, sort_keys=True, default=str), {})[row["values"]["cut.repair"]] = row
    return [(pair[False], pair[True]) for pair in found.values() if len(pair) == 2]


def varied(rows: Sequence[Row], row: Row) -> dict[str, Any]:
    """A trial's values, without those that are the same in all trials."""
    return {k: v for k, v in row["values"].items() if any(r["values"].get(k, ...) != v for r in rows)}


def setting(rows: Sequence[Row], row: Row, known: Collection[str]) -> str:
    """What tells a trial from the others, besides some known keys and the seed, in words."""
    others = {k: v for k, v in varied(rows, row).items() if k not in known and k != "seed"}
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in others.items())


# --- repeats ---------------------------------------------------------------------------------------------------------


def over_seeds(rows: Sequence[AnyRow]) -> dict[str, list[AnyRow]]:
    """The finished trials that were repeated over seeds: name without the seed -> trials."""
    found: dict[str, list[AnyRow]] = {}
    for row in finished(rows):
        if "seed" in row["values"]:
            others = {k: v for k, v in row["values"].items() if k != "seed"}
            where = [row.get("experiment"), row.get("group"), _without_seed(row["trial"]) if not others else "", others]
            found.setdefault(json.dumps(where, sort_keys=True, default=str), []).append(row)
    named: dict[str, list[AnyRow]] = {}
    for trials in found.values():
        if len(trials) > 1:
            name = _without_seed(trials[0]["trial"])
            while name in named:
                name += "'"
            named[name] = trials
    return named


def by_setting(rows: Sequence[AnyRow]) -> dict[str, list[AnyRow]]:
    """The finished trials that have a score, those that differ in their seed alone together: name without the seed ->
    trials."""
    done = [row for row in finished(rows) if score(row) is not None]
    found = over_seeds(done)
    repeated = {row["trial"] for some in found.values() for row in some}
    for row in done:
        if row["trial"] not in repeated:
            found[row["trial"]] = [row]
    return found


def _without_seed(name: str) -> str:
    return re.sub(r"(?<![^\W_])seed[-_=]?\d+", "", name).replace("__", "_").strip("-_/") or "all trials"


# --- which is best ---------------------------------------------------------------------------------------------------


def front(rows: Sequence[AnyRow], objectives: Mapping[str, str]) -> list[AnyRow]:
    """The finished trials that no other beats: at least as good in every objective and better in one; best first by
    the first objective. With one objective, its best trials."""
    signs = {key: -1.0 if mode == "max" else 1.0 for key, mode in objectives.items()}
    done, points = [], []
    for row in finished(rows):
        values = [measured(row, key) for key in signs]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            done.append(row)
            points.append(tuple(sign * value for sign, value in zip(signs.values(), known, strict=True)))

    return [done[place] for place in sorted(unbeaten(points), key=lambda place: points[place])]


def changed(rows: Sequence[AnyRow], keys: Iterable[str], baseline: Mapping[str, float]) -> list[AnyRow]:
    """The trials whose cost (model/*, bench/*) is another than the dense model's: a masked model does the dense one's
    work, and a front drawn through it would be none."""
    costs = [key for key in keys if key.startswith(("model/", "bench/")) and key in baseline]
    return [row for row in rows if all(measured(row, key) != finite(baseline[key]) for key in costs)]


def best_of(rows: Sequence[AnyRow], objectives: Mapping[str, str], baseline: Mapping[str, float]) -> list[AnyRow]:
    """What a search found: its best trials, of several objectives the front of those that changed their costs. An
    objective in which no two trials differ decides nothing."""
    done = [row for row in finished(rows) if all(measured(row, key) is not None for key in objectives)]
    real = {key: mode for key, mode in objectives.items() if len({measured(row, key) for row in done}) > 1}
    real = real or dict(list(objectives.items())[:1])
    return front((changed(done, real, baseline) if len(real) > 1 else []) or done, real)


def ranked(rows: Sequence[AnyRow], objective: str, mode: str) -> list[AnyRow]:
    """Trials from the best to the worst; last, in their order, those that have no such metric."""

    def place(row: AnyRow) -> tuple[bool, float]:
        value = score(row) if objective == SCORE else measured(row, objective)
        return (value is None, 0.0 if value is None else -value if mode == "max" else value)

    return sorted(rows, key=place)
