"""prune.py, for real: rounds in this process and under Ray, killed and continued, plans, and bad input."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mamba.runs import checkpoint as ckpt
from ray_jobs.launch.recipe import cut_again, recipe_of
from ray_jobs.prune import main
from ray_jobs.report.collect import collect
from ray_jobs.sweep.shared import Shared
from ray_jobs.sweep.trial import run_trial
from ray_jobs.train import main as train_main

ROOT = Path(__file__).parent.parent.parent
FAST = [
    *("--model.d-model", "12", "--model.depth", "2", "--model.d-state", "4", "--data.batch-size", "128"),
    *("--optim.warmup-epochs", "1", "--optim.epochs", "2"),
]
LOCAL = ["--scaling.num-workers", "0"]


@pytest.fixture(autouse=True)
def _a_cluster_of_its_own(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model trained for two epochs of digits."""
    out = tmp_path_factory.mktemp("trained")
    assert train_main([*FAST, *LOCAL, "--out", str(out), "--trial", "one"]) == 0
    return out / "quickstart" / "one"


def pictures(folder):
    """Tags of the images in a run's TensorBoard file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events*")
    return EventAccumulator(str(file)).Reload().Tags()["images"]


def rows(folder):
    with (folder / "rounds.csv").open() as file:
        return list(csv.DictReader(file))


def dry_run_of(command, capsys):
    """What the command that prune.py prints at its end would do."""
    assert command.startswith("python ray_jobs/train.py ")
    assert train_main([*shlex.split(command)[2:], "--dry-run"]) == 0
    return capsys.readouterr().out


def test_rounds_from_a_trained_model(trained, tmp_path, capsys):
    words = ["--method", "refill", "--target", "mlp", "--rate", "0.5", "--rounds", "1", "--checkpoint", str(trained)]
    assert main([*words, *LOCAL, "--optim.epochs", "1", "--out", str(tmp_path), "--trial", "one"]) == 0
    folder = tmp_path / "prune" / "one"
    dense, pruned = rows(folder)
    assert float(dense["val_accuracy"]) == pytest.approx(
        json.loads((trained / "result.json").read_text())["metrics"]["val/best_accuracy"]
    )
    assert dense["test_accuracy"] == "" and float(pruned["test_accuracy"]) >= 0
    assert float(pruned["density"]) == 0.5 and int(pruned["params"]) < int(dense["params"])
    out = capsys.readouterr().out
    assert (
        (folder / "rounds.png").exists()
        and str(folder / "rounds.csv") in out
        and "% validation, " in out
        and "test accuracy of the last round, read once" in out
    )
    assert (
        "what was cut, layer by layer" in out and "mlp:neuron" in out and str(folder / "round-01" / "cut.json") in out
    )
    model, _ = ckpt.load_model(str(folder / "round-01" / "pruned"))
    kept = [row["kept"] for row in json.loads((folder / "round-01" / "cut.json").read_text())["rows"]]
    assert [b.mlp_hidden for b in model.architecture.blocks] == kept[-2:]
    again = dry_run_of(out.partition("train it on: ")[2].splitlines()[0], capsys)
    assert f"# parameters: {int(pruned['params']):,}" in again
    assert "batch_size: 128" in again and "method: none" in again, "the recipe of the rounds, without them"
    assert model.architecture.blocks[0].mlp_hidden < 48 and model.architecture.blocks[0].d_inner == 24
    assert main(["--resume", str(folder)]) == 0, "a finished series shows its table again"


@pytest.mark.parametrize(
    "values",
    [
        {"cut.mlp": 0.5, "cut.linear_out": 0.25, "cut.structured": True, "cut.repair": True, "seed": 3},
        {"cut.mlp": 0.7, "cut.criterion": "random", "cut.scope": "layerwise", "seed": 5},
    ],
)
def test_the_cut_of_a_trial_is_made_again_as_a_model(trained, tmp_path, capsys, values):
    config = recipe_of(trained).with_values({"out": tmp_path, "name": "sweep", **values})
    (tmp_path / "sweep").mkdir()
    shared = Shared("measure", tmp_path / "sweep", config.model_dump(mode="json"), trained, 1, 1, False)
    found = run_trial(shared, "a", values, lambda report: None)["metrics"]
    words = shlex.split(cut_again(trained, config))
    assert words[:2] == ["python", "ray_jobs/prune.py"]
    assert main([*words[2:], *LOCAL, "--out", str(tmp_path), "--trial", "p"]) == 0
    assert "mlp 0." in capsys.readouterr().out
    report = json.loads((tmp_path / "prune" / "p" / "pruned.json").read_text())
    for key in ("val/accuracy", "val/loss", "model/params", "model/macs"):
        assert report["after"].get(key, found[key]) == found[key], key
    made, _ = ckpt.load_model(tmp_path / "prune" / "p")
    assert sum(p.numel() for p in made.parameters()) == found["model/params"]


def test_a_plan_and_fine_tuning_after_it(trained, tmp_path, capsys):
    assert main(["--plan", "stage2", "--checkpoint", str(trained), *LOCAL, "--out", str(tmp_path), "--trial", "p"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "prune" / "p"
    report = json.loads((folder / "pruned.json").read_text())
    assert "what was cut, layer by layer" in out and str(folder / "cut.json") in out and "linear_gate:element" in out
    assert pictures(folder) == ["prune/cut"]
    assert "test accuracy" not in out and "test/accuracy" not in {**report["before"], **report["after"]}
    for words in ("validation accuracy", "parameters", "MACs", "zeros among", "latency", "throughput", "peak memory"):
        assert words in out
    assert report["after"]["model/params"] < report["before"]["model/params"]
    again = dry_run_of(out.partition("fine-tune it: ")[2].splitlines()[0], capsys)
    assert f"# parameters: {int(report['after']['model/params']):,}" in again
    assert "batch_size: 128" in again and "name: tuned" in again, "the recipe of the model, not the quickstart's"
    start = str(folder / "checkpoints" / "best-00000")
    words = [*FAST[6:], *LOCAL, "--out", str(tmp_path), "--trial", "t"]
    assert train_main([*words, "--model.checkpoint", start]) == 0
    capsys.readouterr()
    assert train_main([*words, "--model.checkpoint", start, "--dry-run"]) == 0
    assert f"# parameters: {int(report['after']['model/params']):,}" in capsys.readouterr().out
    assert train_main([*words, "--model.checkpoint", start, "--model.d-model", "8"]) == 2
    assert "leave out --model.d_model" in capsys.readouterr().err
    tuned, _ = ckpt.load_model(tmp_path / "quickstart" / "t")
    pruned, about = ckpt.load_model(folder)
    assert "metrics" not in about, "what the dense model had"
    assert tuned.architecture == pruned.architecture
    zeros = [int((b.ssm.in_proj.weight == 0).sum()) for b in tuned.blocks]
    assert zeros == [int((b.ssm.in_proj.weight == 0).sum()) for b in pruned.blocks] and min(zeros) > 0


def test_rsst_of_a_plan_trains_under_the_penalty_first_then_cuts(trained, tmp_path, capsys):
    words = ["--plan", "stage1", "--checkpoint", str(trained), *LOCAL, "--out", str(tmp_path), "--trial", "p"]
    words += ["--penalty.kind", "rows", "--penalty.strength", "0.05", "--penalty.exponent", "0", "--optim.epochs", "1"]
    words += ["--optim.warmup-epochs", "0"]
    assert main([*words, "--dry-run"]) == 0
    assert "after a training under penalty.kind rows" in capsys.readouterr().out
    assert main(words) == 0
    folder = tmp_path / "prune" / "p"
    said = " ".join(capsys.readouterr().out.split())
    assert json.loads((folder / "penalty" / "result.json").read_text())["status"] == "finished"
    last = json.loads((folder / "penalty" / "result.json").read_text())["metrics"]["val/accuracy"]
    assert "before training" in said and "and cut both" in said
    assert "before: the model that was given, before 1 epoch under penalty.kind rows; a ratio is of that" in said
    assert f"what was cut had {last:.2f} % after that training" in said
    names = [r["trial"] for r in collect([folder]).rows if r["path"] == folder]
    assert names == ["p (before 1 epoch under penalty.kind rows)", "p (1 epoch under penalty.kind rows, then stage1)"]
    (epoch,) = (json.loads(x) for x in (folder / "penalty" / "metrics.jsonl").read_text().splitlines())
    assert epoch["prune/penalty_strength"] == pytest.approx(0.05)
    before, after = (ckpt.load_model(path, weights="raw")[0] for path in (trained, folder / "penalty"))
    cut, _ = ckpt.load_model(folder)
    norms = [sum(float(b.mlp.fc1.weight.detach().norm(dim=1).sum()) for b in m.blocks) for m in (before, after)]
    assert norms[1] < norms[0]
    kept = cut.blocks[0].mlp.fc1.weight != 0
    assert 0 < int(kept.sum()) < kept.numel()
    assert bool((cut.blocks[0].mlp.fc1.weight == after.blocks[0].mlp.fc1.weight)[kept].all()), "cut before it trained"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--method", "refil"], "prune.method: should be"),
        (["--rate", "1.5"], "prune.rate: should be less than 1"),
        (["--method", "none"], "prunes nothing"),
        (["--plan", "stage9", "--checkpoint", "CHECKPOINT"], "unknown plan 'stage9'; valid: stage1"),
        (["--plan", "stage2"], "give --checkpoint"),
        (["--plan", "own", "--checkpoint", "CHECKPOINT"], "cut.*: nothing is cut"),
        (["--plan", "own", "--checkpoint", "CHECKPOINT", "--cut.stem", "0.5"], "stem"),
        (
            ["--plan", "own", "--checkpoint", "CHECKPOINT", "--cut.mlp", "0.5", "--cut.finetune-epochs", "2"],
            "no effect",
        ),
        (
            ["--plan", "own", "--checkpoint", "CHECKPOINT", "--cut.mlp", "0.5", "--cut.gate-elements", "True"],
            "no effect",
        ),
        (["--plan", "stage2", "--checkpoint", "CHECKPOINT", "--penalty.strength", "1e-3"], "no effect in a plan"),
        (["--plan", "stage2", "--checkpoint", "CHECKPOINT", "--rate", "0.5", "--dry-run"], "--prune.rate 0.5 has no"),
        (["--plan", "stage2", "--checkpoint", "CHECKPOINT", "--cut.mlp", "0.5"], "--cut.mlp 0.5 has no effect"),
        (["--plan", "stage1", "--checkpoint", "CHECKPOINT", "--optim.epochs", "1"], "prune.py --plan --penalty.kind"),
        (["--checkpoint", "/nowhere"], "there is no /nowhere"),
        (["--checkpoint", "CHECKPOINT", "--preset", "v2", "--data.dataset", "digits"], "at 8 pixels"),
        (["--fillback", "0.1"], "unknown key 'fillback'"),
        (["--resume", "CHECKPOINT", "--rate", "0.3"], "leave out --prune.rate"),
    ],
)
def test_bad_input_is_named_before_anything_starts(trained, tmp_path, capsys, words, message):
    words = [str(trained) if w == "CHECKPOINT" else w for w in words]
    if "--resume" not in words:
        words = [*words, *LOCAL, "--out", str(tmp_path / "runs")]
    if message == "at 8 pixels":
        words = [w.replace("digits", "folder") for w in words] + ["--data.root", str(tmp_path / "none")]
        message = "data.root"
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_plan_gives_no_advice_that_it_does_not_take(trained, tmp_path, capsys, dry):
    """It said to set model.new_size, which a plan refuses."""
    words = ["--plan", "stage2", "--checkpoint", str(trained), "--data.img-size", "16", "--out", str(tmp_path / "runs")]
    assert main([*words, *LOCAL, *dry]) == 2
    told = capsys.readouterr().err
    assert "is for 10 classes at 8 pixels, and the data has 10 classes at 16 pixels" in told and "set " not in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_a_killed_series_goes_on_where_it_was(tmp_path):
    words = ["--method", "rsst", "--rounds", "1", "--rate", "0.4", "--optim.epochs", "12", "--data.batch-size", "32"]
    command = [sys.executable, "ray_jobs/prune.py", *FAST[:6], *LOCAL, *words, "--out", str(tmp_path), "--trial", "one"]
    driver = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    folder = tmp_path / "prune" / "one"
    ends = time.monotonic() + 150
    while not list((folder / "round-01" / "checkpoints").glob("step-*")):
        assert time.monotonic() < ends and driver.poll() is None
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    first = (folder / "round-00" / "result.json").stat().st_mtime_ns
    before = [json.loads(x)["epoch"] for x in (folder / "round-01" / "metrics.jsonl").read_text().splitlines()]
    assert before and before[-1] < 12, "it was over before it was killed"
    done = subprocess.run(
        [sys.executable, "ray_jobs/prune.py", "--resume", str(folder), *LOCAL],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "round-00" / "result.json").stat().st_mtime_ns == first, "round 0 was trained again"
    epochs = [json.loads(x)["epoch"] for x in (folder / "round-01" / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, 13))
    assert "epoch 1/12" not in done.stdout and "round-01: training in this process" in done.stdout
    lambdas = [json.loads(x) for x in (folder / "round-01" / "metrics.jsonl").read_text().splitlines()]
    assert [m["prune/lambda"] for m in lambdas] == pytest.approx([0.1 * e / 6 for e in range(1, 7)] + [0] * 6)
    assert len(rows(folder)) == 2


def test_a_dry_run_says_its_rounds_and_checks_its_plan(trained, capsys):
    words = ["--method", "refill", "--rate", "0.5", "--rounds", "2", *LOCAL, "--dry-run"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "# round 0: dense, trains" in out and "# round 2: refill, 25.0 % of the weights of prune.target both" in out
    assert main([*words, "--checkpoint", str(trained)]) == 0
    assert "# round 0: dense, the model as it is, not trained" in capsys.readouterr().out
    assert main(["--plan", "stage9", "--checkpoint", str(trained), "--dry-run"]) == 2
    assert "unknown plan 'stage9'" in capsys.readouterr().err
    assert main(["--plan", "stage2", "--checkpoint", str(trained), "--dry-run"]) == 0
    assert "# plan stage2: whole units" in capsys.readouterr().out
    assert main(["--method", "none", "--dry-run"]) == 2
    assert "prunes nothing" in capsys.readouterr().err
