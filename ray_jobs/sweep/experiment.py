"""An experiment: what its trials share and how many there are, in its folder's experiment.json."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from mamba.config.keys import current
from mamba.config.schema import RunConfig
from mamba.errors import ConfigError, FolderError, reason
from mamba.runs.files import read_sealed, sealed, to_json, write_sealed
from mamba.runs.folder import exclusive
from mamba.runs.inputs import INPUTS
from ray_jobs.sweep.grid import Trial, check_names
from ray_jobs.sweep.space import MOST_TRIALS, Space
from ray_jobs.sweep.study import check_storage, new_id, study_names

FILE = "experiment.json"


@dataclass(frozen=True)
class Experiment:
    """What experiment.json holds: enough to go on."""

    space: Space
    trials: list[Trial]
    """Of a grid, expanded; empty for a search."""
    config: RunConfig
    """Of all trials, with absolute paths; a trial's is resolved with its own values in it."""
    checkpoint: Path | None
    gpus_per_trial: float | None
    storage: str | None
    count: int
    """Trials in all."""
    id: str | None = field(default_factory=new_id)
    """Of its study; None: from before studies had owners."""
    warm_start: list[dict[str, Any]] | None = None
    """Parameters that a search begins with."""

    @property
    def folder(self) -> Path:
        return self.config.out / self.config.name


def absolute(config: RunConfig) -> RunConfig:
    """A config whose paths hold wherever its trials run."""
    paths: dict[str, Path | None] = {"out": config.out, "data.root": config.data.root}
    paths["data.split_from"] = config.data.split_from
    paths |= {"model.checkpoint": config.model.checkpoint, "distill.teacher": config.distill.teacher}
    return config.with_values({key: path.expanduser().absolute() if path else None for key, path in paths.items()})


def create(experiment: Experiment, words: Sequence[str]) -> Path:
    """Make an experiment's folder, and return it.

    Raises:
        ConfigError: there is one already, or it cannot be written; the study's storage cannot be used, or has a study
            of this name.
    """
    folder = experiment.folder
    if (folder / FILE).exists():
        raise taken(folder)
    check_names(trial.name for trial in experiment.trials)
    if experiment.storage is not None:
        check_storage(experiment.storage)
        if folder.name in study_names(experiment.storage):
            raise ConfigError(
                f"--storage {experiment.storage} holds a study '{folder.name}' already, of another experiment: choose "
                "another --name, or another --storage"
            )
    tree = {
        "space": experiment.space.model_dump(mode="json", by_alias=True),
        "trials": [[t.name, t.values] for t in experiment.trials],
        "config": experiment.config.model_dump(mode="json"),
        "checkpoint": str(experiment.checkpoint) if experiment.checkpoint else None,
        "gpus_per_trial": experiment.gpus_per_trial,
        "storage": experiment.storage,
        "count": experiment.count,
        "id": experiment.id,
        "warm_start": experiment.warm_start,
        "command": shlex.join(["python", *words]),
        "started": datetime.now().isoformat(timespec="seconds"),
    }
    text = to_json(sealed(tree), indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILE).open("x") as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                (folder / FILE).unlink()  # half of it would block the name
                raise
    except FileExistsError:
        raise taken(folder) from None
    except OSError as error:
        raise ConfigError(f"out: the experiment's folder {folder} cannot be written: {reason(error)}") from None
    return folder


def discard_if_unused(folder: Path) -> None:
    """Remove the folder of an experiment that was refused before a trial began, so that its name can be used again."""
    with suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {FILE, INPUTS, "study.db", ".lock", ".ray"}:
            shutil.rmtree(folder, ignore_errors=True)


def taken(folder: Path) -> ConfigError:
    """The refusal of a folder that holds an experiment."""
    return ConfigError(
        f"{folder} holds an experiment already; choose another --name, or continue it with --resume {folder}"
    )


def more_trials(folder: Path, trials: int) -> int:
    """Let a search, finished or not, draw trials until there are so many; returns how many there were to be.

    Raises:
        ConfigError: no search, or fewer trials than there are.
    """
    experiment = load(folder)
    if not experiment.space.search:
        raise ConfigError(f"--trials {trials}: {folder} is a grid, which has its {experiment.count} trials and no more")
    if not experiment.count <= trials <= MOST_TRIALS:
        raise ConfigError(
            f"--trials {trials}: {folder} has {experiment.count} trials to draw; valid: {experiment.count} to "
            f"{MOST_TRIALS:,}"
        )
    tree = read_sealed(folder / FILE)
    with exclusive(folder):
        try:
            write_sealed(folder / FILE, {**tree, "count": trials})
        except OSError as error:
            raise ConfigError(f"the experiment's folder {folder} cannot be written: {reason(error)}") from None
    return experiment.count


def outline(experiment: Experiment) -> str:
    """What would run: the config that trials share, the question, and the trials or where they are drawn from."""
    space, config = experiment.space, experiment.config
    shown = config.with_values(space.fixed)
    with suppress(ConfigError):  # it may be whole with a trial's own values alone
        shown = shown.resolve()
    lines = [shown.to_yaml().rstrip(), f"# {space.question}", f"# cost: {space.cost}"]
    lines += [f"# all trials: {key} {value}" for key, value in space.fixed.items()]
    for trial in experiment.trials:
        lines.append(f"# {trial.name}: {', '.join(f'{key} {value}' for key, value in trial.values.items())}")
    for key, where in space.search.items():
        log, name = ", log scale" if where.log else "", f"1 - {key}" if where.one_minus else key
        drawn = f"one of {where.choices}" if where.choices else f"{where.low:g} to {where.high:g}{log}"
        when = f", when {where.when}" if where.when else ""
        lines.append(f"# {name}: {drawn}{when}")
    lines += [f"# objective: {key} ({mode})" for key, mode in space.objectives.items()]
    return "\n".join([*lines, f"# {experiment.count} trials in {experiment.folder}"])


def load(folder: Path) -> Experiment:
    """Read what `create` wrote; raises ConfigError where there is no experiment, or one that cannot be."""
    try:
        tree = read_sealed(folder / FILE)
        found = Experiment(
            Space.model_validate(tree["space"]),
            [Trial(name, current(values, folder / FILE)) for name, values in tree["trials"]],
            RunConfig.stored(tree["config"], folder / FILE),
            Path(tree["checkpoint"]) if tree["checkpoint"] else None,
            tree["gpus_per_trial"],
            tree["storage"],
            int(tree["count"]),
            tree.get("id"),
            tree.get("warm_start"),
        )
        check_names(trial.name for trial in found.trials)
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no experiment ({FILE} is missing)") from None
    except FolderError as error:
        raise ConfigError(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / FILE} is damaged: {' '.join(str(error).split())}") from None
    return found
