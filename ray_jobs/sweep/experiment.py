"""An experiment: its folder, what its trials share, and running it to the end or on from where it was."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mamba.config.keys import current
from mamba.config.schema import RunConfig
from mamba.data.registry import load_data
from mamba.errors import ConfigError
from mamba.runs.folder import exclusive
from mamba.runs.start import check_start
from ray_jobs.launch.cluster import Cluster, connected
from ray_jobs.launch.console import SweepDisplay
from ray_jobs.sweep.results import baseline_of, read_trial, rows, write_baseline, write_trial
from ray_jobs.sweep.search import GridTrials, Resources, StudyTrials, open_study, run_sweep
from ray_jobs.sweep.space import Space, Trial
from ray_jobs.sweep.trial import Shared, time_trials

__all__ = ["Experiment", "baseline_of", "create", "load", "outline", "rows", "run"]

FILE = "experiment.json"
MEASURES_PER_GPU = 4
"""Measure trials that share a GPU unless told otherwise."""


@dataclass(frozen=True)
class Experiment:
    """What experiment.json holds: enough to go on."""

    space: Space
    trials: list[Trial]
    """Of a grid, expanded; empty for a search."""
    config: RunConfig
    checkpoint: Path | None
    gpus_per_trial: float | None
    storage: str | None
    count: int
    """Trials in all."""

    @property
    def folder(self) -> Path:
        return self.config.out / self.config.name


def create(experiment: Experiment, words: Sequence[str]) -> Path:
    """Make an experiment's folder, and return it.

    Raises:
        ConfigError: there is one already, or it cannot be written.
    """
    folder = experiment.folder
    tree = {
        "space": experiment.space.model_dump(mode="json", by_alias=True),
        "trials": [[t.name, t.values] for t in experiment.trials],
        "config": experiment.config.model_dump(mode="json"),
        "checkpoint": str(experiment.checkpoint) if experiment.checkpoint else None,
        "gpus_per_trial": experiment.gpus_per_trial,
        "storage": experiment.storage,
        "count": experiment.count,
        "command": shlex.join(["python", *words]),
        "started": datetime.now().isoformat(timespec="seconds"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILE).open("x") as file:
            file.write(json.dumps(tree, indent=1) + "\n")
    except FileExistsError:
        raise taken(folder) from None
    except OSError as error:
        raise ConfigError(f"out: the experiment's folder {folder} cannot be written: {error}") from None
    return folder


def taken(folder: Path) -> ConfigError:
    """The refusal of a folder that holds an experiment."""
    return ConfigError(
        f"{folder} holds an experiment already; choose another --name, or continue it with --resume {folder}"
    )


def outline(experiment: Experiment) -> str:
    """What would run: the config that trials share, the question, and the trials or where they are drawn from."""
    space, config = experiment.space, experiment.config
    lines = [config.to_yaml().rstrip(), f"# {space.question}", f"# cost: {space.cost}"]
    lines += [f"# all trials: {key} {value}" for key, value in space.fixed.items()]
    for trial in experiment.trials:
        lines.append(f"# {trial.name}: {', '.join(f'{key} {value}' for key, value in trial.values.items())}")
    for key, where in space.search.items():
        log, name = ", log scale" if where.log else "", f"1 - {key}" if where.one_minus else key
        drawn = f"one of {where.choices}" if where.choices else f"{where.low:g} to {where.high:g}{log}"
        lines.append(f"# {name}: {drawn}")
    lines += [f"# objective: {key} ({mode})" for key, mode in space.objectives.items()]
    return "\n".join([*lines, f"# {experiment.count} trials in {experiment.folder}"])


def load(folder: Path) -> Experiment:
    """Read what `create` wrote; raises ConfigError where there is no experiment."""
    try:
        tree = json.loads((folder / FILE).read_text())
        return Experiment(
            Space.model_validate(tree["space"]),
            [Trial(name, current(values, folder / FILE)) for name, values in tree["trials"]],
            RunConfig.stored(tree["config"], folder / FILE),
            Path(tree["checkpoint"]) if tree["checkpoint"] else None,
            tree["gpus_per_trial"],
            tree["storage"],
            tree["count"],
        )
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no experiment ({FILE} is missing)") from None
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder / FILE} is damaged: {error}") from None


def resources(experiment: Experiment, cluster: Cluster) -> Resources:
    """What a trial holds, so that concurrent ones never wait for each other's workers.

    Raises:
        ConfigError: more than the cluster has.
    """
    workers = experiment.config.scaling.num_workers or 1
    share = experiment.gpus_per_trial
    if experiment.space.kind == "train" and workers > 1:
        needed = workers if cluster.gpus else workers * (experiment.config.scaling.cpus_per_worker or 1)
        there = cluster.gpus or cluster.cpus
        if needed > there:
            raise ConfigError(f"scaling.num_workers {workers} needs {needed} GPUs or CPUs and the cluster has {there}")
        return Resources(0, 0.0, there // needed)  # only as many as have all their workers
    if cluster.gpus:
        default = 1.0 / MEASURES_PER_GPU if experiment.space.kind == "measure" else 1.0
        share = default if share is None else share
        if not 0 < share <= cluster.gpus:
            raise ConfigError(f"--gpus-per-trial {share:g} is not within the cluster's {cluster.gpus} GPUs")
        fit = int(1 / share) * cluster.gpus if share <= 1 else cluster.gpus // math.ceil(share)
        cpus = max(1, cluster.cpus // fit) if experiment.space.kind == "train" else 1
        return Resources(min(cpus, cluster.cpus), share, max(1, min(fit, cluster.cpus)))
    if share:
        raise ConfigError(f"--gpus-per-trial {share:g}: the cluster has no GPU")
    return Resources(1, 0.0, cluster.cpus)


def run(folder: Path, say: Callable[[str], None], settled: Callable[[], None]) -> tuple[bool, list[dict[str, Any]]]:
    """Run what is left of the experiment in `folder`; `settled` is called whenever a trial has left its result.

    Returns:
        whether it ran to its end (False: interrupted), and a row for every trial that has a result.

    Raises:
        ForgeError: with a sentence for the user, before trials start.
    """
    experiment = load(folder)
    config = experiment.config
    data = load_data(config.data, config.seed)
    if experiment.checkpoint is not None:
        check_start(experiment.checkpoint, len(data.classes), data.side)
        if data.val is None:
            raise ConfigError("data.val_fraction 0 leaves no validation images to measure on")
    with exclusive(folder), connected(say) as cluster:
        held = resources(experiment, cluster)
        shared = Shared(
            experiment.space.kind,
            folder,
            config.model_dump(mode="json"),
            data,
            experiment.checkpoint,
            int(held.cpus) or config.scaling.cpus_per_worker or 1,
            config.scaling.num_workers or 1,
            cluster.gpus > 0,
            compared(experiment),
        )
        search = _search(experiment, folder)
        done = len(rows(folder))
        kind = f"{held.gpus:g} GPU" if held.gpus else f"{int(held.cpus)} CPU"
        kind = kind if held.cpus else f"{shared.workers} workers"
        say(
            f"{experiment.space.question}\n"
            f"{experiment.count} trials, {done} done, {held.concurrent} at once ({kind} each)"
        )
        with SweepDisplay(
            experiment.count, rows(folder), next(iter(experiment.space.objectives), "val/accuracy")
        ) as display:

            def changed(name: str, result: dict[str, Any]) -> None:
                display.changed(name, result)
                if result["status"] != "running":
                    settled()

            def stopping() -> None:
                say(f"stopping; results so far are kept: continue with --resume {folder}")

            ended = run_sweep(shared, experiment.space, search, held, experiment.count, changed, stopping)
        if ended and experiment.space.kind == "measure":
            _time(shared, say)
    return ended, rows(folder)


def compared(experiment: Experiment) -> tuple[str, ...]:
    """The keys in which an experiment's trials differ."""
    if experiment.space.search:
        return tuple(experiment.space.search)
    values = [trial.values for trial in experiment.trials]
    keys = dict.fromkeys(key for own in values for key in own)
    return tuple(key for key in keys if any(own.get(key, ...) != values[0].get(key, ...) for own in values))


