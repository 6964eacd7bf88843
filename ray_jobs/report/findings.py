"""What the trials of a sweep say, in sentences with the numbers beside them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mamba.runs.metrics import number
from pruning.measure import ratio
from pruning.rounds import accuracy_of
from ray_jobs.report.noise import error_of, images_in_words, images_of, standard_error
from ray_jobs.report.rows import (
    RATES,
    best_of,
    by_component,
    by_layer,
    changed,
    cut_of,
    finished,
    finite,
    front,
    joint,
    measured,
    over_seeds,
    ranked,
    repaired,
    same_models,
    score,
    setting,
    varied,
)
from ray_jobs.report.series import Point, by_series, over_rounds
from ray_jobs.sweep.checks import COMPARED_ON

__all__ = ["findings", "front", "ranked"]

CHEAP, DEAR = 1.0, 5.0
"""Points of accuracy: what a cut may cost to be advised, and what makes one dear."""
NOISE = 3
"""Images: a smaller difference is none, so that on a small split a cut may cost as many and still be advised."""


def findings(
    rows: Sequence[Mapping[str, Any]],
    baseline: Mapping[str, float],
    objectives: Mapping[str, str] | None = None,
) -> str:
    """A short text: what to prune first, what not to touch; of a search, its best trials; means over seeds.

    Args:
        rows: trials, as `ray_jobs.sweep.results.rows` gives them, of any space.
        baseline: metrics of the dense model, its `val/images` among them.
        objectives: of a search, metric -> max or min; none for a grid.
    """
    counts = Counter(row["status"] for row in rows)
    known = ", ".join(f"{n} {status}" for status, n in counts.items())
    lines = [f"{len(rows)} trial{'s'[: len(rows) > 1]}: {known}"] if rows else []
    images, dense = images_of(rows, baseline), finite(baseline.get("val/accuracy"))
    split = f" of {images_in_words(images)}" if images else ""
    if dense is not None:
        error = f" ± {standard_error(dense, images):.2f} (standard error)" if images else ""
        lines.append(f"baseline: {dense:.2f} %{error} on the validation split{split}")
    elif images:
        lines.append(f"accuracies are those of the validation split{split}")
    lines += _unequal(rows)
    if objectives:
        return "\n".join(lines + _searched(rows, baseline, objectives, images))
    limit = max(CHEAP, 100 * NOISE / images if images else 0.0)
    lines += _components(rows, baseline, limit, images)
    lines += _layers(rows, limit)
    lines += _together(rows, baseline)
    lines += _given_back(rows, limit)
    lines += _rounds(rows)
    lines += _means(over_seeds(rows))
    return "\n".join(lines)


def _unequal(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys in which trials differ and that decide which images an accuracy is of."""
    lines = []
    for key in COMPARED_ON:
        values = list(dict.fromkeys(str(row["values"][key]) for row in rows if key in row["values"]))
        values += ["the others' own"] if values and any(key not in row["values"] for row in rows) else []
        if len(values) > 1:
            words = ", ".join(values[:5]) + (f" and {len(values) - 5} more" if len(values) > 5 else "")
            lines.append(
                f"trials differ in {key} ({words}): accuracies of one are not those of another, whatever the order in "
                "which they stand"
            )
    return lines


