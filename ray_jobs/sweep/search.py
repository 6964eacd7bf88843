"""Running the trials of an experiment under Ray Tune, and what survives: its folder.

    experiment.json          the space, the config, the command
    <trial>/trial.json       what a trial left, finished, failed or stopped early; a trial that has one never runs again
    study.db                 Optuna's study of a search
    results.csv report/      the outcome

Tune runs trials; it is not asked to remember them. A sweep that is continued starts a new Tune run over the trials
that left no result, and a search goes on with its study: trials that were running when it died run again with the
parameters that they had, from their own checkpoints.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from mamba.config.keys import current
from ray_jobs.sweep.results import read_trial, write_trial
from ray_jobs.sweep.space import Space, Trial
from ray_jobs.sweep.trial import Shared, list_trial, run_trial

RETRIES = 2
"""How often a trial whose process or node died is started again."""


@dataclass(frozen=True)
class Resources:
    """What a trial holds, and how many run at once."""

    cpus: float
    gpus: float
    concurrent: int


class GridTrials(Searcher):
    """The trials of a grid, in order."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        super().__init__()
        self.left = list(trials)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if not self.left:
            return Searcher.FINISHED
        trial = self.left.pop(0)
        return {"trial": trial.name, "values": trial.values}

    def exhausted(self) -> bool:
        """Whether every trial was handed out."""
        return not self.left

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: Tune says so before a trial that was stopped has its result; see `settled`."""

    def settled(self, name: str, result: dict[str, Any]) -> None:
        """A trial has left its result. A grid learns nothing from it."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles what it is given; nothing of it is needed again."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the experiment's folder remembers."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("sweeps continue from their folder")


class StudyTrials(GridTrials):
    """The trials of a search, drawn by an Optuna study one by one."""

    def __init__(self, space: Space, study: optuna.Study, folder: Path, trials: int) -> None:
        super().__init__([])
        self.space, self.study, self.folder = space, study, folder
        self.distributions = {key: where.distribution() for key, where in space.search.items()}
        self.active: dict[str, optuna.trial.Trial] = {}
        self.again: list[optuna.trial.Trial] = []
        for row in study.get_trials(deepcopy=False):
            if row.state == TrialState.RUNNING:  # its sweep died: what it left counts, else it runs again
                trial = optuna.trial.Trial(study, row._trial_id)
                result = read_trial(folder / _name(trial))
                if result is not None:
                    self.tell(trial, result)
                else:
                    self.again.append(trial)
        self.to_draw = max(0, trials - len(study.get_trials(deepcopy=False)))

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if self.again:
            trial = self.again.pop(0)
        elif self.to_draw:
            trial = self.study.ask(self.distributions)
            self.to_draw -= 1
        else:
            return Searcher.FINISHED
        self.active[trial_id] = trial
        drawn = {key: self.space.search[key].value(value) for key, value in current(trial.params, self.folder).items()}
        return {"trial": _name(trial), "values": {**self.space.fixed, **drawn}}

    def exhausted(self) -> bool:
        return not self.again and not self.to_draw

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        (objective, *others) = self.space.objectives
        if not others and objective in result and trial_id in self.active:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a trial that runs again reports its first epochs again
                self.active[trial_id].report(result[objective], result["training_iteration"])

    def settled(self, name: str, result: dict[str, Any]) -> None:
        for trial_id, trial in list(self.active.items()):
            if _name(trial) == name:
                del self.active[trial_id]
                self.tell(trial, result)

    def tell(self, trial: optuna.trial.Trial, result: dict[str, Any]) -> None:
        values = [result["metrics"].get(objective) for objective in self.space.objectives]
        if result["status"] == "finished" and None not in values:
            self.study.tell(trial, values)
        elif result["status"] == "stopped early":
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            trial.set_user_attr("reason", result.get("reason", "no objective among its metrics"))
            self.study.tell(trial, state=TrialState.FAIL)


def _name(trial: optuna.trial.Trial) -> str:
    return f"trial-{trial.number:04d}"


