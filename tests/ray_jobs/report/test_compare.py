"""compare.py over folders that nothing ran: what is ranked with what, and what is left out by name."""

from __future__ import annotations

import csv
import json
import re
import shutil

import pytest

from mamba.runs.files import write_sealed
from ray_jobs.compare import main as compare
from ray_jobs.report.collect import collect, merged
from tests.ray_jobs.report.experiments import left_behind, lost, row, run_left_behind, space_of


def trained(accuracy=None, **more):
    metrics = {"test/accuracy": 50.0, "model/params": 10, "train/loss": 1.0}
    metrics |= {} if accuracy is None else {"val/accuracy": accuracy}
    return {"status": "finished", "metrics": metrics, "seconds": 1.0, **more}


@pytest.fixture
def mixed(tmp_path):
    """An ablation of a run, runs of other data and splits, seeds, one run without validation."""
    runs = tmp_path / "runs"
    parent = trained(97.2, tested={"weights": "ema", "epoch": 1, "tta_views": 1})
    epochs = [{"val/accuracy": 90.0, "val/ema_accuracy": 98.6}, {"val/accuracy": 97.2, "val/ema_accuracy": 91.0}]
    run_left_behind(runs / "digits" / "parent", parent, epochs)
    left_behind(
        runs / "ablation",
        space_of(grids=[{"cut.mlp": [0.1]}]),
        [lost({"cut.mlp": 0.1}, 0.7, dense=98.6)],
        {"val/accuracy": 98.6, "val/images": 143.0},
    )
    run_left_behind(runs / "cifar" / "a", trained(99.9), data__dataset="cifar10", data__root="x")
    run_left_behind(runs / "digits" / "blind", trained(), data__val_fraction=0.0)
    run_left_behind(runs / "digits" / "other-split", trained(99.0), seed=7)
    seeds = [row({"optim.lr": lr, "seed": s}, trial=f"lr-{lr}-seed{s}", **{"val/best_accuracy": a})
             for lr, s, a in ((0.1, 0, 80.0), (0.1, 1, 84.0), (0.2, 0, 70.0))]  # fmt: skip
    left_behind(runs / "seeds", space_of(kind="train", grids=[{"optim.lr": [0.1]}]), seeds)
    return runs


def lines_of(text):
    """-> group -> its trials in order."""
    groups = {}
    for block in text.split("\n\n"):
        head, *lines = [line for line in block.splitlines() if line.strip()]
        groups[head.split(";")[0]] = [line.split("  ")[0].strip() for line in lines if line.startswith("runs/")]
    return groups


def test_one_figure_ranks_within_one_data_set_and_split(mixed, capsys):
    """A pruned trial stood above its own parent, which had been as good by the weights that are kept."""
    assert compare([str(mixed)]) == 0
    said = capsys.readouterr().out
    groups = {re.sub(r" \(.*", "", name): trials for name, trials in lines_of(said).items()}
    assert groups["digits, 10 % to validate, split 0"] == [
        "runs/ablation (baseline)",
        "runs/digits/parent",
        "runs/ablation/cut.mlp-0.1",
        "runs/seeds/lr-0.1 (2 seeds)",
        "runs/seeds/lr-0.2-seed0",
    ]
    assert groups["cifar10, 10 % to validate, split 0"] == ["runs/cifar/a"], "data sets are not mixed"
    assert groups["digits, 10 % to validate, split 7"] == ["runs/digits/other-split"]
    assert groups["digits, no validation split"] == ["runs/digits/blind"] and "not ranked" in said
    assert "82.00 ± 2.83" in said, "seeds are a mean with its spread"
    assert re.search(r"parent +finished +98\.60 ", said), "the figure of the weights that are kept"
    assert re.search(r"cut\.mlp-0\.1 +finished +97\.90 ± 1\.20", said), "the standard error of 143 images"


def test_a_metric_that_is_better_low_is_ranked_so(tmp_path, capsys):
    for name, loss in (("a", 2.0), ("b", 1.0), ("nan", None)):
        result = trained(90.0)
        result["metrics"]["val/loss"] = loss
        run_left_behind(tmp_path / "runs" / "x" / name, result)
    assert compare([str(tmp_path / "runs"), "--by", "val/loss"]) == 0
    said = capsys.readouterr().out
    assert said.index("x/b") < said.index("x/a") < said.index("not ranked") < said.index("x/nan")
    assert compare([str(tmp_path / "runs"), "--by", "val/lsos"]) == 2
    assert "--by val/lsos: no trial has it; valid: model/params" in capsys.readouterr().err


