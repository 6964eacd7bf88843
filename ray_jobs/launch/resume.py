"""What --resume means: which command continues a folder, and a run that trains for more epochs than it had."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from mamba.config.schema import RunConfig
from mamba.errors import CheckpointError, ConfigError, FolderError
from mamba.runs.checkpoint import load_training_state, newest_checkpoint
from mamba.runs.files import read_json, unwritable
from mamba.runs.folder import RESULT, older_trial, read_config, write_config
from mamba.train.schedule import learning_rate

EXPERIMENT = "experiment.json"


def check_run(folder: Path) -> None:
    """Raises ConfigError where a folder is not that of one run of train.py, with the command that continues it."""
    if (folder / EXPERIMENT).exists():
        raise ConfigError(f"{folder} is an experiment: continue it with {_sweep_command(folder)}")
    series = folder.parent if (folder.parent / "rewind").exists() or folder.name.startswith("round-") else folder
    if (series / "round-00").exists():
        command = f"python ray_jobs/prune.py --resume {series}"
        raise ConfigError(f"{series} is a series of pruning rounds: continue it with {command}")
    if (folder.parent / EXPERIMENT).exists() or (folder / "trial.json").exists() or _older_trial(folder):
        raise ConfigError(f"{folder} is a trial of an experiment: continue it with {_sweep_command(folder.parent)}")
    if (folder / "pruned.json").exists():
        raise ConfigError(
            f"{folder} is what a plan left of a model, no run: train it on with ray_jobs/train.py --model.checkpoint"
        )


def is_longer(folder: Path, config: RunConfig) -> bool:
    """Whether a config asks for more epochs than its run had; raises ConfigError where for fewer."""
    before, after = read_config(folder).optim.epochs, config.optim.epochs
    if after < before:
        raise ConfigError(f"optim.epochs {after}: a run can only be extended, and {folder} has {before}; give more")
    return after > before


def extend(folder: Path, config: RunConfig) -> str:
    """Let a run train for the greater number of epochs that `config` says; returns what to say.

    The learning rate follows the schedule of the new length from the run's current epoch on. What a finished run had
    come to stays in result-N.json, N being its epochs.

    Raises:
        ConfigError: the folder cannot be written to.
        CheckpointError: a finished run without a training state.
    """
    old = read_config(folder)
    before, after = old.optim.epochs, config.optim.epochs
    newest = newest_checkpoint(folder)
    finished = folder / RESULT
    if newest is None:
        if finished.exists():
            raise CheckpointError(f"{folder} keeps no training state to go on from (checkpoints/step-N)")
        done, steps = 0, 1
    else:
        state = load_training_state(newest)
        done, steps = state["epoch"], max(1, state["train_images"] // config.data.batch_size)
    try:
        if finished.exists():  # first: cut short here, the run finishes again as it was
            finished.rename(folder / f"result-{before}.json")
        write_config(folder, config)
    except (OSError, FolderError) as error:
        raise ConfigError(str(error if isinstance(error, FolderError) else unwritable(folder, error))) from None
    last, now = (learning_rate(c.optim, s, steps) for c, s in ((old, max(0, done * steps - 1)), (config, done * steps)))
    return (
        f"extended from {before} to {after} epochs: from epoch {done + 1} on the learning rate follows the schedule of "
        f"{after} epochs, which is at {now:.3g} there; it was at {last:.3g}, and is not what {after} epochs from the "
        "start would have been"
    )


def _older_trial(folder: Path) -> bool:
    with suppress(FolderError):
        return older_trial(folder) is not None
    return False


def _sweep_command(experiment: Path) -> str:
    words = ""
    with suppress(OSError, FolderError):
        words = str(read_json(experiment / EXPERIMENT).get("command", ""))
    script = "ablate.py" if "ablate" in words else "tune.py"
    return f"python {os.path.join('ray_jobs', script)} --resume {experiment}"
