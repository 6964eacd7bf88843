"""Where Tune gets trials from: the list of a grid, or an Optuna study, each going on from what the folder holds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from mamba.config.keys import current
from ray_jobs.sweep.grid import Trial
from ray_jobs.sweep.results import read_trial
from ray_jobs.sweep.space import Space
from ray_jobs.sweep.study import suggest, verdict


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

    def settled(self, name: str, result: Mapping[str, Any]) -> None:
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
    """The trials of a search, drawn by an Optuna study one by one, until there are so many.

    Of what the study has already: what was running when its sweep died runs again with the values that it had, unless
    it had left its result; so does a finished trial whose result is gone or damaged.
    """

    def __init__(
        self, space: Space, study: optuna.Study, folder: Path, trials: int, config: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__([])
        self.space, self.study, self.folder, self.config = space, study, folder, config or {}
        self.active: dict[str, optuna.trial.Trial] = {}
        self.again: list[optuna.trial.Trial] = []
        begun = 0
        for row in study.get_trials(deepcopy=False):
            begun += row.state != TrialState.WAITING
            result = read_trial(folder / _name(row))
            if row.state == TrialState.RUNNING:
                trial = optuna.trial.Trial(study, row._trial_id)
                if result is not None:
                    self.tell(trial, result)
                else:
                    self.again.append(trial)
            elif row.state.is_finished() and result is None and row.params:
                params = current(row.params, folder)
                drawn = {key: space.search[key].value(value) for key, value in params.items() if key in space.search}
                self.left.append(Trial(_name(row), {**space.fixed, **drawn}))
        self.to_draw = max(0, trials - begun)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if self.left:  # the study knows its value
            return super().suggest(trial_id)
        if self.again:
            trial = self.again.pop(0)
        elif self.to_draw:
            trial = self.study.ask()
            self.to_draw -= 1
        else:
            return Searcher.FINISHED
        self.active[trial_id] = trial
        return {"trial": _name(trial), "values": suggest(trial, self.space, self.config)}

    def exhausted(self) -> bool:
        return not self.left and not self.again and not self.to_draw

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        (objective, *others) = self.space.objectives
        value = result.get(objective, math.nan)
        if not others and trial_id in self.active and "epoch" in result and math.isfinite(value):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a trial that runs again reports an epoch again
                self.active[trial_id].report(value, int(result["epoch"]))

    def settled(self, name: str, result: Mapping[str, Any]) -> None:
        for trial_id, trial in list(self.active.items()):
            if _name(trial) == name:
                del self.active[trial_id]
                self.tell(trial, result)

    def tell(self, trial: optuna.trial.Trial, result: Mapping[str, Any]) -> None:
        """Tell the study how a trial ended; one without its objectives as numbers has failed."""
        state, values = verdict(self.space, result)
        if state == TrialState.FAIL:
            trial.set_user_attr("reason", result.get("reason") or "no objective among its metrics")
        if values:
            self.study.tell(trial, values)
        else:
            self.study.tell(trial, state=state)


def _name(trial: optuna.trial.BaseTrial) -> str:
    return f"trial-{trial.number:04d}"
