"""Reports of experiments that no sweep ran: of searches, grids, one trial, and of any legal space."""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pruning.record import Record, Row, save_record
from ray_jobs.report.figures import draw
from ray_jobs.report.findings import findings
from ray_jobs.report.noise import standard_error
from ray_jobs.report.page import write_report
from ray_jobs.sweep.results import baseline_of
from ray_jobs.sweep.space import load_space
from tests.ray_jobs.report.experiments import left_behind, lost, row, space_of


def report(folder, space, trials, baseline=None, **config):
    """-> (the page, names of its figures)."""
    rows = left_behind(folder, space, trials, baseline, **config)
    page = write_report(folder, rows, findings(rows, baseline_of(folder), space.objectives)).read_text()
    made = {ending: {p.stem for p in (folder / "report").glob(f"*.{ending}")} for ending in ("png", "svg", "pdf")}
    assert made["png"] == made["svg"] == made["pdf"]
    return page, made["png"]


def cells_of(page):
    """-> trial -> column -> what stands there."""
    heads = [re.sub("<.*?>", "", head) for head in re.findall(r"<th.*?>(.*?)</th>", page)]
    lines = (re.findall(r"<td.*?>(.*?)</td>", line) for line in re.findall(r"<tr class=(?!\"head).*?</tr>", page))
    return {cells[0]: dict(zip(heads, cells, strict=True)) for cells in lines}


def test_the_report_of_a_search_with_two_objectives(tmp_path):
    space = load_space("pruning")
    points = [(90.0, 400.0), (95.0, 500.0), (80.0, 450.0), (97.0, 900.0), None]
    trials = []
    for i, p in enumerate(points):
        values = {"cut.structured": True, **dict.fromkeys(space.search, 0.05 * (i + 1))}
        if p is None:
            trials.append({**row(values, "failed", f"trial-000{i}"), "reason": "it could not be"})
        else:
            metrics = {"val/accuracy": p[0], "model/macs": p[1], "model/nonzero": 10.0 * i, "val/drop": 1.0}
            trials.append(row(values, trial=f"trial-000{i}", **metrics))
    baseline = {"val/accuracy": 98.0, "val/images": 143.0, "model/macs": 1000.0, "model/nonzero": 100.0}
    page, made = report(tmp_path / "exp", space, trials, baseline)
    text = findings(trials, baseline, space.objectives)
    assert "5 trials: 4 finished, 1 failed" in text and "Pareto front, 3 trials" in text
    front_lines = [line for line in text.splitlines() if line.startswith("trial-")]
    assert [line.split(":")[0] for line in front_lines] == ["trial-0003", "trial-0001", "trial-0000"]
    assert "model/macs 900 (90 % of the dense model's) with linear_out 0.2" in front_lines[0]
    assert "structured" not in text, "what is the same in all trials says nothing"
    assert made == {"pareto", "model-nonzero", "slices", "parallel", "history"}
    assert re.findall(r'class="best"><td>(trial-\d+)', page) == ["trial-0003", "trial-0001", "trial-0000"]
    assert "failed: trial-0004: it could not be" in page and "cut.structured True" in page
    assert "143 images: one is 0.7 points" in page
    cells = cells_of(page)
    assert cells["trial-0004"]["reason"] == "it could not be" and cells["trial-0004"]["val/accuracy"] == ""
    assert cells["trial-0001"]["reason"] == "" and cells["trial-0001"]["val/accuracy"] == "95.00 ± 1.82"


