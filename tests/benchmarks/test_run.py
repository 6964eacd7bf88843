"""Every benchmark runs as a toy; its table comes from its rows; the page from one file of results."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import compare, page, results
from benchmarks.registry import BENCHMARKS
from benchmarks.run import main
from mamba.errors import ConfigError

LONG = {
    "sweep": [pytest.mark.cluster, pytest.mark.long],
    "scaling": [pytest.mark.long],
    "export_cpu": [pytest.mark.long],
}
TOYS = [pytest.param(name, marks=LONG.get(name, ())) for name in BENCHMARKS]


@pytest.mark.parametrize("name", TOYS)
def test_each_runs_as_a_toy(name, tmp_path):
    """Its rows have its keys and what it measures, and make its table."""
    threads = torch.get_num_threads()
    assert main([name, "--toy", "--json", str(tmp_path / "toy.json")]) == 0
    assert torch.get_num_threads() == threads, "the next benchmark would have another number of threads"
    result = results.read(tmp_path / "toy.json")[name]
    benchmark, rows = BENCHMARKS[name], result["rows"]
    assert result["toy"] and rows
    for row in rows:
        assert set(benchmark.keys) <= set(row), row
        assert not [v for v in row.values() if isinstance(v, str) and v.startswith("failed")], row
    on_cpu = [v for v in benchmark.better if "gib" not in v and "mib" not in v]
    for value in on_cpu:
        assert any(isinstance(row.get(value), int | float) for row in rows), value
    text = page.section(benchmark, result)
    assert benchmark.columns[benchmark.keys[0]] in text and "| ---" in text
    with pytest.raises(ConfigError, match="are a toy's"):
        results.merged({}, {name: result})


def test_the_page_is_what_its_results_make():
    """By hand nothing is written into a table, and every benchmark has a place."""
    text = page.PAGE.read_text()
    assert text == page.written(text, results.read(page.RESULTS)), "run.py --from docs/results/benchmarks.json"
    for name, result in results.read(page.RESULTS).items():
        assert not result["toy"] and result["rows"], name
        results.check_rows(name, result["rows"])


def test_a_page_without_a_region_is_refused():
    text = page.PAGE.read_text()
    with pytest.raises(ConfigError, match="needs one region for 'scan'"):
        page.written(text.replace("<!-- end scan -->", ""), {})
    with pytest.raises(ConfigError, match="a region for 'other'"):
        page.written(text + "\n<!-- benchmark other -->\n<!-- end other -->\n", {})


ABOUT = {"hardware": {"gpu": "card", "cpu": "x", "cpus": 2}, "versions": {"torch": "2"}, "date": "2026-01-01",
         "command": "run", "code_revision": "abc"}  # fmt: skip


def step_results(*rows, **about):
    """Results of train_step: (batch, images/s, low, high)."""
    found = [
        {"model": "m", "batch": b, "mode": "recorded", "scan": "default", "variant": "-", "images_per_s": v,
         "images_per_s_low": low, "images_per_s_high": high}
        for b, v, low, high in rows
    ]  # fmt: skip
    about_ = {**ABOUT, "hardware": {**ABOUT["hardware"], **about}}
    return {"train_step": {"about": about_, "settings": {"models": ["m"]}, "toy": False, "rows": found}}


def test_comparison_tells_slower_from_noise():
    old = step_results((128, 100, 98, 102), (256, 200, 190, 210), (512, 300, 299, 301))
    new = step_results((128, 90, 88, 92), (256, 195, 188, 205), (512, 310, 309, 311))
    verdicts = {c.row: c.verdict for c in compare.changes(old, new)}
    assert verdicts == {"m 128 recorded default": "worse", "m 256 recorded default": "same",
                        "m 512 recorded default": "better"}  # fmt: skip
    # ranges apart, but by next to nothing
    (change,) = compare.changes(step_results((1, 100, 99.9, 100.1)), step_results((1, 99, 98.9, 99.1)))
    assert change.verdict == "same"


def test_memory_that_grew_is_worse():
    old, new = step_results((1, 100, 99, 101)), step_results((1, 100, 99, 101))
    old["train_step"]["rows"][0]["peak_gib"], new["train_step"]["rows"][0]["peak_gib"] = 2.0, 2.2
    assert [c.verdict for c in compare.changes(old, new)] == ["same", "worse"]


def test_what_cannot_be_compared_is_refused():
    old = step_results((1, 100, 99, 101))
    with pytest.raises(ConfigError, match="was measured on card and on other"):
        list(compare.changes(old, step_results((1, 100, 99, 101), gpu="other")))
    toy = step_results((1, 100, 99, 101))
    toy["train_step"]["toy"] = True
    with pytest.raises(ConfigError, match="as a toy"):
        list(compare.changes(old, toy))
    other = step_results((1, 100, 99, 101))
    other["train_step"]["settings"]["dataset"] = "digits"
    with pytest.raises(ConfigError, match="with dataset None and with dataset digits"):
        list(compare.changes(old, other))
    with pytest.raises(ConfigError, match="nothing to compare"):
        list(compare.changes(old, {}))


def test_a_row_that_fails_now_is_said(tmp_path, capsys):
    old, new = step_results((1, 100, 99, 101), (2, 100, 99, 101)), step_results((1, 100, 99, 101))
    new["train_step"]["rows"][0]["images_per_s"] = "failed: no"
    new["train_step"]["rows"].append(old["train_step"]["rows"][1])
    for name, found in (("old", old), ("new", new)):
        results.write(tmp_path / f"{name}.json", found)
    words = ["--from", str(tmp_path / "new.json"), "--compare", str(tmp_path / "old.json"), "--no-page"]
    assert main(words) == 1
    assert "images_per_s was 100, now failed: no" in capsys.readouterr().out
    words[1] = words[3]
    assert main(words) == 0


def test_two_rows_of_one_key_are_refused():
    row = {"grid": "components"}
    with pytest.raises(ConfigError, match="two rows of 'sweep' are both components"):
        results.check_rows("sweep", [row, row])


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["nothing"], "unknown benchmark 'nothing'"),
        ([], "name the benchmarks"),
        (["scan", "--toy"], "--toy needs --json FILE"),
        (["cpu_steps", "--toy", "--json", "x", "--set", "scan.seconds=1"], "with a NAME that is run"),
        (["scan_cpu", "--toy", "--json", "x", "--set", "speed=1"], "none of scan_cpu has a setting 'speed'"),
        (["train_step", "--json", "x"], "'train_step' needs a CUDA GPU"),
        (["--from", "none.json"], "none.json is missing"),
    ],
)
def test_errors_are_sentences(words, sentence, capsys, monkeypatch, tmp_path):
    if "needs a CUDA GPU" in sentence and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


def test_settings_are_taken(tmp_path):
    path = tmp_path / "x.json"
    assert main(["scan_cpu", "--toy", "--json", str(path), "--set", 'scan_cpu.modes=["forward"]']) == 0
    rows = json.loads(path.read_text())["benchmarks"]["scan_cpu"]["rows"]
    assert {row["mode"] for row in rows} == {"forward"}
