"""How a trained model was trained: the config that its checkpoint keeps, from which prune, tune and ablate start; and
the commands that make a trial's cut again and train on what pruning left."""

from __future__ import annotations

import shlex
from pathlib import Path

from mamba.config.cli import TrainArgs
from mamba.config.schema import CutConfig, RunConfig
from mamba.errors import ConfigError


def recipe_of(path: Path) -> RunConfig:
    """The config of the run that a checkpoint is from, without the place where that run's results went.

    Raises:
        CheckpointError: there is none, or its description is damaged.
        ConfigError: its description says nothing of how it was trained.
    """
    from mamba.runs.checkpoint import find_checkpoint, read_description  # not above: imports torch

    folder = find_checkpoint(path)
    tree = read_description(folder).get("config")
    if tree is None:
        raise ConfigError(f"{folder} does not say how it was trained: give --preset, or the data.* keys with one")
    recipe = RunConfig.stored(tree, folder).with_values({"out": RunConfig().out, "prune.round": 0})
    if recipe.data.split_from is not None:  # it is this model's own by now
        recipe = recipe.with_values({"data.split_from": None, "data.split_seed": None, "data.val_fraction": None})
    return recipe


def to_train(args: TrainArgs) -> RunConfig:
    """The config that train.py was asked for. A file of a series of rounds beside a trained model is taken for the
    recipe that it holds, so that what the rounds left is trained on as it was in them."""
    if "model.checkpoint" in args.given and not {"prune.method", "prune.round"} & set(args.given):
        return args.config.with_values({"prune.method": "none", "prune.round": 0})
    return args.config


def cut_again(checkpoint: Path, config: RunConfig) -> str:
    """The command that cuts a model as a trial's config says, and writes what is left."""
    words = ["python", "ray_jobs/prune.py", "--plan", "own", "--checkpoint", str(checkpoint)]
    usual, own = CutConfig().model_dump(), config.cut.model_dump()
    for key, value in own.items():
        if value != usual[key] and key != "finetune_epochs":
            words += [f"--cut.{key}", str(value)]
    if config.cut.repair or config.cut.criterion not in ("l1", "l2"):  # something in it is random
        words += ["--seed", str(config.seed)]
    return shlex.join(words)


def train_on(folder: Path, model: Path, config: RunConfig) -> str:
    """The command that trains a pruned model on, with the data and the recipe of the folder that it was pruned in (its
    config is `config`), and without the penalty there."""
    words = ["python", "ray_jobs/train.py", "--config", str(folder / "config.yaml"), "--model.checkpoint", str(model)]
    off = ["--penalty.kind", "off"] if config.penalty.kind != "off" and config.penalty.strength else []
    return shlex.join([*words, *off, "--name", "tuned"])
