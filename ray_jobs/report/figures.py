"""The figures of an experiment's report.

Colours are viridis and its like: ordered in brightness, so that they survive greyscale and colour blindness. Accuracies
carry their standard error: over seeds where a trial was repeated, else the binomial one of their images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from mamba.runs.metrics import SCORE, metric, number
from pruning.rounds import accuracy_of
from ray_jobs.report.noise import error_of, standard_error
from ray_jobs.report.rows import (
    COSTS,
    best_of,
    by_component,
    by_layer,
    by_setting,
    changed,
    cut_of,
    finished,
    finite,
    front,
    joint,
    measured,
    same_models,
    score,
)
from ray_jobs.report.series import by_series, over_rounds
from ray_jobs.sweep.space import Range, Space

Rows = Sequence[Mapping[str, Any]]
Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Trial -> (epoch, validation accuracy), epoch by epoch."""
INK, FRONT, DENSE, PALE = "#31688e", "#d1495b", "#555555", "#c8c8c8"
MANY = 60
"""Bars or points beyond which names are not written beside them."""


def draw(space: Space, rows: Rows, baseline: Mapping[str, float], images: int, curves: Curves) -> dict[str, Figure]:
    """Every figure that these trials have something to show in: file's name -> figure.

    Args:
        space: which keys are searched, and for what.
        rows: trials, as `ray_jobs.sweep.results.rows` gives them.
        baseline: metrics of the dense model; may be empty.
        images: of the validation split; 0 where unknown.
        curves: of training trials.
    """
    figures: dict[str, Figure | None] = {}
    same = same_models(rows)
    distinct = [row for row in rows if row["trial"] not in same]  # one model has not two speeds
    objectives = space.objectives
    if len(objectives) == 2:
        good, cost = objectives.items()
        figures["pareto"] = pareto(distinct, good, cost, baseline, images, named=True)
    components, together = by_component(rows), joint(rows)
    if sum(map(len, components.values())) > 1:
        figures["components"] = component_map(components, baseline, images)
    for i, (setting, blocks) in enumerate(by_layer(rows).items()):
        if len(blocks) > 1:
            figures[f"layers-{i}" if i else "layers"] = layer_bars(blocks, setting, baseline, images)
    if together and not space.search:
        figures["joint"] = joint_bars(together, baseline, images)
    for key, mode in COSTS.items():
        if key not in objectives:
            figures[key.replace("/", "-")] = pareto(distinct, (SCORE, "max"), (key, mode), baseline, images)
    objective = next(iter(objectives), None)
    done = [row for row in finished(rows) if objective and measured(row, objective) is not None]
    if objective and space.search and len(done) > 1:
        figures["slices"] = slices(rows, space, objective, baseline)
        if len(space.search) > 1:
            figures["parallel"] = parallel(done, space, objective, baseline)
    settings = by_setting(rows) if space.kind == "train" and not space.search else {}
    if len(settings) > 1:
        figures["settings"] = setting_points(settings, images)
    series = by_series(rows)
    if series:
        figures["rounds"] = density_lines(series)
    if len(curves) > 1:
        figures["curves"] = learning_curves(curves, rows)
    return {name: figure for name, figure in figures.items() if figure is not None}


def value_of(row: Mapping[str, Any], key: str) -> float | None:
    """A metric to draw; of the score, what stands for it in trials that only measured."""
    return score(row) if key == SCORE else measured(row, key)


def is_accuracy(key: str) -> bool:
    return key.startswith("val/") and key.endswith("accuracy")


