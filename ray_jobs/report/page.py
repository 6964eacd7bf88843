"""An experiment's figures, as PNG files, as TensorBoard images and in one HTML page that needs nothing else.

Colours are viridis and its like: ordered in brightness, so that they survive greyscale and colour blindness.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from ray_jobs.report.findings import by_component, by_layer, cut_of, front, joint, ranked, short, varied
from ray_jobs.report.table import COLUMNS
from ray_jobs.sweep import experiment
from ray_jobs.sweep.results import read_trial
from ray_jobs.sweep.space import Space

Rows = Sequence[Mapping[str, Any]]
INK, FRONT, DENSE, PALE = "#31688e", "#d1495b", "#555555", "#c8c8c8"
LABELS = {
    "val/accuracy": "validation accuracy, %",
    "val/best_accuracy": "best validation accuracy, %",
    "model/params": "parameters",
    "model/nonzero": "parameters that are not zero",
    "model/macs": "MACs per image",
    "bench/images_per_s": "images per second",
    "bench/peak_memory_mib": "peak memory, MiB",
}
COSTS = ("model/macs", "model/nonzero", "bench/images_per_s")
"""What accuracy is drawn against."""
ENOUGH = 8
"""Finished trials from which on Optuna's importance of parameters is worth showing."""


def write_report(folder: Path, rows: Rows, text: str) -> Path:
    """Write `folder`/report/; returns the page."""
    out = folder / "report"
    out.mkdir(exist_ok=True)
    told = experiment.load(folder)
    baseline = experiment.baseline_of(folder)
    objectives = told.space.objectives
    figures: dict[str, Figure] = {}
    if len(objectives) == 2:
        good, cost = objectives.items()
        figures["pareto"] = pareto(rows, good, cost, baseline, named=True)
    components, layers, together = by_component(rows), by_layer(rows), joint(rows)
    if components:
        figures["components"] = component_map(components, baseline)
    if layers:
        figures["layers"] = layer_bars(layers)
    if together and not told.space.search:
        figures["joint"] = joint_bars(together, baseline)
    for key in COSTS:
        values = {r["metrics"][key] for r in rows if key in r["metrics"] and "val/accuracy" in r["metrics"]}
        if len(values) > 1 and key not in objectives:
            mode = "max" if key == "bench/images_per_s" else "min"
            figures[key.replace("/", "-")] = pareto(rows, ("val/accuracy", "max"), (key, mode), baseline)
    figures |= search_figures(folder, told, rows)
    for old in out.glob("*.png"):
        old.unlink()
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=130)
    _tensorboard(out, list(figures))
    page = out / "index.html"
    page.write_text(_page(folder, told, rows, text, list(figures)))
    return page


def component_map(components: Mapping[str, Mapping[float, Mapping[str, Any]]], baseline: Mapping[str, float]) -> Figure:
    """Component x rate, coloured by points lost, accuracy written in; what costs least comes first."""
    lost = {name: sum(row["metrics"]["val/drop"] for row in points.values()) for name, points in components.items()}
    components = {name: components[name] for name in sorted(lost, key=lambda name: lost[name])}
    rates = sorted({rate for points in components.values() for rate in points})
    drops = np.full((len(components), len(rates)), np.nan)
    figure = Figure(figsize=(1.6 + 1.2 * len(rates), 1.2 + 0.5 * len(components)), layout="constrained")
    axis = figure.subplots()
    for i, points in enumerate(components.values()):
        for rate, row in points.items():
            drops[i, rates.index(rate)] = row["metrics"]["val/drop"]
    image = axis.imshow(drops, cmap="viridis_r", aspect="auto")
    middle = (np.nanmax(drops) + np.nanmin(drops)) / 2
    for i, points in enumerate(components.values()):
        for rate, row in points.items():
            j = rates.index(rate)
            colour = "white" if drops[i, j] > middle else "black"
            words = f"{row['metrics']['val/accuracy']:.1f}\n({0 - round(drops[i, j], 1):+.1f})"
            axis.text(j, i, words, ha="center", va="center", color=colour, fontsize=8)
    for i, j in np.argwhere(np.isnan(drops)):
        axis.text(j, i, "none", ha="center", va="center", color=DENSE, fontsize=8)
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axis.set_yticks(range(len(components)), list(components))
    axis.set_xlabel("rate")
    dense = f", dense {baseline['val/accuracy']:.1f} %" if "val/accuracy" in baseline else ""
    axis.set_title(f"validation accuracy, % (change in points){dense}", fontsize=10)
    figure.colorbar(image, label="points lost")
    return figure