@pytest.mark.parametrize("name, damage", [
    ("result.json", "{"), ("result.json", "[]"), ("result.json", '{"status": "finished", "metrics": [1]}'),
    ("result.json", "null"), ("result.json", ""), ("config.yaml", "data: ["), ("config.yaml", "- 1\n- 2\n"),
    ("config.yaml", "data: {nothing: 1}"), ("trial.json", "{"), ("trial.json", "[]"), ("trial.json", '{"values": []}'),
    ("pruned.json", "[]"), ("pruned.json", "{}"), ("experiment.json", "{}"), ("experiment.json", "[]"),
    ("result.json", "[" * 100_000), ("baseline.json", "[]"),
])  # fmt: skip
def test_what_cannot_be_read_is_left_out_by_name(mixed, capsys, name, damage):
    broken = mixed / "ablation" if name in ("experiment.json", "baseline.json") else mixed / "digits" / "broken"
    if broken.name == "broken":
        run_left_behind(broken, trained(50.0))
    (broken / name).write_text(damage)
    assert compare([str(mixed)]) == 0
    out, err = capsys.readouterr()
    assert "left out: " in err and str(broken / name) in err + str(broken / name) * (str(broken) in err), err
    assert "runs/digits/parent" in out and "Traceback" not in err and "runs/digits/broken" not in out


def test_older_formats_are_read(tmp_path):
    """A trial of version 1 kept its values in result.json, under keys that are called otherwise now."""
    older = {**trained(91.0), "values": {"prune.mlp": 0.5}, "trial_seconds": 3.0, "reason": ""}
    run_left_behind(tmp_path / "runs" / "exp" / "mlp-0.5", older)
    best = tmp_path / "runs" / "exp" / "plain" / "checkpoints" / "best-00003"
    run_left_behind(best.parents[1], {**trained(60.0)})
    best.mkdir(parents=True)
    (best / "config.json").write_text(json.dumps({"metrics": {"val/accuracy": 77.0}, "weights": "raw"}))
    rows = {r["trial"]: r for r in collect([tmp_path / "runs"]).rows}
    assert rows["runs/exp/mlp-0.5"]["values"] == {"cut.mlp": 0.5}
    assert rows["runs/exp/plain"]["metrics"]["val/best_accuracy"] == 77.0


def test_nothing_of_others_is_written_over(mixed, tmp_path, capsys):
    """Notes, and a run's own result.json, were replaced without a word; one place for both files lost the table."""
    mine = tmp_path / "notes.csv"
    mine.write_text("precious")
    for key in ("--csv", "--html"):
        assert compare([str(mixed), key, str(mine)]) == 2
        assert f"{key} {mine} is there already, and compare.py did not write it" in capsys.readouterr().err
    assert compare([str(mixed), "--csv", str(tmp_path / "a"), "--html", str(tmp_path / "a")]) == 2
    assert "choose two places" in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert mine.read_text() == "precious"
    for _ in range(2):  # its own files it writes again
        assert compare([str(mixed), "--csv", str(tmp_path / "a.csv"), "--html", str(tmp_path / "a.html")]) == 0


