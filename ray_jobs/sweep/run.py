"""Running an experiment to its end, or on from where it was."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mamba.config.schema import RunConfig
from mamba.data.fingerprint import fingerprint
from mamba.data.loader import check_batch_size
from mamba.data.registry import load_data
from mamba.errors import ConfigError, DataError
from mamba.runs.folder import exclusive
from mamba.runs.provenance import check_data as check_data_of
from mamba.runs.provenance import with_split
from mamba.runs.start import check_start
from ray_jobs.launch.cluster import Cluster, connected, on_one_gpu
from ray_jobs.launch.console import SweepDisplay
from ray_jobs.sweep.checks import check_machine, configs_of, data_identity
from ray_jobs.sweep.experiment import Experiment, load
from ray_jobs.sweep.measure import time_trials
from ray_jobs.sweep.results import read_trial, refused, rows, write_baseline, write_trial
from ray_jobs.sweep.rounds import models_to_time, time_rounds, write_speeds
from ray_jobs.sweep.searcher import GridTrials, StudyTrials
from ray_jobs.sweep.shared import Shared
from ray_jobs.sweep.study import open_study
from ray_jobs.sweep.tuner import Resources, run_sweep

MEASURES_PER_GPU = 4
"""Measure trials that share a GPU unless told otherwise."""


def run(folder: Path, say: Callable[[str], None], settled: Callable[[], None]) -> tuple[bool, list[dict[str, Any]]]:
    """Run what is left of the experiment in `folder`, whose data was checked; `settled` is called whenever a trial has
    left its result.

    Returns:
        whether it ran to its end (False: interrupted), and a row for every trial that has a result.

    Raises:
        ForgeError: with a sentence for the user, before trials start.
    """
    experiment = load(folder)
    config, space = experiment.config, experiment.space
    with exclusive(folder):
        search = _search(experiment, folder)
        with connected(say) as cluster:
            check_machine(space, experiment.trials, config, cluster.gpus > 0)
            held = resources(experiment, cluster)
            shared = Shared(
                space.kind,
                folder,
                config.with_values(space.fixed).model_dump(mode="json"),
                experiment.checkpoint,
                int(held.cpus) or config.scaling.cpus_per_worker or 1,
                config.scaling.num_workers or 1,
                cluster.gpus > 0,
                compared(experiment),
                tuple(space.objectives),
            )
            done = len(rows(folder))
            kind = f"{held.gpus:g} GPU" if held.gpus else f"{int(held.cpus)} CPU"
            kind = kind if held.cpus else f"{shared.workers} workers"
            say(f"{space.question}\n{experiment.count} trials, {done} done, {held.concurrent} at once ({kind} each)")
            for sentence in refused(folder):
                say(f"not taken for a result: {sentence}")
            with SweepDisplay(experiment.count, rows(folder), *space.first_objective) as display:

                def changed(name: str, result: dict[str, Any]) -> None:
                    display.changed(name, result)
                    if result["status"] != "running":
                        settled()

                def stopping() -> None:
                    say(f"stopping; results so far are kept: continue with --resume {folder}")

                ended = run_sweep(shared, space, search, held, experiment.count, changed, stopping)
            if ended and space.kind == "measure":
                _time(shared, say)
            if ended and space.kind == "rounds":
                _time_series(shared, say)
    return ended, rows(folder)


def check_data(experiment: Experiment) -> tuple[dict[str, dict[str, Any]], list[Path]]:
    """Load what the trials ask for, each data set once, and see that they can train and be measured on it.

    Returns:
        each data set's fingerprint by the keys that ask for it, and the models that trials start from.

    Raises:
        ForgeError: missing or unreadable data, batches that it does not fill, a checkpoint of other data.
    """
    base, kind = experiment.config, experiment.space.kind
    resolved = configs_of(experiment.space, experiment.trials, base)
    configs = [with_split(config, experiment.checkpoint) for config in resolved]
    prints: dict[str, dict[str, Any]] = {}
    models = {experiment.checkpoint, *(path for c in configs for path in (c.model.checkpoint, c.distill.teacher))}
    for identity in dict.fromkeys(data_identity(config.data) for config in configs):
        data = load_data(identity, base.seed)
        for remark in data.remarks():
            print(f"data: {remark}", file=sys.stderr)
        own = [config for config in configs if data_identity(config.data) == identity]
        begun = [(c.model.checkpoint, "model.checkpoint", c.model.new_head, c.model.new_size) for c in own]
        taught = [(c.distill.teacher, "distill.teacher", False, False) for c in own]
        starts = dict.fromkeys([*begun, *taught, (experiment.checkpoint, "--checkpoint", False, False)])
        for checkpoint, key, new_head, new_size in starts:
            if checkpoint is not None:
                check_start(checkpoint, len(data.classes), data.side, key, new_head, new_size)
                if note := check_data_of(checkpoint, data, key, new_head):
                    print(f"data: {note}", file=sys.stderr)
        if kind == "measure" and data.val is None:
            raise ConfigError("data.val_fraction 0 leaves no validation images to measure on")
        refusals = [refusal for c in own if kind != "measure" and (refusal := _refusal(len(data.train), c))]
        if refusals and (experiment.trials or len(refusals) == len(own)):  # of a search, single trials may fail
            raise ConfigError(refusals[0])
        prints[identity.model_dump_json()] = fingerprint(data)
    if experiment.trials:
        _check_different(prints)
    return prints, sorted(path for path in models if path is not None)


def _check_different(prints: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ConfigError where trials ask for data by different keys and get the same."""
    seen: dict[str, str] = {}
    for keys, found in prints.items():
        other = seen.setdefault(json.dumps(found, sort_keys=True), keys)
        if other != keys:
            one, two = json.loads(other), json.loads(keys)
            idle = ", ".join(f"data.{key} ({one[key]} and {two[key]})" for key in one if one[key] != two[key])
            raise ConfigError(f"trials that differ in {idle} have the same images: it has no effect on this data set")