def layer_bars(layers: Mapping[int, Mapping[str, Any]]) -> Figure:
    """Points lost when one block alone is cut."""
    figure = Figure(figsize=(max(5, 0.35 * len(layers)), 3.2), layout="constrained")
    axis = figure.subplots()
    order = sorted(layers)
    axis.bar([str(layer) for layer in order], [layers[i]["metrics"]["val/drop"] for i in order], color=INK)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xlabel("block")
    axis.set_ylabel("points of accuracy lost")
    rates = {rate for row in layers.values() for rate in cut_of(row).values()}
    axis.set_title(f"one block alone, its components cut at {', '.join(f'{r:g}' for r in sorted(rates))}", fontsize=10)
    return figure


def joint_bars(rows: Rows, baseline: Mapping[str, float]) -> Figure:
    """Accuracy, parameters, throughput of each combination, beside the dense model."""
    labels = ["dense", *("\n".join(f"{n} {r:g}" for n, r in cut_of(row).items()) for row in rows)]
    metrics = [baseline, *(row["metrics"] for row in rows)]
    shown = ("val/accuracy", "model/params", "bench/images_per_s", "bench/peak_memory_mib")
    keys = [key for key in shown if all(key in m for m in metrics)]
    figure = Figure(figsize=(1.5 + 2.4 * max(1, len(keys)), 0.8 + 0.65 * len(labels)), layout="constrained")
    for axis, key in zip(np.atleast_1d(figure.subplots(1, max(1, len(keys)), sharey=True)), keys, strict=False):
        values = [m[key] for m in metrics]
        bars = axis.barh(labels, values, color=[PALE, *[INK] * len(rows)])
        axis.bar_label(bars, [f" {_amount(value)}" for value in values], fontsize=8)
        axis.set_xlim(0, 1.25 * max(values))
        axis.set_title(LABELS[key], fontsize=10)
        axis.tick_params(axis="both", labelsize=8)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_major_locator(MaxNLocator(4))
    figure.axes[0].invert_yaxis()
    return figure


