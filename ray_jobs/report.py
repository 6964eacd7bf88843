"""An experiment's figures, as PNG files, as TensorBoard images and in one HTML page that needs nothing else.

Colours are viridis and its like: ordered in brightness, so that they survive greyscale and colour blindness.
"""

from __future__ import annotations

import base64
import html
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ray_jobs import experiment
from ray_jobs.findings import by_component, by_layer, cut_of, joint

Rows = Sequence[Mapping[str, Any]]
INK = "#31688e"


def write_report(folder: Path, rows: Rows, text: str) -> Path:
    """Write `folder`/report/; returns the page."""
    out = folder / "report"
    out.mkdir(exist_ok=True)
    told = experiment.load(folder)
    baseline_file = folder / "baseline.json"
    baseline = json.loads(baseline_file.read_text()) if baseline_file.exists() else {}
    figures: dict[str, Figure] = {}
    components, layers, together = by_component(rows), by_layer(rows), joint(rows)
    if components:
        figures["components"] = component_map(components, baseline)
    if layers:
        figures["layers"] = layer_bars(layers)
    if together and not told.space.search:
        figures["joint"] = joint_bars(together, baseline)
    for key, label in (("model/params", "parameters"), ("model/macs", "MACs per image"),
                       ("bench/images_per_s", "images per second")):  # fmt: skip
        points = [r for r in rows if key in r["metrics"] and "val/accuracy" in r["metrics"]]
        if len({r["metrics"][key] for r in points}) > 1:
            figures[key.replace("/", "-")] = pareto(points, key, label)
    figures |= study_figures(folder, told)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=130)
    _tensorboard(out, list(figures))
    page = out / "index.html"
    page.write_text(_page(folder, rows, text, list(figures)))
    return page


