"""A command says first what it is about to do, and, stopped, what continues it."""

from __future__ import annotations

import shlex

import pytest

from mamba.config.cli import parse_ablate_args, parse_prune_args, parse_train_args
from mamba.config.schema import RunConfig
from ray_jobs.ablate import main as ablate
from ray_jobs.launch.ending import exit_code, how_to_continue
from ray_jobs.launch.intent import intent
from ray_jobs.prune import main as prune
from ray_jobs.train import main as train
from ray_jobs.tune import main as tune


def recipe(path):
    return RunConfig()


@pytest.mark.parametrize(
    "parse, words, said",
    [
        (parse_train_args, "", "training a new model (preset quickstart) on digits for 20 epochs; all that can be "
         "changed: --help"),
        (parse_train_args, "--data.dataset folder --data.root photos --optim.epochs 1",
         "training a new model (preset quickstart) on the images in photos for 1 epoch"),
        (parse_prune_args, "", "pruning a new model (preset quickstart): 3 rounds of refill, each of 20 % of the "
         "weights left, with 20 epochs of training on digits in each and before the first; of a trained model: "
         "--checkpoint RUN; all that can be changed: --help"),
        (parse_prune_args, "--checkpoint a/b --ssm-rate 0.4 --rounds 1", "pruning the model of a/b: 1 round of refill, "
         "each of 40 % of the mixers' and 20 % of the MLPs' weights left, with 300 epochs of training on cifar10 in "
         "each"),
        (parse_prune_args, "--plan stage1 --checkpoint a/b", "pruning the model of a/b once, by the plan stage1"),
        (parse_ablate_args, "", "training a new model (preset quickstart) on digits for 20 epochs first, then cutting "
         "it in every way of all grids, on digits; of a trained model: --checkpoint RUN; all that can be changed: "
         "--help"),
        (parse_ablate_args, "--grid layers --checkpoint a/b", "cutting the model of a/b in every way of the grid "
         "layers, on cifar10"),
    ],
)  # fmt: skip
def test_what_is_said(parse, words, said):
    more = {} if parse is parse_train_args else {"recipe_of": recipe}
    assert intent(parse(words.split(), **more)) == said


LATER = {
    train: "ray_jobs.launch.run.run",
    prune: "ray_jobs.launch.series.run_rounds",
    ablate: "ray_jobs.sweep.baseline.run",
    tune: "ray_jobs.report.outcome.run",
}
"""What takes long in each command."""


@pytest.mark.parametrize("main", LATER, ids=lambda main: main.__module__)
def test_said_before_anything_else_and_continued_by_the_command_named(main, tmp_path, monkeypatch, capsys):
    before = []

    def stopped(*_args, **_options):
        before.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    monkeypatch.setattr(LATER[main], stopped)
    words = ["--scaling.num-workers", "0", "--out", str(tmp_path)]
    words += ["--space", "quickstart"] if main is tune else []
    monkeypatch.setattr("sys.argv", ["ray_jobs/x.py", *words])
    assert main(words) == 130
    err = capsys.readouterr().err
    assert main is tune or (before[0].split()[0] in ("training", "pruning") and "--help" in before[0].splitlines()[0])
    command = err.split("continue from the last checkpoint with\n  python ")[1].strip()
    if main is ablate:  # its model's training: the same words again
        assert command == shlex.join(["ray_jobs/x.py", *words])
    else:
        (folder,) = tmp_path.rglob("experiment.json" if main is tune else "config.yaml")
        assert command == f"ray_jobs/{main.__module__.removeprefix('ray_jobs.')}.py --resume {folder.parent}"


def test_nothing_is_named_that_was_not_begun(capsys):
    def stop():
        raise KeyboardInterrupt

    assert exit_code(stop, "stopped") == 130 and capsys.readouterr().err == "stopped\n"
    assert "give the same command again" in how_to_continue()
