"""Optuna's own figures of a search: how the best came about, and which parameters mattered.

The study is rebuilt from what the trials left in their folders, so that a report needs neither study.db nor the
database of `--storage`, and says of each trial what its folder says.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from ray_jobs.report.rows import measured
from ray_jobs.sweep.space import Space

ENOUGH = 8
"""Finished trials from which on the importance of parameters is worth showing."""


def study_of(space: Space, rows: Sequence[Mapping[str, Any]]) -> optuna.Study:
    """A study in memory with these trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["maximize" if m == "max" else "minimize" for m in space.objectives.values()]
    )
    for row in rows:
        trial = _trial(space, row)
        if trial is not None:
            study.add_trial(trial)
    return study


def _trial(space: Space, row: Mapping[str, Any]) -> FrozenTrial | None:
    params, distributions = {}, {}
    for key, where in space.search.items():
        if key not in row["values"]:  # of a condition that this trial does not meet
            continue
        distribution, drawn = where.distribution(), where.drawn(row["values"][key])
        if isinstance(distribution, FloatDistribution | IntDistribution):
            drawn = min(max(drawn, distribution.low), distribution.high)  # 1 - (1 - x) is x but for the last digit
        elif isinstance(distribution, CategoricalDistribution) and drawn not in distribution.choices:
            return None
        params[key], distributions[key] = drawn, distribution
    values = [measured(row, key) for key in space.objectives]
    if row["status"] == "finished" and None not in values:
        return create_trial(params=params, distributions=distributions, values=[v for v in values if v is not None])
    state = TrialState.PRUNED if row["status"] == "stopped early" else TrialState.FAIL
    return create_trial(state=state, params=params, distributions=distributions)


def optuna_figures(space: Space, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """`history` and, with ENOUGH finished trials, `importances`, both of the first objective."""
    import matplotlib.pyplot as plt
    from optuna.importance import get_param_importances
    from optuna.visualization import matplotlib as plots

    study = study_of(space, rows)
    done = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    if len(done) < 2:
        return {}
    name, mode = next(iter(space.objectives.items()))
    target = None if len(space.objectives) == 1 else lambda trial: trial.values[0]
    axes = {}
    with warnings.catch_warnings(), plt.ioff(), plt.rc_context():
        warnings.simplefilter("ignore")  # experimental, and the evaluator's word about low values
        axes["history"] = plots.plot_optimization_history(study, target=target, target_name=name)
        if len(done) >= ENOUGH:
            sign = -1 if mode == "max" else 1  # Optuna's evaluator takes low for good
            by = lambda trial: sign * trial.values[0]  # noqa: E731
            try:
                get_param_importances(study, target=by)
                axes["importances"] = plots.plot_param_importances(study, target=by, target_name=name)
            except (ValueError, RuntimeError, ImportError):  # too few distinct values
                pass
    figures = {key: axis.get_figure(root=True) for key, axis in axes.items()}
    for figure in figures.values():
        assert figure is not None
        plt.close(figure)  # out of pyplot's hands; it can still be saved
        figure.set_size_inches(6.5, 3.8)
        figure.set_layout_engine("constrained")
    return {key: figure for key, figure in figures.items() if figure is not None}