def component_map(components: Mapping[str, Mapping[float, Rows]], baseline: Mapping[str, float], images: int) -> Figure:
    """Component x rate, coloured by points lost, accuracy written in; what costs least comes first. Trials repeated
    over seeds are one mean."""
    drop = {n: {r: float(np.mean([x["metrics"]["val/drop"] for x in some])) for r, some in points.items()}
            for n, points in components.items()}  # fmt: skip
    names = sorted(drop, key=lambda name: sum(drop[name].values()) / len(drop[name]))
    rates = sorted({rate for points in components.values() for rate in points})
    drops = np.array([[drop[name].get(rate, np.nan) for rate in rates] for name in names])
    width = min(1.6 + 1.2 * len(rates), 30.0)
    figure = Figure(figsize=(width, min(1.2 + 0.5 * len(names), 30.0)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(drops, cmap="viridis_r", aspect="auto")
    middle = (np.nanmax(drops) + np.nanmin(drops)) / 2
    for (i, j), lost in np.ndenumerate(drops):
        if np.isnan(lost):
            axis.text(j, i, "none", ha="center", va="center", color=DENSE, fontsize=8)
            continue
        scores = [s for row in components[names[i]][rates[j]] if (s := score(row)) is not None]
        spread = error_of(components[names[i]][rates[j]], 0)  # of seeds; what the images give is said in the title
        mean = f"{np.mean(scores):.1f}{f' ± {spread:.1f}' if spread is not None else ''}\n" if scores else ""
        words = f"{mean}({0 - round(lost, 1):+.1f})"
        axis.text(j, i, words, ha="center", va="center", color="white" if lost > middle else "black", fontsize=8)
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("rate")
    dense = finite(baseline.get("val/accuracy"))
    against = f", dense {dense:.1f} %" if dense is not None else ""
    error = f" ± {standard_error(dense, images):.1f} ({images:,} images)" if dense is not None and images else ""
    axis.set_title(f"validation accuracy, % (change in points){against}{error}", fontsize=10)
    figure.colorbar(image, label="points lost")
    return figure


def layer_bars(blocks: Mapping[int, Rows], setting: str, baseline: Mapping[str, float], images: int) -> Figure:
    """Points lost when one block alone is cut, with their standard error; that of the dense model as a band."""
    figure = Figure(figsize=(min(max(5, 0.35 * len(blocks)), 30.0), 3.2), layout="constrained")
    axis = figure.subplots()
    order = sorted(blocks)
    lost = [float(np.mean([row["metrics"]["val/drop"] for row in blocks[i]])) for i in order]
    errors = [math.nan if (error := error_of(blocks[i], images)) is None else error for i in order]
    axis.bar([str(layer) for layer in order], lost, yerr=errors, color=INK, ecolor=DENSE, error_kw={"elinewidth": 0.8})
    axis.axhline(0, color="black", linewidth=0.8)
    dense = finite(baseline.get("val/accuracy"))
    if dense is not None and images:
        error = standard_error(dense, images)
        axis.axhspan(
            -error, error, color=PALE, alpha=0.5, zorder=0, label=f"standard error of dense, {images:,} images"
        )
        axis.legend(fontsize=8, frameon=False)
    axis.set_xlabel("block")
    axis.set_ylabel("points of accuracy lost")
    rates = {rate for some in blocks.values() for row in some for rate in cut_of(row).values()}
    words = setting or f"its components cut at {', '.join(f'{r:g}' for r in sorted(rates))}"
    axis.set_title(f"one block alone, {words}", fontsize=10)
    return figure


def joint_bars(rows: Rows, baseline: Mapping[str, float], images: int) -> Figure | None:
    """Accuracy, parameters, throughput of each combination, beside the dense model; each model once."""
    same = same_models(rows)
    rows = [row for row in rows if row["trial"] not in same][:MANY]
    labels = ["\n".join(f"{n} {r:g}" for n, r in cut_of(row).items()) for row in rows]
    labels = [
        f"{label}\n{row['trial']}" if labels.count(label) > 1 else label
        for label, row in zip(labels, rows, strict=True)
    ]
    everything = [*([("dense", baseline)] if baseline else []), *zip(labels, (r["metrics"] for r in rows), strict=True)]
    shown = ("val/accuracy", "model/params", "bench/images_per_s", "bench/peak_memory_mib")
    keys = [key for key in shown if all(finite(m.get(key)) is not None for _, m in everything)]
    if not keys:
        return None
    figure = Figure(figsize=(1.5 + 2.4 * len(keys), 0.8 + 0.65 * len(everything)), layout="constrained")
    for axis, key in zip(np.atleast_1d(figure.subplots(1, len(keys), sharey=True)), keys, strict=True):
        values = [float(m[key]) for _, m in everything]
        ends = [(m.get(f"{key}_low", m[key]), m.get(f"{key}_high", m[key])) for _, m in everything]
        errors = np.array([[v - low, high - v] for v, (low, high) in zip(values, ends, strict=True)]).T.clip(min=0)
        if key == "val/accuracy" and images:
            errors = np.array([standard_error(value, images) for value in values])
        colours = [PALE if name == "dense" else INK for name, _ in everything]
        bars = axis.barh([name for name, _ in everything], values, color=colours, xerr=errors, ecolor=DENSE)
        axis.bar_label(bars, [f" {number(value, 3, units=True)}" for value in values], fontsize=8)
        axis.set_xlim(0, 1.3 * max(values) or 1)
        axis.set_title(metric(key).title, fontsize=10)
        axis.tick_params(axis="both", labelsize=8)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_major_locator(MaxNLocator(4))
    figure.axes[0].invert_yaxis()
    return figure


def pareto(
    rows: Rows,
    good: tuple[str, str],
    cost: tuple[str, str],
    baseline: Mapping[str, float],
    images: int,
    named: bool = False,
) -> Figure | None:
    """One metric against another, each with max or min, of the trials whose cost is not the dense model's: a masked
    model does the dense one's work. Those that nothing beats in both are joined by a line, with `named` by their
    numbers; the dense model is a star. None where fewer than two costs are left to compare."""
    (y, _), (x, _) = good, cost
    done = [r for r in finished(rows) if value_of(r, x) is not None and value_of(r, y) is not None]
    done = changed(done, [x], baseline)
    if len({value_of(row, x) for row in done}) < 2:
        return None
    figure = Figure(figsize=(7.5, 4.6) if named else (5.5, 3.8), layout="constrained")
    axis = figure.subplots()
    drawn = [{**row, "metrics": {**row["metrics"], x: value_of(row, x), y: value_of(row, y)}} for row in done]
    best = front(drawn, dict((good, cost)))
    for some, colour, label in ((drawn, INK, "trials"), (best, FRONT, "Pareto front")):
        xs, ys = ([row["metrics"][key] for row in some] for key in (x, y))
        errors = [standard_error(value, images) for value in ys] if images and is_accuracy(y) else None
        style: dict[str, Any] = {"linestyle": "-", "zorder": 3} if some is best else {"linestyle": ""}
        axis.errorbar(xs, ys, errors, color=colour, marker="o", markersize=5, label=label, elinewidth=0.7, **style)
    at_x, at_y = finite(baseline.get(x)), finite(baseline.get("val/accuracy" if is_accuracy(y) else y))
    if at_x is not None and at_y is not None:
        axis.plot(at_x, at_y, color=DENSE, marker="*", markersize=12, linestyle="", label="dense model")
    for row in best if named else ():
        number = row["trial"].removeprefix("trial-").lstrip("0") or "0"
        where = (row["metrics"][x], row["metrics"][y])
        axis.annotate(number, where, xytext=(4, -10), textcoords="offset points", fontsize=8, color=FRONT)
    axis.set_xlabel(metric(x).title)
    axis.set_ylabel(metric(y).title)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if named:
        axis.set_title("Pareto front, by trial number", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def slices(rows: Rows, space: Space, objective: str, baseline: Mapping[str, float]) -> Figure:
    """The objective against each parameter of a search; trials stopped early are hollow. Ours beside Optuna's
    `plot_slice`, which knows no decay drawn as 1 minus itself and no trial that was stopped."""
    keys = list(space.search)
    across = min(3, len(keys))
    down = -(-len(keys) // across)
    figure = Figure(figsize=(3.4 * across, 3.0 * down), layout="constrained")
    axes = np.atleast_1d(figure.subplots(down, across, sharey=True)).ravel()
    best = [row["trial"] for row in best_of(rows, space.objectives, baseline)]
    best = best if len(space.objectives) > 1 else best[:1]
    for axis, key in zip(axes, keys, strict=False):
        where = space.search[key]
        order = [str(choice) for choice in where.choices or ()]
        for row in rows:
            y = measured(row, objective)
            if y is None or key not in row["values"]:
                continue
            value = row["values"][key]
            x = order.index(str(value)) if str(value) in order else finite(where.drawn(value)) if not order else None
            if x is None:
                continue
            colour = FRONT if row["trial"] in best else INK
            face = colour if row["status"] == "finished" else "none"
            axis.plot(x, y, "o", color=colour, markerfacecolor=face, markersize=5)
        axis.set_xlabel(f"1 - {key}" if where.one_minus else key)
        if order:
            axis.set_xticks(range(len(order)), order)
        elif where.log:
            _log_axis(axis, where)
        axis.grid(alpha=0.3)
    for axis in axes[len(keys) :]:
        axis.set_visible(False)
    figure.supylabel(metric(objective).title, fontsize=10)
    marks = {"best trial" if len(space.objectives) == 1 else "Pareto front": (FRONT, FRONT), "other": (INK, INK)}
    if any(row["status"] != "finished" and measured(row, objective) is not None for row in rows):
        marks["stopped early"] = (INK, "none")
    handles = [Line2D([], [], linestyle="", marker="o", color=c, markerfacecolor=f) for c, f in marks.values()]
    figure.legend(handles, list(marks), loc="outside upper center", ncols=len(marks), fontsize=8, frameon=False)
    return figure


def _log_axis(axis: Any, where: Range) -> None:
    assert where.low is not None and where.high is not None
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1,) if where.high > 20 * where.low else (1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def parallel(done: Rows, space: Space, objective: str, baseline: Mapping[str, float]) -> Figure | None:
    """Every finished trial as a line over all parameters and the objectives, coloured by the first objective; of two
    objectives only the Pareto front is coloured."""
    keys = [*space.search, *space.objectives]
    ends = {key: space.search[key].ends() for key in space.search}
    lines = {}
    for row in done:
        heights = [_place(space.search[key], row["values"].get(key)) for key in space.search]
        heights += [measured(row, key) for key in space.objectives]
        known = [height for height in heights if height is not None]
        if len(known) == len(keys):
            lines[row["trial"]] = (row, known)
    if len(lines) < 2:
        return None
    for i, key in enumerate(space.objectives, len(space.search)):
        values = [line[i] for _, line in lines.values()]
        low, high = min(values), max(values)
        ends[key] = low, high
        for _, line in lines.values():
            line[i] = (line[i] - low) / (high - low) if high > low else 0.5
    scores = {name: row["metrics"][objective] for name, (row, _) in lines.items()}
    map_, norm = colormaps["viridis"], Normalize(min(scores.values()), max(scores.values()))
    several = len(space.objectives) > 1
    best = {row["trial"] for row in best_of(done, space.objectives, baseline)} if several else set(lines)
    figure = Figure(figsize=(min(max(6.0, 1.5 * len(keys)), 30.0), 4.0), layout="constrained")
    axis = figure.subplots()
    sign = -1 if space.objectives[objective] == "min" else 1
    for name in sorted(lines, key=lambda name: (name in best, sign * scores[name])):  # the best above the others
        colour = map_(norm(scores[name])) if name in best else PALE
        axis.plot(lines[name][1], color=colour, linewidth=1.8 if name in best else 1)
    for i, key in enumerate(keys):
        axis.axvline(i, color="black", linewidth=0.8)
        for height, value, where in ((0, ends[key][0], "top"), (1, ends[key][1], "bottom")):
            axis.text(
                i, height + (0.02 if height else -0.02), number(value, 3, units=True), ha="center", va=where, fontsize=8
            )
    axis.set_xticks(range(len(keys)), [key.replace("/", "/\n").replace(".", ".\n") for key in keys], fontsize=8)
    axis.tick_params(axis="x", length=0, pad=14)
    axis.set_yticks([])
    axis.set_ylim(-0.02, 1.02)
    axis.spines[:].set_visible(False)
    title = "every finished trial, a line each" + ("; in colour: the Pareto front" if several else "")
    axis.set_title(title, fontsize=10, pad=18)
    figure.colorbar(ScalarMappable(norm, map_), ax=axis, label=metric(objective).title)
    return figure


def _place(where: Range, value: Any) -> float | None:
    """Where a value lies on its axis, from 0 to 1; None where it is not one that the space draws."""
    if where.choices is not None:
        return where.place(value) if value in where.choices else None
    drawn = finite(value)
    if drawn is None or (where.log and where.drawn(drawn) <= 0):
        return None
    return where.place(drawn)


def density_lines(series: Mapping[str, Mapping[str, Rows]]) -> Figure:
    """Accuracy against the share of weights that survives, a panel for each setting, a line for each method: means,
    with the range over seeds, or of one seed the standard error that the validation images give."""
    across = min(3, len(series))
    down = -(-len(series) // across)
    figure = Figure(figsize=(4.6 * across, 3.6 * down), layout="constrained")
    axes = np.atleast_1d(figure.subplots(down, across)).ravel()
    methods = sorted({method for lines in series.values() for method in lines})
    colours = {name: colormaps["viridis"](0.85 * i / max(1, len(methods) - 1)) for i, name in enumerate(methods)}
    for axis, (words, lines) in zip(axes, series.items(), strict=False):
        for i, (method, some) in enumerate(sorted(lines.items())):
            points = over_rounds(some)
            xs = [point.density for point in points]
            ys = [point.accuracy for point in points]
            ends = np.array([[p.accuracy - p.low, p.high - p.accuracy] for p in points]).T.clip(min=0)
            style = {"marker": "os^vD"[i % 5], "linestyle": ("-", "--", ":", "-.")[i % 4]}
            axis.errorbar(xs, ys, ends, color=colours[method], label=method, elinewidth=0.8, markersize=5, **style)
        axis.set_title(words or "all series", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.invert_xaxis()
        axis.set_xlabel("density: share of the target's weights that survives")
        axis.set_ylabel(f"{accuracy_of(some[0]['rounds'][0])[1]} accuracy, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[len(series) :]:
        axis.set_visible(False)
    return figure


def setting_points(settings: Mapping[str, Rows], images: int) -> Figure:
    """The score of each setting of a grid, best first: the mean with its standard error over seeds, or of one trial
    with that of its validation images. Single seeds are dots."""
    scores = {name: [s for row in some if (s := score(row)) is not None] for name, some in settings.items()}
    order = sorted((name for name in scores if scores[name]), key=lambda name: float(np.mean(scores[name])))
    order = order[-MANY:]
    figure = Figure(figsize=(7.0, min(1.4 + 0.3 * len(order), 30.0)), layout="constrained")
    axis = figure.subplots()
    for y, name in enumerate(order):
        values, error = scores[name], error_of(settings[name], images)
        if len(values) > 1:
            axis.plot(values, [y] * len(values), "o", color=PALE, markersize=4, zorder=1)
        axis.errorbar(np.mean(values), y, xerr=error, color=INK, marker="o", markersize=5, elinewidth=0.8, capsize=2)
    axis.set_yticks(range(len(order)), order, fontsize=8)
    axis.set_xlabel(metric(SCORE).title)
    seeds = {len(values) for values in scores.values()}
    of_images = f"of {images:,} images" if images else "not known"
    words = "over seeds" if min(seeds) > 1 else of_images if max(seeds) < 2 else f"over seeds, of one {of_images}"
    figure.suptitle(f"mean ± standard error ({words})", fontsize=10)
    axis.grid(alpha=0.3, axis="x")
    return figure


def learning_curves(curves: Curves, rows: Rows) -> Figure:
    """Validation accuracy of every training trial, epoch by epoch, coloured by the best that it came to; those that
    were stopped early or failed end in a cross."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()
    tops = {name: max(y for _, y in points) for name, points in curves.items()}
    map_, norm = colormaps["viridis"], Normalize(min(tops.values()), max(tops.values()))
    ended = {row["trial"]: row["status"] for row in rows}
    for name in sorted(curves, key=lambda name: tops[name]):
        xs, ys = zip(*curves[name], strict=True)
        marker = "." if len(xs) == 1 else None
        axis.plot(xs, ys, color=map_(norm(tops[name])), linewidth=1.2, marker=marker)
        if ended.get(name) not in (None, "finished"):
            axis.plot(xs[-1], ys[-1], "x", color=DENSE, markersize=6)
    if any(ended.get(name) not in (None, "finished") for name in curves):
        axis.plot([], [], "x", color=DENSE, linestyle="", label="stopped early or failed")
        axis.legend(fontsize=8)
    axis.set_xlabel("epoch")
    axis.set_ylabel(metric("val/accuracy").title)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.set_title("every trial, raw or averaged weights, whichever is better", fontsize=10)
    figure.colorbar(ScalarMappable(norm, map_), ax=axis, label=metric(SCORE).title)
    return figure
