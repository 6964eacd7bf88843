"""How a trained model was trained: the config that its checkpoint keeps, from which prune, tune and ablate start; and
the command that trains on what pruning left."""

from __future__ import annotations

import shlex
from pathlib import Path

from mamba.config.schema import RunConfig
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


def train_on(folder: Path, model: Path, config: RunConfig) -> str:
    """The command that trains a pruned model on, with the data and the recipe of the folder that it was pruned in, whose
    config it is, and without what pruned it there."""
    off = {}
    if config.prune.method != "none":
        off["--prune.method"] = "none"
    if config.penalty.kind != "off":
        off["--penalty.kind"] = "off"
    words = ["python", "ray_jobs/train.py", "--config", str(folder / "config.yaml"), "--model.checkpoint", str(model)]
    return shlex.join([*words, *(word for pair in off.items() for word in pair), "--name", "tuned"])