def open_study(space: Space, folder: Path, storage: str | None, seed: int) -> optuna.Study:
    """The experiment's study: in its folder, or at another URL; created, or continued."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = storage or f"sqlite:///{folder / 'study.db'}"
    kinds = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
    directions = [kinds[mode] for mode in space.objectives.values()]
    study = optuna.create_study(storage=url, study_name=folder.name, directions=directions, load_if_exists=True)
    done = len(study.get_trials(deepcopy=False))
    # a continued study must not draw its first points again
    study.sampler = optuna.samplers.TPESampler(seed=seed + done, constant_liar=True, n_startup_trials=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(space.objectives))
    return study


class Watcher(tune.Callback):
    """Keeps the folder complete: trials that Tune stopped early or gave up get a result too."""

    def __init__(self, shared: Shared, search: GridTrials, changed: Callable[[str, dict[str, Any]], None]) -> None:
        self.shared, self.search, self.changed = shared, search, changed
        self.running: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.add(trial.config["trial"])
        self.changed(trial.config["trial"], {"status": "running"})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._settle(trial, "stopped early", "early stopping", dict(trial.last_result or {}))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        lines = [line for line in str(trial.get_error() or "its process died").splitlines() if line.strip()]
        self._settle(trial, "failed", lines[-1].strip(), {})

    def _settle(self, trial: Any, status: str, reason: str, last: dict[str, Any]) -> None:
        name = trial.config["trial"]
        self.running.discard(name)
        folder = self.shared.folder / name
        result = read_trial(folder)
        if result is None:
            metrics = {k: v for k, v in last.items() if "/" in k and isinstance(v, int | float)}
            result = {"status": status, "reason": reason, "metrics": metrics, "values": trial.config["values"]}
            write_trial(folder, result)
            list_trial(self.shared, name, trial.config["values"], status)
        self.search.settled(name, result)
        self.changed(name, result)


def run_sweep(
    shared: Shared,
    space: Space,
    search: GridTrials,
    resources: Resources,
    trials: int,
    changed: Callable[[str, dict[str, Any]], None],
    stopping: Callable[[], None],
) -> bool:
    """Run what is left of an experiment on the connected cluster.

    Args:
        shared: what every trial needs.
        space: its early stopping.
        search: where trials come from.
        resources: of a trial.
        trials: how many at most.
        changed: called with a trial's name and result whenever one starts or ends.
        stopping: called when SIGTERM asks for the end.

    Returns:
        whether it ran to its end; False after Ctrl-C or SIGTERM.
    """

    def trainable(config: dict[str, Any], shared: Shared) -> None:
        result = run_trial(shared, config["trial"], config["values"], tune.report)
        tune.report({**result["metrics"], "status": result["status"]})

    scheduler = None
    if space.early_stop:
        (objective, mode), *_ = space.objectives.items()
        scheduler = ASHAScheduler(
            metric=objective,
            mode=mode,
            max_t=10**6,
            grace_period=space.early_stop.grace_epochs,
            reduction_factor=space.early_stop.reduction,
        )

    # a trial whose work happens in workers of its own must not take what they need; nothing at all is refused by Tune
    held = {"CPU": resources.cpus, "GPU": resources.gpus} if resources.cpus else {"memory": 1}
    watcher = Watcher(shared, search, changed)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trainable, shared=shared), held),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=trials,
            max_concurrent_trials=resources.concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"attempt-{time.time_ns()}",
            storage_path=str(shared.folder / ".ray"),
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[watcher],
            verbose=0,
        ),
    )
    with sigterm_as_sigint(stopping):
        tuner.fit()
    return search.exhausted() and not watcher.running


@contextmanager
def sigterm_as_sigint(stopping: Callable[[], None]) -> Iterator[None]:
    """Tune ends in order on SIGINT alone; `ray job stop` sends SIGTERM, and SIGKILL three seconds later: what has to be
    said is said at once."""

    def handle(number: int, frame: object) -> None:
        stopping()
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