def test_the_report_of_a_search_with_one_objective(tmp_path):
    space = load_space("recipe")
    trials = []
    for i in range(9):
        values = {"model.drop_path": 0.1 * (i % 3), "optim.layer_decay": 0.7, "ema.decay": 1 - 1e-3 * (i + 1)}
        metrics = {"val/best_accuracy": 90.0 + i, "model/macs": 1e6}
        trials.append(row({**values, "optim.lr": 1e-3}, trial=f"trial-{i:04d}", **metrics))
    folder = tmp_path / "exp"
    for i in range(9):
        (folder / f"trial-{i:04d}").mkdir(parents=True)
        epochs = [{"epoch": e, "val/accuracy": 80.0 + e, "val/ema_accuracy": 79.0 + i} for e in (1, 2)]
        text = "\n".join(json.dumps(e) for e in epochs) + ("\nnot json}\n" if i == 3 else "\n")
        (folder / f"trial-{i:04d}" / "metrics.jsonl").write_text(text)
    page, made = report(folder, space, trials)
    assert made == {"slices", "parallel", "history", "importances", "curves"}
    assert page.count('class="best"') == 1 and 'class="best"><td>trial-0008' in page
    text = findings(trials, {}, space.objectives)
    assert "best: trial-0008: val/best_accuracy 98 with model.drop_path 0.2, ema.decay 0.991" in text


def test_what_trials_are_ranked_by_stands_on_the_page(tmp_path):
    """A training's own metrics were left out, the objective among them, and another column stood in its place."""
    space = load_space("recipe").model_copy(update={"objectives": {"train/loss": "min"}})
    trials = [
        row(
            {"optim.lr": 1e-3 * i},
            trial=f"trial-{i:04d}",
            **{"train/loss": 0.5 + i, "train/epoch_s": 7.0, "val/accuracy": 9.0},
        )
        for i in (1, 2)
    ]
    cells = cells_of(report(tmp_path / "exp", space, trials)[0])
    heads = list(cells["trial-0001"])
    assert heads.index("train/loss") < heads.index("optim.lr") < heads.index("val/accuracy")
    assert cells["trial-0001"]["train/loss"] == "1.5" and cells["trial-0002"]["train/epoch_s"] == "7"


def test_what_was_cut_is_drawn_and_told_layer_by_layer(tmp_path):
    folder = tmp_path / "exp"
    rates = (0.25, 0.5)
    trials = [lost({"cut.mlp": rate}, rate, model__macs=10.0, model__nonzero=5.0) for rate in rates]
    rows = left_behind(folder, space_of(grids=[{"cut.mlp": list(rates)}]), trials, {"val/accuracy": 90.0})
    for one, rate in zip(rows, rates, strict=True):
        kept = [Row(f"blocks.{i}", "mlp:neuron", "neuron", 16, round(16 * (1 - rate)) - i) for i in range(2)]
        save_record(folder / one["trial"], Record(tuple(kept), {"mlp:neuron": 0.125}))
    page = write_report(folder, rows, "").read_text()
    assert (folder / "report" / "cuts.png").exists() and "What was cut, layer by layer" in page
    assert "cut.mlp-0.5: mlp:neuron 46.9 % kept (threshold 0.125)" in page
    assert "<td>blocks.1</td><td>mlp:neuron</td><td>neuron</td><td>16</td><td>7</td><td>43.8 %</td>" in page
    (folder / rows[0]["trial"] / "cut.json").write_text("{")
    again = write_report(folder, rows, "").read_text()
    assert "cut.mlp-0.5: mlp" in again and "cut.mlp-0.25: mlp" not in again, "a damaged one is left out"
    assert "not taken for what was cut: " in again and "cut.mlp-0.25/cut.json is damaged" in again


def test_a_report_of_one_trial_is_a_page(tmp_path):
    one = [lost({"cut.mlp": 0.5}, 1.0, model__macs=10.0, model__nonzero=5.0)]
    page, made = report(
        tmp_path / "exp", space_of(grids=[{"cut.mlp": [0.5]}]), one, {"val/accuracy": 90.0, "model/macs": 10}
    )
    assert made == set() and "mlp up to 0.5 costs 1.00 points" in page
    assert cells_of(page)["cut.mlp-0.5"]["cut.mlp"] == "0.5"
    searched = [row({"optim.lr": 0.1}, trial="trial-0000", val__best_accuracy=50.0)]
    space = space_of(
        kind="train", search={"optim.lr": {"low": 0.1, "high": 1.0}}, objectives={"val/best_accuracy": "max"}, trials=1
    )
    page, made = report(tmp_path / "search", space, searched)
    assert made == set() and "best: trial-0000: val/best_accuracy 50" in page