def _lost(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean points lost by trials that repeat each other."""
    return statistics.fmean(row["metrics"]["val/drop"] for row in rows)


def _components(
    rows: Sequence[Mapping[str, Any]], baseline: Mapping[str, float], limit: float, images: int
) -> list[str]:
    """Components in the order in which to prune them: by the highest rate up to which none of its rates costs more than
    `limit`, then by the points lost there. Those that no difference beyond the noise sets apart share a place."""
    components = by_component(rows)
    if not components:
        return []
    if limit > DEAR:
        return [f"too few validation images to say what a cut costs: {NOISE} of them are {limit:.0f} points"]
    idle = [(name, rate) for name, points in components.items() for rate in points if _idle(points[rate], baseline)]
    drops = {
        name: {rate: _lost(some) for rate, some in points.items() if (name, rate) not in idle}
        for name, points in components.items()
    }
    drops = {name: points for name, points in drops.items() if points}
    reach = {}
    for name, points in drops.items():
        dear = min((rate for rate, lost in points.items() if lost > limit), default=float("inf"))
        reach[name] = max((rate for rate in points if rate < dear), default=0.0)
    order = sorted((n for n in reach if reach[n]), key=lambda n: (-reach[n], drops[n][reach[n]]))
    noise = 100 * NOISE / images if images else 0.0
    places: list[list[str]] = []
    for name in order:
        leader = places[-1][0] if places else name
        alike = reach[name] == reach[leader] and drops[name][reach[name]] - drops[leader][reach[leader]] <= noise
        if places and alike:
            places[-1].append(name)
        else:
            places.append([name])
    lines = []
    if order:
        of_images = f", {NOISE} images" if limit > CHEAP else ""
        lines.append(
            f"components by the highest rate that costs at most {limit:.2f} points{of_images}, and by its cost:"
        )
    if len(places) == 1 and len(order) > 1:
        lines.append("none comes first: what sets these apart is within the noise")
    for i, place in enumerate(places):
        for name in place:
            some = components[name][reach[name]]
            kind = "units removed" if some[0]["values"].get("cut.structured") else "weights zeroed"
            share = _nonzero_share(some, baseline)
            first = "prune first: " if i == 0 and len(places) > 1 else f"{i + 1}. " if len(places) > 1 else ""
            lines.append(
                f"{first}{name} up to {reach[name]:g} costs {drops[name][reach[name]]:.2f} points ({kind}{share})"
            )
    for name, points in drops.items():
        rate = min(points)
        if not reach[name]:
            lines.append(f"careful: {name} costs {points[rate]:.2f} points already at {rate:g}")
    lines += [f"{name} at {rate:g} takes nothing from this model" for name, rate in idle]
    return lines


def _idle(rows: Sequence[Mapping[str, Any]], baseline: Mapping[str, float]) -> bool:
    """Whether units should have gone and none went: a rate below one unit."""
    sizes = ("model/params", "model/nonzero")
    return all(
        row["values"].get("cut.structured")
        and all(measured(row, key) is not None and measured(row, key) == finite(baseline.get(key)) for key in sizes)
        for row in rows
    )


def _nonzero_share(rows: Sequence[Mapping[str, Any]], baseline: Mapping[str, float]) -> str:
    left, whole = measured(rows[0], "model/nonzero"), finite(baseline.get("model/nonzero"))
    return f", {100 * (1 - left / whole):.1f} % of the model's parameters" if left is not None and whole else ""


def _layers(rows: Sequence[Mapping[str, Any]], limit: float) -> list[str]:
    lines = []
    for words_of, blocks in by_layer(rows).items():
        layers = {layer: _lost(some) for layer, some in blocks.items()}
        order = sorted(layers, key=lambda layer: layers[layer])
        words = [f"{layer} ({layers[layer]:.2f})" for layer in order]
        named = min(3, max(1, len(words) // 2))  # none is in both lists
        where = f" [{words_of}]" if words_of else ""
        lines.append(f"blocks that matter least, points lost{where}: {', '.join(words[:named])}")
        last = [i for i, layer in enumerate(order) if i >= named and layers[layer] > limit][-named:]
        touchy = ", ".join(words[i] for i in reversed(last)) or f"none costs more than {limit:.2f} alone"
        lines.append(f"blocks not to touch, points lost{where}: {touchy}")
    return lines


def _together(rows: Sequence[Mapping[str, Any]], baseline: Mapping[str, float]) -> list[str]:
    lines = []
    same = same_models(rows)
    together = joint(rows)
    for row in together:
        kind = "units removed" if row["values"].get("cut.structured") else "weights zeroed"
        how = ", ".join(filter(None, [kind, setting(together, row, {*RATES, "cut.structured"})]))
        said = f"together ({how}): {cut_in_words(row)}: "
        if row["trial"] in same:
            earlier = next(r for r in rows if r["trial"] == same[row["trial"]])
            lines.append(f"{said}the same model as {cut_in_words(earlier)} (units of one group go together)")
            continue
        said += f"{row['metrics']['val/drop']:.2f} points"
        params, whole = measured(row, "model/params"), finite(baseline.get("model/params"))
        said += f", {100 * params / whole:.0f} % of the parameters" if params is not None and whole else ""
        faster = ratio(baseline, row["metrics"], "bench/images_per_s")
        said += f", {faster.value:.2f} times the throughput{faster.note}" if faster else ""
        lines.append(said)
    return lines


def _given_back(rows: Sequence[Mapping[str, Any]], limit: float) -> list[str]:
    """What repair gave back, of the cuts that cost more than `limit` without it."""
    pairs = [(plain, mended) for plain, mended in repaired(rows) if _lost([plain]) > limit]
    lines = []
    for plain, mended in sorted(pairs, key=lambda pair: -_lost([pair[0]])):
        lost, left = _lost([plain]), _lost([mended])
        lines.append(
            f"repair of {cut_in_words(plain)}: {lost:.2f} points lost without, {left:.2f} with; "
            f"{100 * (lost - left) / lost:.0f} % given back"
        )
    return lines


def _rounds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Methods of rounds side by side, at each density; says where the ranges do not set the first two apart."""
    lines = []
    for words, methods in by_series(rows).items():
        points = {method: over_rounds(series) for method, series in methods.items()}
        what = accuracy_of(next(iter(methods.values()))[0]["rounds"][0])[1]
        lines.append(f"rounds{f' [{words}]' if words else ''}, {what} accuracy (and parameters) by density:")
        for i in range(max(map(len, points.values()))):
            here = {method: some[i] for method, some in points.items() if i < len(some)}
            order = sorted(here, key=lambda method: -here[method].accuracy)
            said = [f"{m} {_interval(here[m])} ({here[m].params:,.0f})" for m in order]
            alike = len(order) > 1 and here[order[1]].high >= here[order[0]].low
            note = "; the first two are within the noise" if alike else ""
            lines.append(f"density {statistics.fmean(p.density for p in here.values()):.4g}: {', '.join(said)}{note}")
    return lines


def _interval(point: Point) -> str:
    """A mean with its range over seeds, or with its standard error."""
    if point.seeds > 1:
        return f"{point.accuracy:.2f} % ({point.low:.2f} to {point.high:.2f}, {point.seeds} seeds)"
    return f"{point.accuracy:.2f} ± {point.high - point.accuracy:.2f} %"


def cut_in_words(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {rate:g}" for name, rate in cut_of(row).items())


def _means(repeated: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Validation accuracy of each, best first, with its spread: differences within it say nothing."""
    scores = {name: sorted(s for row in trials if (s := score(row)) is not None) for name, trials in repeated.items()}
    known = {name: some for name, some in scores.items() if some}
    width = max(map(len, known), default=0)
    lines = []
    for name in sorted(
        known, key=lambda name: (len(known[name]) < len(repeated[name]), -statistics.fmean(known[name]))
    ):
        some, missing = known[name], len(repeated[name]) - len(known[name])
        spread = f" ± {statistics.stdev(some):.2f}" if len(some) > 1 else ""
        without = f"; {missing} more without an accuracy" if missing else ""
        lines.append(
            f"{name:<{width}}  {statistics.fmean(some):.2f}{spread} % over {len(some)} seed{'s' * (len(some) != 1)} "
            f"({some[0]:.2f} to {some[-1]:.2f}){without}"
        )
    return lines


def _searched(
    rows: Sequence[Mapping[str, Any]], baseline: Mapping[str, float], objectives: Mapping[str, str], images: int
) -> list[str]:
    """The best trial of a search, or its Pareto front."""
    best, (first, *others) = best_of(rows, objectives, baseline), objectives
    lines = []
    for key in objectives:
        values = {measured(row, key) for row in finished(rows)} - {None}
        if len(values) == 1 and len(finished(rows)) > 1:
            lines.append(f"every trial has the same {key}, {number(values.pop())}: it sets none apart")
    dense = len(finished(rows)) - len(changed(finished(rows), others, baseline)) if others else 0
    if 0 < dense < len(finished(rows)):
        lines.append(f"{dense} trials cost what the dense model costs and are on no front")
    if others and len(best) > 1:
        words = " and ".join(f"{key} ({mode})" for key, mode in objectives.items())
        lines.append(f"Pareto front, {len(best)} trials; none is better in both {words}:")
    for row in best if others else best[:1]:
        reached = [f"{first} {number(row['metrics'][first])}"]
        for key in others:
            value, whole = row["metrics"][key], finite(baseline.get(key))
            share = f" ({100 * value / whole:.0f} % of the dense model's)" if whole else ""
            reached.append(f"{key} {number(value)}{share}")
        values_of = {key.partition(".")[2] if cut_of(row) else key: v for key, v in varied(rows, row).items()}
        chosen = ", ".join(f"{key} {number(value, 2)}" for key, value in values_of.items())
        with_ = f" with {chosen}" if chosen else ""
        lines.append(f"{'' if len(best) > 1 and others else 'best: '}{row['trial']}: {', '.join(reached)}{with_}")
    if best and not others and first.startswith("val/") and first.endswith("accuracy"):
        lines += _close(rows, best[0], first, images)
    return lines


def _close(rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any], key: str, images: int) -> list[str]:
    """How many other trials the best one's standard error does not tell apart from it."""
    top, error = measured(best, key), error_of([best], images)
    values = [measured(row, key) for row in finished(rows) if row["trial"] != best["trial"]]
    if top is None or error is None:
        return []
    near = sum(value is not None and top - value <= error for value in values)
    return [f"{near} other{'s' * (near != 1)} within its standard error, {error:.2f} points"] if near else []