def _refusal(train_images: int, config: RunConfig) -> str | None:
    """Why a trial cannot train on so many images; None: it can."""
    try:
        check_batch_size(train_images, config.data)
    except DataError as error:
        return str(error)
    return None


def resources(experiment: Experiment, cluster: Cluster) -> Resources:
    """What a trial holds, so that concurrent ones never wait for each other's workers.

    Raises:
        ConfigError: more than the cluster has.
    """
    workers = experiment.config.scaling.num_workers or 1
    share = experiment.gpus_per_trial
    if experiment.space.kind == "rounds" and workers > 1:
        raise ConfigError(f"scaling.num_workers {workers}: a series of rounds trains on one GPU; valid: none, 1")
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
        cpus = max(1, cluster.cpus // fit) if experiment.space.kind != "measure" else 1
        return Resources(min(cpus, cluster.cpus), share, max(1, min(fit, cluster.cpus)))
    if share:
        raise ConfigError(f"--gpus-per-trial {share:g}: the cluster has no GPU")
    return Resources(1, 0.0, cluster.cpus)


def compared(experiment: Experiment) -> tuple[str, ...]:
    """The keys in which an experiment's trials differ."""
    if experiment.space.search:
        return tuple(experiment.space.search)
    values = [trial.values for trial in experiment.trials]
    keys = dict.fromkeys(key for own in values for key in own)
    return tuple(key for key in keys if any(own.get(key, ...) != values[0].get(key, ...) for own in values))


def _search(experiment: Experiment, folder: Path) -> GridTrials:
    """Where the trials that are left come from."""
    if not experiment.space.search:
        return GridTrials([t for t in experiment.trials if read_trial(folder / t.name) is None])
    study = open_study(experiment.space, folder, experiment.storage, experiment.config.seed, experiment.id)
    if experiment.warm_start and not study.get_trials(deepcopy=False):
        for params in experiment.warm_start:
            study.enqueue_trial(params)
    return StudyTrials(experiment.space, study, folder, experiment.count, experiment.config.flat())


def _time(shared: Shared, say: Callable[[str], None]) -> None:
    """Measure the speed of the trials that changed it, alone on one GPU or in this process, and add it to their
    results. Trials that ran side by side would have measured each other."""
    base = RunConfig(**shared.config)
    changed = [
        (row["trial"], row["values"])
        for row in rows(shared.folder)
        if row["status"] == "finished" and row["values"].get("cut.structured", base.cut.structured)
    ]
    timed = [row for row in rows(shared.folder) if "bench/images_per_s" in row["metrics"]]
    if not changed or len(timed) == len(changed):
        return
    say(f"timing {len(changed)} smaller models and the dense one, one after the other")
    speeds = on_one_gpu(shared.gpu, time_trials, shared, changed)
    write_baseline(shared.folder, speeds[0])
    for (name, _), speed in zip(changed, speeds[1:], strict=True):
        result = read_trial(shared.folder / name)
        assert result is not None
        write_trial(shared.folder / name, {**result, "metrics": {**result["metrics"], **speed}})


def _time_series(shared: Shared, say: Callable[[str], None]) -> None:
    """Measure the speed of every round's model of every series, as `_time` does of cuts."""
    models = models_to_time(shared.folder)
    if not models:
        return
    say(f"timing {len(models)} models, one after the other")
    write_speeds(shared.folder, models, on_one_gpu(shared.gpu, time_rounds, shared, models))
