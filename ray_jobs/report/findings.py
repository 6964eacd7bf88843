"""What the trials of a sweep say, in sentences with the numbers beside them."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Row = TypeVar("Row", bound=Mapping[str, Any])
CHEAP, DEAR = 1.0, 5.0
"""Points of accuracy: what a cut may cost to be advised, and what makes one dear."""
NOISE = 3
"""Images: a smaller difference is none, so that on a small split a cut may cost as many and still be advised."""


def cut_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Component -> rate of a trial."""
    rates = {k.removeprefix("cut."): v for k, v in row["values"].items() if k.startswith("cut.")}
    return {k: float(v) for k, v in rates.items() if isinstance(v, float) and v > 0}


def by_component(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, Mapping[str, Any]]]:
    """Of the finished trials that cut one component in all blocks: component -> rate -> trial."""
    found: dict[str, dict[float, Mapping[str, Any]]] = {}
    for row in rows:
        cuts = cut_of(row)
        if row["status"] == "finished" and len(cuts) == 1 and row["values"].get("cut.layer") is None:
            ((name, rate),) = cuts.items()
            found.setdefault(name, {})[rate] = row
    return found


def by_layer(rows: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Of the finished trials that cut one block: block -> trial."""
    found = {}
    for row in rows:
        layer = row["values"].get("cut.layer")
        if row["status"] == "finished" and layer is not None:
            found[int(layer)] = row
    return found


def joint(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The finished trials that cut several components in all blocks."""
    return [
        row
        for row in rows
        if row["status"] == "finished" and len(cut_of(row)) > 1 and row["values"].get("cut.layer") is None
    ]


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The finished trials that were repeated over seeds: name without seed -> trials."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "finished" and "seed" in row["values"]:
            found.setdefault(re.sub(r"-seed\d+$", "", row["trial"]), []).append(row)
    return {name: trials for name, trials in found.items() if len(trials) > 1}


def findings(
    rows: Sequence[Mapping[str, Any]],
    baseline: Mapping[str, float],
    val_images: int = 0,
    objectives: Mapping[str, str] | None = None,
) -> str:
    """A short text: what to prune first, what not to touch; of a search, its best trials; means over seeds.

    Args:
        rows: trials, as `ray_jobs.sweep.experiment.rows` gives them.
        baseline: metrics of the dense model.
        val_images: size of the validation split, to say how coarse its percents are.
        objectives: of a search, metric -> max or min; none for a grid.
    """
    counts = Counter(row["status"] for row in rows)
    lines = [f"{len(rows)} trials: {', '.join(f'{n} {status}' for status, n in counts.items())}"] if rows else []
    if "val/accuracy" in baseline:
        images = f" of {val_images} images, one of which is {100 / val_images:.2f} points" if val_images else ""
        lines.append(f"baseline: {baseline['val/accuracy']:.2f} % on the validation split{images}")
    if objectives:
        return "\n".join(lines + _searched(rows, baseline, objectives))
    cheap_points = max(CHEAP, 100 * NOISE / val_images if val_images else 0.0)
    components = by_component(rows)
    drops = {name: {r: row["metrics"]["val/drop"] for r, row in points.items()} for name, points in components.items()}
    cheap = {}
    for name, points in drops.items():  # the highest rate up to which none costs more
        dear = min((r for r, d in points.items() if d > cheap_points), default=float("inf"))
        cheap[name] = max((r for r in points if r < dear), default=0.0)
    for name, rate in sorted(cheap.items(), key=lambda item: -item[1]):
        if rate:
            kind = "removed" if components[name][rate]["values"].get("cut.structured") else "zeroed"
            lines.append(f"prune first: {name} at {rate:g} costs {drops[name][rate]:.2f} points ({kind})")
    for name, points in drops.items():
        rate = min(points)
        if points[rate] >= DEAR or not cheap[name]:
            lines.append(f"careful: {name} costs {points[rate]:.2f} points already at {rate:g}")
    layers = {layer: row["metrics"]["val/drop"] for layer, row in by_layer(rows).items()}
    if layers:
        order = sorted(layers, key=lambda layer: layers[layer])
        words = [f"{layer} ({layers[layer]:.2f})" for layer in order]
        named = min(3, max(1, len(words) // 2))  # none is in both lists
        lines.append(f"blocks that matter least, points lost: {', '.join(words[:named])}")
        last = [i for i, layer in enumerate(order) if i >= named and layers[layer] > cheap_points][-named:]
        touchy = ", ".join(words[i] for i in reversed(last)) or f"none costs more than {cheap_points:.2f} alone"
        lines.append(f"blocks not to touch, points lost: {touchy}")
    for row in joint(rows):
        m = row["metrics"]
        words_of = ", ".join(f"{name} {rate:g}" for name, rate in cut_of(row).items())
        speed = ""
        if "bench/images_per_s" in m and baseline.get("bench/images_per_s"):
            speed = f", {m['bench/images_per_s'] / baseline['bench/images_per_s']:.2f} times the throughput"
        share = m["model/params"] / baseline["model/params"] if baseline.get("model/params") else float("nan")
        kind = "units removed" if row["values"].get("cut.structured") else "weights zeroed"
        lines.append(
            f"together ({kind}): {words_of}: {m['val/drop']:.2f} points, {100 * share:.0f} % of the parameters{speed}"
        )
    lines += _means(over_seeds(rows))
    return "\n".join(lines)


def _means(repeated: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Validation accuracy of each, best first, with its spread: differences within it say nothing."""
    scores = {}
    for name, trials in repeated.items():
        metrics = [row["metrics"] for row in trials]
        values = [m.get("val/best_accuracy", m.get("val/accuracy")) for m in metrics]
        if None not in values:
            scores[name] = sorted(values)
    order = sorted(scores, key=lambda name: -statistics.mean(scores[name]))
    width = max(map(len, scores), default=0)
    return [
        f"{name:<{width}}  {statistics.mean(scores[name]):.2f} % over {len(scores[name])} seeds"
        f" ({scores[name][0]:.2f} to {scores[name][-1]:.2f})"
        for name in order
    ]


def front(rows: Sequence[Mapping[str, Any]], objectives: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """The finished trials that no other beats: at least as good in every objective and better in one; best first by
    the first objective. With one objective, its best trials."""
    signs = {key: -1.0 if mode == "max" else 1.0 for key, mode in objectives.items()}
    done = [r for r in rows if r["status"] == "finished" and all(key in r["metrics"] for key in signs)]
    points = [tuple(sign * row["metrics"][key] for key, sign in signs.items()) for row in done]

    def beaten(point: tuple[float, ...]) -> bool:
        return any(q != point and all(b <= a for a, b in zip(point, q, strict=True)) for q in points)

    best = [(point, row) for point, row in zip(points, done, strict=True) if not beaten(point)]
    return [row for _, row in sorted(best, key=lambda item: item[0])]


def ranked(rows: Sequence[Row], objective: str, mode: str) -> list[Row]:
    """Trials from the best to the worst; last those that have no such metric."""
    sign = -1 if mode == "max" else 1
    return sorted(rows, key=lambda row: sign * row["metrics"].get(objective, sign * float("inf")))


def _searched(
    rows: Sequence[Mapping[str, Any]], baseline: Mapping[str, float], objectives: Mapping[str, str]
) -> list[str]:
    """The best trial of a search, or its Pareto front."""
    best, (first, *others) = front(rows, objectives), objectives
    lines = []
    if others and best:
        words = " and ".join(f"{key} ({mode})" for key, mode in objectives.items())
        lines.append(f"Pareto front, {len(best)} trials; none is better in both {words}:")
    for row in best if others else best[:1]:
        reached = [f"{first} {short(row['metrics'][first])}"]
        for key in others:
            value = row["metrics"][key]
            share = f" ({100 * value / baseline[key]:.0f} % of the dense model's)" if baseline.get(key) else ""
            reached.append(f"{key} {short(value)}{share}")
        values = {key.removeprefix("cut."): value for key, value in varied(rows, row).items()}
        chosen = ", ".join(f"{key} {brief(value)}" for key, value in values.items())
        lines.append(f"{'' if others else 'best: '}{row['trial']}: {', '.join(reached)} with {chosen}")
    return lines


def varied(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's values, without those that are the same in all trials."""
    return {k: v for k, v in row["values"].items() if any(r["values"].get(k, ...) != v for r in rows)}


def brief(value: Any) -> str:
    """A searched value in two significant digits."""
    return f"{value:.2g}" if isinstance(value, float) and not 0.99 <= value < 1 else short(value)


def short(value: Any) -> str:
    """A value or metric: whole and large numbers whole, others in four significant digits, decays in six."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if 0.99 <= value < 1:  # a decay close to 1 must not become one
        return f"{value:.6g}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"