def test_the_csv_has_every_trial_and_makes_its_folder(mixed, tmp_path, capsys):
    target = tmp_path / "new" / "all.csv"
    assert compare([str(mixed), "--csv", str(target)]) == 0
    with target.open() as file:
        lines = {line["trial"]: line for line in csv.DictReader(file)}
    assert {"runs/seeds/lr-0.1-seed0", "runs/seeds/lr-0.1-seed1", "runs/digits/blind"} <= set(lines)
    assert lines["runs/digits/parent"]["val/best_accuracy"] == "98.6"
    (tmp_path / "file").write_text("")
    assert compare([str(mixed), "--csv", str(tmp_path / "file" / "all.csv")]) == 2
    assert "all.csv cannot be written" in capsys.readouterr().err
    assert compare([str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_the_index_links_to_everything(mixed, tmp_path, capsys):
    page = tmp_path / "pages" / "index.html"
    (mixed / "digits" / "broken").mkdir()
    (mixed / "digits" / "broken" / "result.json").write_text("{")
    assert compare([str(mixed), "--html", str(page)]) == 0
    text = page.read_text()
    links = re.findall(r'href="(.*?)"', text)
    assert links and all((page.parent / link).exists() for link in links)
    assert "<h2>Left out</h2>" in text and "82.00 ± 2.83" in text and text.count("<table") == 5
    assert text.index("ablation (baseline)") < text.index("cut.mlp-0.1")


def test_seeds_are_merged_only_where_each_has_its_accuracy(mixed):
    rows = collect([mixed / "seeds"]).rows
    assert next(r["trial"] for r in merged(rows)) == "seeds/lr-0.1 (2 seeds)"
    rows[0]["metrics"] = {}
    assert all("seeds)" not in r["trial"] for r in merged(rows))


def test_a_config_that_was_changed_since_is_named(mixed, tmp_path, capsys):
    folder = mixed / "digits" / "changed"
    config = {"optim.lr": 0.5, "scaling.num_workers": 3, "data.root": "elsewhere", "trial": None, "key.of.later": 1}
    run_left_behind(folder, trained(97.0, config={**config, "seed": 0}), optim__lr=0.5)
    assert [row["values"]["optim.lr"] for row in collect([folder]).rows] == [0.5]
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("lr: 0.5", "lr: 0.1"))
    found = collect([folder])
    assert found.rows == [] and "was changed since: it says optim.lr 0.1, and it was 0.5" in found.skipped[0]


def fingerprint_of(train="aa", test="bb", pixels="cc", side=8):
    line = {"a": f"5 {{}} {pixels}"}
    sets = {name: {label: text.format(files) for label, text in line.items()}
            for name, files in (("train", train), ("test", test))}  # fmt: skip
    split = {"seed": 0, "fraction": 0.1, "train": 9, "val": 1, "digest": "dd"}
    return {"side": side, "sample": "-", "sets": sets, "split": split}


def with_data(folder, config=None, **facts):
    run_left_behind(folder, trained(90.0), data__dataset="folder", data__root="flowers", **(config or {}))
    best = folder / "checkpoints" / "best-00001"
    best.mkdir(parents=True)
    (best / "config.json").write_text(json.dumps({"data": fingerprint_of(**facts)}))


def test_other_files_test_sets_and_pixels_are_told_apart_and_other_sides_are_not(tmp_path):
    """Test accuracies on two test sets stood in one ranking; two image sides of the same files were `files 1 of 2`."""
    runs = tmp_path / "runs" / "x"
    with_data(runs / "one")
    with_data(runs / "larger", {"data__img_size": 16}, side=16, pixels="ee")
    with_data(runs / "stretched", {"data__fit": "stretch"}, pixels="ff")
    with_data(runs / "not-decoded", pixels="-")
    group = "folder flowers, 10 % to validate, split 0"
    found = lambda: {row["trial"][2:]: row["group"] for row in collect([runs]).rows}  # noqa: E731
    assert set(found().values()) == {group}
    with_data(runs / "other-test", test="b2")
    assert found()["other-test"] != found()["one"] == found()["larger"] == f"{group}, test set 2 of 2"
    with_data(runs / "other-files", train="a2")
    assert found()["one"] == f"{group}, files 2 of 2, test set 2 of 2" and found()["other-files"].endswith("s 1 of 2")
    with_data(runs / "edited", pixels="c2")
    assert {name: group[-13:] for name, group in found().items() if "pixels" in group} == {
        "one": "pixels 2 of 2", "edited": "pixels 1 of 2", "not-decoded": ", pixels not recorded"[-13:]
    }  # fmt: skip


def test_trials_that_keep_no_model_are_on_the_data_of_their_experiment(mixed):
    write_sealed(mixed / "ablation" / "inputs.json", {"data": {"k": fingerprint_of()}, "models": {}, "config": {}})
    facts = [row["data"]["files"] for row in collect([mixed / "ablation"]).rows]
    assert len(facts) == 2 and len(set(facts)) == 1


def test_a_result_that_is_another_runs_is_named(tmp_path):
    """Two runs of one config on two folders of images: the result of one stood for the other."""
    for name in ("one", "two"):
        run_left_behind(tmp_path / "x" / name, trained(90.0, config={"name": "x", "trial": name, "optim.lr": 1e-3}))
    before = [row["trial"] for row in collect([tmp_path / "x"]).rows]
    (tmp_path / "x" / "two" / "result.json").write_bytes((tmp_path / "x" / "one" / "result.json").read_bytes())
    found = collect([tmp_path / "x"])
    assert before == ["x/one", "x/two"] and [row["trial"] for row in found.rows] == ["x/one"]
    assert "two/result.json is that of run x/one: a copy" in found.skipped[0]


def test_a_baseline_that_is_another_experiments_is_named(tmp_path):
    for name, dense in (("one", 90.0), ("two", 50.0)):
        left_behind(tmp_path / name, space_of(grids=[{"cut.mlp": [0.1]}]), [lost({"cut.mlp": 0.1}, 1.0, dense=dense)],
                    {"val/accuracy": dense, "val/images": 143.0})  # fmt: skip
    (tmp_path / "two" / "baseline.json").write_bytes((tmp_path / "one" / "baseline.json").read_bytes())
    found = collect([tmp_path])
    assert [row["trial"].partition("/")[2] for row in found.rows if row["status"] == "baseline"] == ["one (baseline)"]
    assert any("two/baseline.json is that of another experiment" in sentence for sentence in found.skipped)


def test_nothing_is_evidence_twice(tmp_path, capsys):
    """A folder that was given twice, and one that lies within another, and a copy, stood there as repeats."""
    for name in ("one", "two"):
        run_left_behind(tmp_path / "x" / name, None)
        write_sealed(tmp_path / "x" / name / "result.json", trained(90.0, folder=name))
    x = tmp_path / "x"
    assert [row["trial"] for row in collect([x, x, x / "one", x]).rows] == ["x/one", "x/two"]
    shutil.copytree(x, tmp_path / "y" / "kept")
    found = collect([x, tmp_path])
    assert [row["trial"] for row in found.rows] == ["x/one", "x/two"]
    assert found.skipped == [f"2 results in {tmp_path}/y/kept: copies of those in {x}"]
