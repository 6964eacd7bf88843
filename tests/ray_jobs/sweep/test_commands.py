"""The commands of sweeps up to the moment in which trials would start."""

from __future__ import annotations

import json
import shutil

import pytest

from ray_jobs.ablate import main as ablate
from ray_jobs.prune import main as prune
from ray_jobs.train import main as train
from ray_jobs.tune import main as tune


@pytest.mark.parametrize(
    "script, words, lines",
    [
        (tune, ["--space", "recipe"], ["# model.drop_path: 0 to 0.3", "# 1 - ema.decay: 1e-05 to 0.01, log scale"]),
        (tune, ["--space", "model_family"], ["# mixer-forward-seed0: model.mixer forward, seed 0"]),
        (ablate, ["--preset", "quickstart", "--grid", "layers"], ["# 4 trials in "]),
        (ablate, ["--grid", "joint", "--checkpoint", "CHECKPOINT"], ["# 3 trials in ", "cut.mlp 0.7"]),
        (ablate, ["--checkpoint", "CHECKPOINT"], [f"# {28 + 2 + 3} trials in "]),
    ],
)
def test_a_dry_run_says_what_would_run_and_leaves_nothing(trained, tmp_path, capsys, script, words, lines):
    words = [str(trained) if word == "CHECKPOINT" else word for word in words]
    assert script([*words, "--dry-run", "--out", str(tmp_path / "runs"), "--name", "dry"]) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in lines), said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "script, words, message",
    [
        (tune, [], "--space is missing"),
        (tune, ["--space", "nowhere"], "no search space nowhere"),
        (tune, ["--space", "pruning"], "give --checkpoint"),
        (tune, ["--space", "model_family", "--trials", "3"], "--trials, --storage and --warm-start are of searches"),
        (tune, ["--space", "model_family", "--checkpoint", "CHECKPOINT"], "has no effect beside model.checkpoint"),
        (tune, ["--space", "quickstart", "--warm-start", "/nowhere"], "/nowhere holds no experiment"),
        (tune, ["--space", "quickstart", "--data.val-fraction", "0"], "data.val_fraction 0 leaves no image"),
        (tune, ["--space", "quickstart", "--trials", "many"], "--trials many: a whole number is needed"),
        (tune, ["--space", "quickstart", "--trials", "0"], "--trials 0 is not possible; valid: 1 to 10,000"),
        (ablate, ["--gpus-per-trial", "half"], "--gpus-per-trial half: a number is needed"),
        (
            ablate,
            ["--grid", "everything", "--checkpoint", "CHECKPOINT"],
            "unknown grid 'everything'; valid:",
        ),
        (ablate, ["--checkpoint", "/nowhere"], "there is no /nowhere"),
        (ablate, ["--resume", "/nowhere"], "--resume /nowhere: there is no such folder"),
    ],
)
def test_bad_input_is_named_before_anything_starts(trained, tmp_path, capsys, script, words, message):
    words = [str(trained) if w == "CHECKPOINT" else w for w in words]
    assert script([*words, *([] if "--resume" in words else ["--out", str(tmp_path / "runs")])]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "script, words, key",
    [
        (train, ["--model.checkpoint", "CHECKPOINT"], "model.checkpoint"),
        (train, ["--distill.teacher", "CHECKPOINT"], "distill.teacher"),
        (prune, ["--plan", "stage2", "--checkpoint", "CHECKPOINT"], "model.checkpoint"),
        (prune, ["--method", "refill", "--rounds", "1", "--checkpoint", "CHECKPOINT"], "model.checkpoint"),
        (ablate, ["--checkpoint", "CHECKPOINT"], "--checkpoint"),
        (tune, ["--space", "pruning", "--checkpoint", "CHECKPOINT"], "--checkpoint"),
        (tune, ["--space", "quickstart", "--checkpoint", "CHECKPOINT"], "model.checkpoint"),
        (tune, ["--space", "quickstart", "--distill.teacher", "CHECKPOINT"], "distill.teacher"),
    ],
)
@pytest.mark.parametrize("other", ["order", "names", "split"])
def test_every_command_compares_a_trained_model_with_the_data(
    trained_on_digits, tmp_path, capsys, script, words, key, other
):
    """Before anything starts: its classes, their order, and which images it was trained on."""
    run = shutil.copytree(trained_on_digits, tmp_path / "trained")
    for file in run.glob("checkpoints/*/config.json"):
        tree = json.loads(file.read_text())
        del tree["checksum"]
        if other == "order":
            tree["classes"][3], tree["classes"][5] = tree["classes"][5], tree["classes"][3]
        elif other == "names":
            tree["classes"][3] = "owl"
        file.write_text(json.dumps(tree))
    words = [str(run) if word == "CHECKPOINT" else word for word in words]
    words += ["--data.split-seed", "7"] if other == "split" else []
    assert script([*words, "--out", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    gist = {
        "order": "in another order: number 3 is",
        "names": "without owl and with",
        "split": "would validate on images",
    }
    assert said.startswith(f"error: {key} {run} ") and gist[other] in said, said
    assert not list((tmp_path / "runs").glob("**/*.json")), "a folder blocks the name"
    assert not list((tmp_path / "runs").glob("*/*/")), "a run or a trial had begun"