def test_an_ablation_draws_fronts_only_through_models_that_changed(tmp_path):
    """Masked models do the dense one's work: their MACs are on no front, their weights that are left are."""
    masked = [lost({"cut.mlp": r}, 3 * r, model__macs=100.0, model__nonzero=100 - 50 * r) for r in (0.3, 0.9)]
    layers = [lost({"cut.layer": i, "cut.mlp": 0.7}, float(i), model__macs=100.0) for i in range(3)]
    smaller = [
        lost({"cut.structured": True, "cut.mlp": r, "cut.linear_out": 0.7, **more}, 5 * r, model__macs=100 - 50 * r,
             model__nonzero=90 - 50 * r, model__params=90 - 50 * r,
             **{"bench/images_per_s": 10 + r, "bench/images_per_s_low": 9.0, "bench/images_per_s_high": 12.0})
        for r, more in ((0.7, {}), (0.7, {"cut.linear_gate": 0.5}))
    ]  # fmt: skip
    dense = {"val/accuracy": 90.0, "val/images": 100.0}
    dense |= dict.fromkeys(("model/macs", "model/nonzero", "model/params"), 100.0)
    dense |= {"bench/images_per_s": 10.0, "bench/images_per_s_low": 9.0, "bench/images_per_s_high": 11.0}
    space = space_of(grids=[{"cut.mlp": [0.5]}])
    page, made = report(tmp_path / "exp", space, masked + layers + smaller, dense)
    assert made == {"components", "layers", "joint", "model-nonzero"}, "model-macs has one cost to show: no front"
    assert "1.07 times the throughput, within the noise" in page
    again = cells_of(page)[smaller[1]["trial"]]
    assert again["reason"] == f"the same model as {smaller[0]['trial']}" and again["bench/images_per_s"] == ""


# --- any legal space -------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.floats(-1e9, 1e9), st.just(math.nan), st.just(math.inf), st.integers(-5, 5), st.none(), st.floats(0, 100)
)
METRICS = ("val/accuracy", "val/best_accuracy", "val/drop", "val/loss", "val/images", "test/accuracy", "model/params",
           "model/macs", "model/nonzero", "bench/images_per_s", "bench/images_per_s_low", "bench/images_per_s_high",
           "train/loss")  # fmt: skip
KEYS = {
    "cut.mlp": st.floats(0, 0.9),
    "cut.linear_out": st.floats(0, 0.9),
    "cut.layer": st.one_of(st.none(), st.integers(0, 3)),
    "cut.structured": st.booleans(),
    "cut.criterion": st.sampled_from(["l1", "random"]),
    "prune.rate": st.floats(0.1, 0.9),
    "optim.lr": st.floats(1e-5, 1),
    "ema.decay": st.floats(0.9, 0.999),
    "data.batch_size": st.integers(1, 64),
    "model.stem": st.sampled_from(["patch", "conv"]),
    "optim.grad_clip": st.one_of(st.none(), st.floats(0.1, 1)),
    "seed": st.integers(0, 2),
}
RANGES = {
    "cut.mlp": {"low": 0.0, "high": 0.9},
    "prune.rate": {"low": 0.1, "high": 0.9},
    "optim.lr": {"low": 1e-5, "high": 1.0, "log": True},
    "ema.decay": {"low": 1e-3, "high": 1e-1, "log": True, "one_minus": True},
    "data.batch_size": {"low": 1, "high": 64},
    "model.stem": {"choices": ["patch", "conv"]},
}