def _time(shared: Shared, say: Callable[[str], None]) -> None:
    """Measure the speed of the trials that changed it, alone on one GPU or in this process, and add it to their
    results. Trials that ran side by side would have measured each other."""
    import ray

    changed = [
        (row["trial"], row["values"])
        for row in rows(shared.folder)
        if row["status"] == "finished" and row["values"].get("cut.structured")
    ]
    timed = [row for row in rows(shared.folder) if "bench/images_per_s" in row["metrics"]]
    if not changed or len(timed) == len(changed):
        return
    say(f"timing {len(changed)} smaller models and the dense one, one after the other")
    if shared.gpu:
        speeds = ray.get(ray.remote(num_gpus=1)(time_trials).remote(shared, changed))
    else:
        speeds = time_trials(shared, changed)
    write_baseline(shared.folder, speeds[0])
    for (name, _), speed in zip(changed, speeds[1:], strict=True):
        result = read_trial(shared.folder / name)
        assert result is not None
        write_trial(shared.folder / name, {**result, "metrics": {**result["metrics"], **speed}})


def _search(experiment: Experiment, folder: Path) -> GridTrials:
    if experiment.space.search:
        study = open_study(experiment.space, folder, experiment.storage, experiment.config.seed)
        return StudyTrials(experiment.space, study, folder, experiment.count)
    return GridTrials([t for t in experiment.trials if read_trial(folder / t.name) is None])
