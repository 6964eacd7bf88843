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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from ray_jobs.launch.console import SAME_SIGNAL_S
from ray_jobs.sweep.named import named
from ray_jobs.sweep.results import read_trial, rows, write_trial
from ray_jobs.sweep.searcher import GridTrials
from ray_jobs.sweep.shared import Shared
from ray_jobs.sweep.space import Space
from ray_jobs.sweep.trial import list_trial, reported_epochs, run_trial

RETRIES = 2
"""How often a trial whose process or node died is started again."""


@dataclass(frozen=True)
class Resources:
    """What a trial holds, and how many run at once."""

    cpus: float
    gpus: float
    concurrent: int


class EpochASHA(ASHAScheduler):
    """ASHA over epochs, whose rungs outlive an interruption: trials of the folder that ended before, and the epochs of
    one that goes on, compete at the rungs that they had reached."""

    def __init__(self, space: Space, folder: Path) -> None:
        assert space.early_stop is not None
        ((self.objective, mode),) = space.objectives.items()
        super().__init__(
            time_attr="epoch",
            metric=self.objective,
            mode=mode,
            max_t=10**6,
            grace_period=space.early_stop.grace_epochs,
            reduction_factor=space.early_stop.reduction,
        )
        self.folder = folder
        self.replayed: set[str] = set()
        for row in rows(folder):
            past = SimpleNamespace(trial_id=row["trial"])
            self.on_trial_add(None, past)
            self._replay(past, row["trial"], 10**6)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if trial.trial_id not in self.replayed:
            self.replayed.add(trial.trial_id)
            self._replay(trial, trial.config["trial"], result.get("epoch", 0))
        return super().on_trial_result(tune_controller, trial, result)

    def _replay(self, trial: Any, name: str, before: int) -> None:
        """Enter the epochs that a trial has behind it. What was decided then is not decided again."""
        for epoch in reported_epochs(self.folder / name):
            if epoch["epoch"] < before and self.objective in epoch:
                super().on_trial_result(None, trial, epoch)


class Watcher(tune.Callback):
    """Keeps the folder complete: trials that Tune stopped early or gave up get a result too."""

    def __init__(self, shared: Shared, search: GridTrials, changed: Callable[[str, dict[str, Any]], None]) -> None:
        self.shared, self.search, self.changed = shared, search, changed
        self.running: set[str] = set()
        self.ending = False
        """Set when the sweep was asked to end: a trial that stops now was interrupted, and goes on another time."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.add(trial.config["trial"])
        self.changed(trial.config["trial"], {"status": "running"})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = dict(trial.last_result or {})
        if self._interrupted(trial, last):
            return
        self._settle(trial, "stopped early", "early stopping", last)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._interrupted(trial, {}):
            return
        lines = [line for line in str(trial.get_error() or "its process died").splitlines() if line.strip()]
        self._settle(trial, "failed", lines[-1].strip(), {})

    def _interrupted(self, trial: Any, last: dict[str, Any]) -> bool:
        """Whether a trial without a result ended because the sweep did."""
        return self.ending and "status" not in last and read_trial(self.shared.folder / trial.config["trial"]) is None

    def _settle(self, trial: Any, status: str, reason: str, last: dict[str, Any]) -> None:
        name = trial.config["trial"]
        self.running.discard(name)
        folder = self.shared.folder / name
        result = read_trial(folder)
        if result is None:
            metrics = {k: v for k, v in last.items() if "/" in k and isinstance(v, int | float)}
            result = {"status": status, "reason": reason, "metrics": metrics, "values": trial.config["values"]}
            result = write_trial(folder, result)
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
        stopping: called when Ctrl-C or SIGTERM asks for the end.

    Returns:
        whether it ran to its end; False after Ctrl-C or SIGTERM.
    """

    def trainable(config: dict[str, Any], shared: Shared) -> None:
        result = run_trial(shared, config["trial"], config["values"], tune.report)
        tune.report({**result["metrics"], "status": result["status"]})

    # a trial whose work happens in workers of its own must not take what they need; nothing at all is refused by Tune
    held = {"CPU": resources.cpus, "GPU": resources.gpus} if resources.cpus else {"memory": 1}
    watcher = Watcher(shared, search, changed)
    tuner = tune.Tuner(
        tune.with_resources(named(tune.with_parameters(trainable, shared=shared), shared.folder), held),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=EpochASHA(space, shared.folder) if space.early_stop else None,
            num_samples=trials,
            max_concurrent_trials=resources.concurrent,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["trial"],
            trial_dirname_creator=lambda trial: trial.trial_id,  # names may be long
        ),
        run_config=tune.RunConfig(
            name=f"{shared.folder.name}-{time.time_ns()}",
            storage_path=str(shared.folder / ".ray"),
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[watcher],
            verbose=0,
        ),
    )

    def end() -> None:
        watcher.ending = True
        stopping()

    _uncounted()
    with ended_by_signals(end):
        tuner.fit()
    return search.exhausted() and not watcher.running


def _uncounted() -> None:
    """For its statistics of use Ray looks which of its own callbacks a sweep has, and imports wandb, MLflow, Comet and
    Aim for it, where they are installed: seconds before the first trial."""
    with suppress(ImportError, AttributeError):
        from ray.air._internal import usage

        usage.tag_callbacks = lambda callbacks: False


@contextmanager
def ended_by_signals(ending: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM (what `ray job stop` sends, SIGKILL three seconds later) end a sweep in order; `ending` hears
    of it first, so that what has to be said is said. Another Ctrl-C ends it at once."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune's own would come after ours
    received: list[float] = []

    def handle(number: int, frame: object) -> None:
        now = time.monotonic()
        received.append(now)
        if len(received) == 1:
            ending()
            os.kill(os.getpid(), signal.SIGUSR1)  # which Tune takes for an end in order
        elif number == signal.SIGINT and now - received[0] > SAME_SIGNAL_S:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