def pareto(
    rows: Rows, good: tuple[str, str], cost: tuple[str, str], baseline: Mapping[str, float], named: bool = False
) -> Figure:
    """One metric against another, each with max or min; the trials that nothing beats in both are joined by a line,
    with `named` by their numbers; the dense model is a star."""
    (y, _), (x, _) = good, cost
    figure = Figure(figsize=(7.5, 4.6) if named else (5.5, 3.8), layout="constrained")
    axis = figure.subplots()
    done = [row for row in rows if row["status"] == "finished" and x in row["metrics"] and y in row["metrics"]]
    best = front(done, dict((good, cost)))
    for some, colour, label in ((done, INK, "trials"), (best, FRONT, "Pareto front")):
        points = [(row["metrics"][x], row["metrics"][y]) for row in some]
        style = {"linestyle": "-", "zorder": 3} if some is best else {"linestyle": ""}
        axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=5, label=label, **style)
    if x in baseline and y in baseline:
        axis.plot(baseline[x], baseline[y], color=DENSE, marker="*", markersize=12, linestyle="", label="dense model")
    for row in best if named else ():
        number = row["trial"].removeprefix("trial-").lstrip("0") or "0"
        where = (row["metrics"][x], row["metrics"][y])
        axis.annotate(number, where, xytext=(4, -10), textcoords="offset points", fontsize=8, color=FRONT)
    axis.set_xlabel(LABELS.get(x, x))
    axis.set_ylabel(LABELS.get(y, y))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if named:
        axis.set_title("Pareto front, by trial number", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def search_figures(folder: Path, told: experiment.Experiment, rows: Rows) -> dict[str, Figure]:
    """Of a search: the objective against each parameter, with Optuna's importance where there are enough trials, and
    all parameters at once."""
    space = told.space
    objective = next(iter(space.objectives), None)
    done = [row for row in rows if row["status"] == "finished" and objective in row["metrics"]]
    if objective is None or len(done) < 2 or not space.search:
        return {}
    shares = _importances(folder, told) if len(done) >= ENOUGH else {}
    figures = {"importance": slices(rows, space, objective, shares)}
    if len(space.search) > 1:
        figures["parallel"] = parallel(done, space, objective)
    return figures


def _importances(folder: Path, told: experiment.Experiment) -> dict[str, float]:
    import warnings

    import optuna

    from ray_jobs.sweep.study import open_study

    sign = -1 if next(iter(told.space.objectives.values())) == "max" else 1  # Optuna's evaluator takes low for good
    study = open_study(told.space, folder, told.storage, told.config.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental, and the evaluator's word about low values
        try:
            return optuna.importance.get_param_importances(study, target=lambda trial: sign * trial.values[0])
        except (ValueError, RuntimeError, ImportError):  # too few distinct values
            return {}


def slices(rows: Rows, space: Space, objective: str, importances: Mapping[str, float]) -> Figure:
    """The objective against each parameter of a search; trials stopped early are hollow."""
    keys = sorted(space.search, key=lambda key: -importances.get(key, 0.0))
    across = min(3, len(keys))
    down = -(-len(keys) // across)
    figure = Figure(figsize=(3.4 * across, 3.0 * down), layout="constrained")
    axes = np.atleast_1d(figure.subplots(down, across, sharey=True)).ravel()
    best = [row["trial"] for row in front(rows, space.objectives)]
    best = best if len(space.objectives) > 1 else best[:1]
    for axis, key in zip(axes, keys, strict=False):
        where = space.search[key]
        for row in rows:
            if objective in row["metrics"] and key in row["values"]:
                x = where.drawn(row["values"][key])
                colour = FRONT if row["trial"] in best else INK
                face = colour if row["status"] == "finished" else "none"
                x = str(x) if where.choices is not None else x
                axis.plot(x, row["metrics"][objective], "o", color=colour, markerfacecolor=face, markersize=5)
        axis.set_xlabel(f"1 - {key}" if where.one_minus else key)
        if where.log:
            axis.set_xscale("log")
            assert where.low is not None and where.high is not None
            axis.xaxis.set_major_locator(LogLocator(subs=(1,) if where.high > 20 * where.low else (1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
        if key in importances:
            axis.set_title(f"importance {importances[key]:.2f}", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes[len(keys) :]:
        axis.set_visible(False)
    for axis in axes[::across]:
        axis.set_ylabel(LABELS.get(objective, objective))
    marks = {"best trial" if len(space.objectives) == 1 else "Pareto front": (FRONT, FRONT), "other": (INK, INK)}
    if any(row["status"] != "finished" and objective in row["metrics"] for row in rows):
        marks["stopped early"] = (INK, "none")
    handles = [Line2D([], [], linestyle="", marker="o", color=c, markerfacecolor=f) for c, f in marks.values()]
    figure.legend(handles, list(marks), loc="outside upper center", ncols=len(marks), fontsize=8, frameon=False)
    return figure


def parallel(done: Rows, space: Space, objective: str) -> Figure:
    """Every finished trial as a line over all parameters and the objectives, coloured by the first objective; of two
    objectives only the Pareto front is coloured."""
    keys = [*space.search, *space.objectives]
    ends = {key: space.search[key].ends() for key in space.search}
    for key in space.objectives:
        values = [row["metrics"][key] for row in done if key in row["metrics"]]
        ends[key] = (min(values), max(values))
    scores = [row["metrics"][objective] for row in done]
    map_, norm = colormaps["viridis"], Normalize(min(scores), max(scores))
    best = [row["trial"] for row in front(done, space.objectives)] if len(space.objectives) > 1 else None
    figure = Figure(figsize=(max(6.0, 1.5 * len(keys)), 4.0), layout="constrained")
    axis = figure.subplots()
    worst_first = sorted(done, key=lambda row: row["metrics"][objective])
    if space.objectives[objective] == "min":
        worst_first.reverse()
    for row in sorted(worst_first, key=lambda row: best is not None and row["trial"] in best):
        if any(key not in row["metrics"] for key in space.objectives):
            continue
        heights = []
        for key in keys:
            place = space.search[key].place(row["values"][key]) if key in space.search else None
            low, high = ends[key]
            heights.append((row["metrics"][key] - low) / ((high - low) or 1) if place is None else place)
        pale = best is not None and row["trial"] not in best
        colour = PALE if pale else map_(norm(row["metrics"][objective]))
        axis.plot(heights, color=colour, linewidth=1 if pale else 1.8)
    for i, key in enumerate(keys):
        axis.axvline(i, color="black", linewidth=0.8)
        for height, value, where in ((0, ends[key][0], "top"), (1, ends[key][1], "bottom")):
            axis.text(i, height + (0.02 if height else -0.02), _amount(value), ha="center", va=where, fontsize=8)
    axis.set_xticks(range(len(keys)), [key.replace("/", "/\n").replace(".", ".\n") for key in keys], fontsize=8)
    axis.tick_params(axis="x", length=0, pad=14)
    axis.set_yticks([])
    axis.set_ylim(-0.02, 1.02)
    axis.spines[:].set_visible(False)
    title = "every finished trial, a line each" + ("; in colour: the Pareto front" if best is not None else "")
    axis.set_title(title, fontsize=10, pad=18)
    figure.colorbar(ScalarMappable(norm, map_), ax=axis, label=LABELS.get(objective, objective))
    return figure


def _amount(value: Any) -> str:
    """A number as short as an axis has it: 327k, 5.44M, 0.003."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if 0.99 <= value < 1:  # a decay; three digits would make it a 1
        return f"{value:.6g}"
    scale, unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= s), (1.0, ""))
    return f"{value / scale:.3g}{unit}"


def _tensorboard(out: Path, names: Sequence[str]) -> None:
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    for old in out.glob("events*"):
        old.unlink()
    with SummaryWriter(str(out)) as writer:
        for name in names:
            writer.add_image(f"report/{name}", imread(out / f"{name}.png")[..., :3], 0, dataformats="HWC")


def _page(folder: Path, told: experiment.Experiment, rows: Rows, text: str, names: Sequence[str]) -> str:
    tree = json.loads((folder / experiment.FILE).read_text())
    results = (read_trial(folder / row["trial"]) or {} for row in rows)
    ran: dict[str, Any] = next((result for result in results if "hardware" in result), {})
    hardware, packages = ran.get("hardware", {}), dict(ran.get("versions", {}))
    if told.space.search:
        packages["optuna"] = version("optuna")
    same = {k: v for k, v in rows[0]["values"].items() if k not in varied(rows, rows[0])} if len(rows) > 1 else {}
    about = {
        "question": tree["space"]["question"],
        "command": tree["command"],
        "started": tree["started"].replace("T", " "),
        "hardware": f"{hardware.get('gpu') or 'no GPU'}, {hardware.get('cpus', '?')} CPU cores ({hardware.get('cpu')})",
        "versions": ", ".join(f"{name} {number}" for name, number in packages.items()),
        "checkpoint": tree["checkpoint"],
        "all trials": ", ".join(f"{key} {short(value)}" for key, value in same.items()),
    }
    objectives = told.space.objectives
    listed = [row["trial"] for row in front(rows, objectives)] if objectives else []
    best = listed if len(objectives) > 1 else listed[:1]
    if objectives:
        rows = ranked(rows, *next(iter(objectives.items())))
    keys = [key for key in dict.fromkeys(k for row in rows for k in row["values"]) if key not in same]
    metrics = {k for row in rows for k in row["metrics"] if not k.startswith(("train/", "step/"))}
    columns = [k for k in dict.fromkeys((*objectives, *COLUMNS)) if k in metrics]
    columns += sorted(metrics - set(columns) - {"epoch"})
    first = len(objectives) or sum(column in COLUMNS for column in columns)  # a grid's trials say their values by name
    reasons = ["reason"] if any(row["reason"] for row in rows) else []
    head = "".join(
        f"<th>{html.escape(k)}</th>" for k in ("trial", "status", *reasons, *columns[:first], *keys, *columns[first:])
    )
    body = []
    for row in rows:
        measured = [short(row["metrics"].get(k, "")) for k in columns]
        values = [short(row["values"].get(k, "")) for k in keys]
        told_why = [row["reason"]] if reasons else []
        cells = [row["trial"], row["status"], *told_why, *measured[:first], *values, *measured[first:]]
        kind = "best" if row["trial"] in best else row["status"].replace(" ", "-")
        body.append(f'<tr class="{kind}">' + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>")
    pictures = []
    for name in names:
        data = base64.b64encode((folder / "report" / f"{name}.png").read_bytes()).decode()
        pictures.append(f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>')
    facts = "".join(f"<dt>{k}</dt><dd>{html.escape(str(v))}</dd>" for k, v in about.items() if v)
    failed = [f"failed: {row['trial']}: {row['reason']}" for row in rows if row["status"] == "failed"]
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in (*text.splitlines(), *failed))
    note = "" if not best else " (highlighted: " + ("the best)" if len(objectives) == 1 else "the Pareto front)")
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(folder.name)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(folder.name)}</h1><dl>{facts}</dl><h2>In short</h2><ul>{lines}</ul>"
        f'<div class=figures>{"".join(pictures)}</div><h2>All trials</h2><p><a href="../results.csv">results.csv</a>'
        f"{note}; click on a heading to sort</p>"
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f"<script>{SORT}</script>\n"
    )


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem;color:#222}"
    ".figures{display:flex;flex-wrap:wrap;gap:1.5rem;align-items:flex-start}figure{margin:0}"
    "img{max-width:100%;zoom:.77}table{border-collapse:collapse;font-size:12px}"
    "td,th{border-bottom:1px solid #ddd;padding:2px 8px;text-align:right;white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:#fff}th{cursor:pointer}"
    "tr.best td{background:#fdeef0}tr.failed td{color:#b00020}tr.stopped-early td{color:#777}"
    ".wide{overflow-x:auto}dt{float:left;clear:left;width:8rem;color:#666}dd{margin-left:8rem}"
)
SORT = (
    "document.querySelectorAll('th').forEach((h,i)=>h.onclick=()=>{const b=document.querySelector('tbody'),"
    "v=r=>{const t=r.cells[i].textContent,n=parseFloat(t.replace(/,/g,''));return t===''?null:isNaN(n)?t:n};"
    "h.up=!h.up;[...b.rows].sort((p,q)=>{const x=v(p),y=v(q);if(x===null||y===null)return (x===null)-(y===null);"
    "return (x>y?1:x<y?-1:0)*(h.up?1:-1)}).forEach(r=>b.append(r))})"
)