@st.composite
def experiments(draw):
    """-> (space, trials, baseline): of any keys, and of metrics that may be missing, absurd or not finite."""
    if draw(st.booleans()):
        keys = draw(st.lists(st.sampled_from(sorted(RANGES)), min_size=1, max_size=4, unique=True))
        goals = draw(st.lists(st.sampled_from(["val/loss", "val/best_accuracy", "model/macs"]), min_size=1, max_size=2,
                              unique=True))  # fmt: skip
        objectives = {goal: draw(st.sampled_from(["max", "min"])) for goal in goals}
        space = space_of(search={k: RANGES[k] for k in keys}, objectives=objectives, trials=3)
    else:
        keys = draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=5, unique=True))
        space = space_of(grids=[{k: [0] for k in keys}])
    trials = []
    for i in range(draw(st.integers(0, 10))):
        status = draw(st.sampled_from(["finished", "finished", "finished", "failed", "stopped early"]))
        some = keys if draw(st.booleans()) else draw(st.lists(st.sampled_from(keys), unique=True))
        metrics = {} if status == "failed" else draw(st.dictionaries(st.sampled_from(METRICS), NUMBERS))
        trials.append(row({k: draw(KEYS[k]) for k in some}, status, f"trial-{i:04d}", **metrics))
    return space, trials, draw(st.dictionaries(st.sampled_from(METRICS), NUMBERS))


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(experiments())
def test_findings_work_for_every_legal_space(experiment):
    space, trials, baseline = experiment
    text = findings(trials, baseline, space.objectives)
    assert not re.search(r"(best: |first: ).*\b(nan|inf|None)\b", text), text


@settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
@given(experiments())
def test_the_report_works_for_every_legal_space(experiment):
    space, trials, baseline = experiment
    with tempfile.TemporaryDirectory() as folder:
        finite = {k: v for k, v in baseline.items() if v is not None}
        trials = [{**t, "metrics": {k: v for k, v in t["metrics"].items() if v is not None}} for t in trials]
        page, _ = report(Path(folder) / "exp", space, trials, finite)
    assert len(cells_of(page)) == len(trials)


@pytest.mark.parametrize("value", ["nan", "NaN", "not finite", "-inf", "inf"])
def test_the_page_sorts_what_is_no_number_last(value):
    from ray_jobs.report.table import SORT

    pattern = re.search(r"t===''\|\|/(.*?)/i\.test", SORT)
    assert pattern and re.match(pattern[1], value, re.I)


def errors_in(figure):
    """x or y extents of the error bars that a figure draws, without those that are nothing."""
    from matplotlib.collections import LineCollection

    lines = [c for axis in figure.axes for c in axis.collections if isinstance(c, LineCollection)]
    ends = [segment.max(0) - segment.min(0) for c in lines for segment in c.get_segments()]
    return sorted(float(end.max()) for end in ends if math.isfinite(end.max()))


def test_error_bars_are_of_seeds_where_there_are_several_and_of_images_otherwise(tmp_path):
    by_seed = {1e-3: (90.0, 92.0, 94.0), 1e-2: (80.0,)}
    trials = [
        row({"optim.lr": lr, "seed": seed}, trial=f"lr-{lr:g}_seed-{seed}", val__best_accuracy=value)
        for lr, values in by_seed.items()
        for seed, value in enumerate(values)
    ]
    space = space_of(kind="train", grids=[{"optim.lr": [1e-3, 1e-2]}], seeds=[0, 1, 2])
    figure = draw(space, trials, {}, 100, {})["settings"]
    of_seeds, of_images = 2 / math.sqrt(3), 4.0
    assert errors_in(figure) == pytest.approx([2 * of_seeds, 2 * of_images])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["lr-0.01_seed-0", "lr-0.001"]
    assert "over seeds, of one of 100 images" in figure.get_suptitle()
    _, made = report(tmp_path / "exp", space, trials)
    assert "settings" in made
    blocks = [
        lost({"cut.layer": i, "cut.mlp": 0.5, "seed": s}, 1.0 + s * (i == 0)) for i in (0, 1) for s in (0, 2)[: 2 - i]
    ]
    figure = draw(space_of(grids=[{"cut.layer": [0, 1], "cut.mlp": [0.5]}]), blocks, {}, 100, {})["layers"]
    assert errors_in(figure) == pytest.approx([2 * 1.0, 2 * standard_error(89.0, 100)])