def component_map(components: Mapping[str, Mapping[float, Mapping[str, Any]]], baseline: Mapping[str, float]) -> Figure:
    """Component x rate, coloured by points lost, accuracy written in."""
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
            words = f"{row['metrics']['val/accuracy']:.1f}\n({-drops[i, j]:+.1f})"
            axis.text(j, i, words, ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axis.set_yticks(range(len(components)), list(components))
    axis.set_xlabel("rate")
    dense = f", dense {baseline['val/accuracy']:.1f} %" if "val/accuracy" in baseline else ""
    axis.set_title(f"validation accuracy, % (points lost){dense}", fontsize=10)
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
    return figure


def joint_bars(rows: Rows, baseline: Mapping[str, float]) -> Figure:
    """Accuracy, parameters, throughput of each combination, beside the dense model."""
    labels = ["dense", *("\n".join(f"{n} {r:g}" for n, r in cut_of(row).items()) for row in rows)]
    metrics = [baseline, *(row["metrics"] for row in rows)]
    shown = {
        "val/accuracy": "validation accuracy, %",
        "model/params": "parameters, M",
        "bench/images_per_s": "images per second",
        "bench/peak_memory_mib": "peak memory, MiB",
    }
    keys = [key for key in shown if all(key in m for m in metrics)]
    figure = Figure(figsize=(3.2 * max(1, len(keys)), 3.4), layout="constrained")
    for axis, key in zip(np.atleast_1d(figure.subplots(1, max(1, len(keys)))), keys, strict=False):
        values = [m[key] / (1e6 if key == "model/params" else 1) for m in metrics]
        axis.bar(labels, values, color=["#b5b5b5", *[INK] * len(rows)])
        axis.set_title(shown[key], fontsize=10)
        axis.tick_params(axis="x", labelsize=6)
    return figure


def pareto(rows: Rows, key: str, label: str) -> Figure:
    """Accuracy against a cost or a speed; trials that nothing beats in both are joined."""
    more = key.startswith("bench/images")
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axis = figure.subplots()
    points = [(row["metrics"][key], row["metrics"]["val/accuracy"]) for row in rows]
    axis.scatter([x for x, _ in points], [y for _, y in points], color=INK, s=18, label="trials")
    front = pareto_front(points, more)
    axis.plot(*zip(*front, strict=True), color="#d1495b", marker="o", markersize=5, label="Pareto front")
    axis.set_xlabel(label)
    axis.set_ylabel("validation accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def pareto_front(points: Sequence[tuple[float, float]], more: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both: second value larger, first larger (`more`) or smaller; in order."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda p: (-p[0] if more else p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def study_figures(folder: Path, told: experiment.Experiment) -> dict[str, Figure]:
    """Optuna's importance of parameters and parallel coordinates, of a search with enough trials."""
    if not told.space.search:
        return {}
    import warnings

    import optuna
    from optuna.visualization import matplotlib as plots

    from ray_jobs.sweep import open_study

    study = open_study(told.space, folder, told.storage, told.config.seed)
    finished = [t for t in study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
    if len(finished) < 4:
        return {}
    objective, mode = next(iter(told.space.objectives.items()))

    def first(trial: optuna.trial.FrozenTrial) -> float:
        return trial.values[0]

    def importances(study: optuna.Study, target: Any, target_name: str) -> Any:
        """Of reaching good values; Optuna's evaluator takes low ones for good."""
        sign = -1 if mode == "max" else 1
        return plots.plot_param_importances(study, target=lambda t: sign * target(t), target_name=target_name)

    figures: dict[str, Figure] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental plots, and the evaluator's word about low values
        for name, plot in (
            ("importance", importances),
            ("parallel", plots.plot_parallel_coordinate),
        ):
            try:
                figure = plot(study, target=first, target_name=objective).figure
            except (ValueError, RuntimeError, ImportError):  # too few distinct values
                continue
            assert isinstance(figure, Figure)
            figure.set_size_inches(7.5, 4)
            figures[name] = figure
    return figures


def _tensorboard(out: Path, names: Sequence[str]) -> None:
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    for old in out.glob("events*"):
        old.unlink()
    with SummaryWriter(str(out)) as writer:
        for name in names:
            writer.add_image(f"report/{name}", imread(out / f"{name}.png")[..., :3], 0, dataformats="HWC")


def _page(folder: Path, rows: Rows, text: str, names: Sequence[str]) -> str:
    tree = json.loads((folder / experiment.FILE).read_text())
    hardware = next((json.loads(p.read_text()).get("hardware") for p in sorted(folder.glob("*/result.json"))), None)
    about = {
        "question": tree["space"]["question"],
        "command": tree["command"],
        "started": tree["started"],
        "hardware": hardware,
        "versions": {p: version(p) for p in ("torch", "ray", "optuna")} | {"python": platform.python_version()},
        "checkpoint": tree["checkpoint"],
    }
    keys = sorted({k for row in rows for k in row["values"]})
    metrics = sorted({k for row in rows for k in row["metrics"] if not k.startswith("train/")})
    head = "".join(f"<th>{html.escape(k)}</th>" for k in ("trial", "status", *keys, *metrics, "reason"))
    body = []
    for row in rows:
        cells = [row["trial"], row["status"], *(row["values"].get(k, "") for k in keys)]
        cells += [_short(row["metrics"].get(k, "")) for k in metrics] + [row["reason"]]
        body.append("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>")
    pictures = []
    for name in names:
        data = base64.b64encode((folder / "report" / f"{name}.png").read_bytes()).decode()
        pictures.append(f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>')
    facts = "".join(f"<dt>{k}</dt><dd><code>{html.escape(str(v))}</code></dd>" for k, v in about.items())
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(folder.name)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(folder.name)}</h1><dl>{facts}</dl><h2>In short</h2><pre>{html.escape(text)}</pre>"
        f"{''.join(pictures)}<h2>All trials</h2><div class=wide><table><tr>{head}</tr>{''.join(body)}</table></div>\n"
    )


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "figure{margin:1.5rem 0}img{max-width:100%}table{border-collapse:collapse;font-size:12px}"
    "td,th{border-bottom:1px solid #ddd;padding:2px 8px;text-align:right}td:first-child{text-align:left}"
    ".wide{overflow-x:auto}dt{float:left;clear:left;width:8rem;color:#666}dd{margin-left:8rem}pre{white-space:pre-wrap}"
)
