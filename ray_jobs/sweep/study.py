"""Optuna's study of a search: whose it is, where it is kept, what its trials are told.

A study belongs to one experiment, and carries its id. Where the trials of the folder and the study disagree (the file
is gone, a sweep was killed between the two), the folder's results count.
"""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from mamba.config.keys import current
from mamba.errors import ConfigError
from ray_jobs.sweep.results import read_trial
from ray_jobs.sweep.space import Range, Space

OWNER = "experiment"
"""The study's attribute with its experiment's id."""


def new_id() -> str:
    """An id for an experiment."""
    return uuid.uuid4().hex


def check_storage(url: str) -> None:
    """Refuse a storage that cannot be one, before anything is made.

    Raises:
        ConfigError: what is wrong with the URL, or that nothing answers there.
    """
    try:
        parsed = make_url(url)
        dialect = parsed.get_dialect()
        dialect.import_dbapi()
    except (ArgumentError, SQLAlchemyError, ImportError, ValueError) as error:
        raise ConfigError(
            f"--storage {url}: {_first_line(error)}; valid: the URL of a database that SQLAlchemy opens, as "
            "sqlite:////absolute/path.db or postgresql://user@host/name"
        ) from None
    if parsed.get_backend_name() == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise ConfigError(f"--storage {url}: a study in memory cannot be continued; valid: a file's path")
        folder = Path(parsed.database).absolute().parent
        if not folder.is_dir():
            raise ConfigError(f"--storage {url}: there is no folder {folder}")
    study_names(url)


def study_names(url: str) -> list[str]:
    """The studies in a storage; raises ConfigError where it cannot be read."""
    with in_sentences(url):
        return optuna.study.get_all_study_names(url)


@contextmanager
def in_sentences(where: str) -> Iterator[None]:
    """Raises ConfigError for what a database says."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
        raise ConfigError(f"the study's storage {where} cannot be used: {_first_line(cause)}") from None


def _first_line(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def url_of(folder: Path, storage: str | None) -> str:
    """Where an experiment's study is."""
    return storage or f"sqlite:///{folder / 'study.db'}"


def create_study(space: Space, name: str, url: str, owner: str) -> optuna.Study:
    """An experiment's study, new.

    Raises:
        ConfigError: the storage has one of this name, which is another experiment's, or cannot be written.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
    directions = [kinds[mode] for mode in space.objectives.values()]
    try:
        with in_sentences(url):
            study = optuna.create_study(storage=url, study_name=name, directions=directions)
            study.set_user_attr(OWNER, owner)
    except optuna.exceptions.DuplicatedStudyError:
        raise ConfigError(
            f"{url} holds a study '{name}' already, of another experiment: choose another --name, or another --storage"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(space.objectives))
    return study


def open_study(space: Space, folder: Path, storage: str | None, seed: int, owner: str | None = None) -> optuna.Study:
    """The study of the experiment in `folder`, made where it is missing: then its trials are those of the folder.

    Args:
        space: of the experiment.
        folder: of the experiment.
        storage: URL; None: a file in the folder.
        seed: of the sampler.
        owner: the experiment's id; None: of an experiment from before it had one, or not to be checked.

    Raises:
        ConfigError: the study is another experiment's, or cannot be read.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = url_of(folder, storage)
    try:
        with in_sentences(url):
            study = optuna.load_study(study_name=folder.name, storage=url)
    except KeyError:  # none of this name
        study = create_study(space, folder.name, url, owner or new_id())
    found = study.user_attrs.get(OWNER)
    if owner is not None and found not in (None, owner):
        raise ConfigError(
            f"{url} holds a study '{folder.name}' of another experiment: its trials are not those of {folder}"
        )
    with in_sentences(url):
        _rebuild(study, space, folder)
        _check_same(study, space, folder, url)
        done = len(study.get_trials(deepcopy=False))
    # a continued study must not draw its first points again
    study.sampler = optuna.samplers.TPESampler(seed=seed + done, constant_liar=True, n_startup_trials=8)
    return study


def _rebuild(study: optuna.Study, space: Space, folder: Path) -> None:
    """Add the folder's trials that the study does not know, with the values that they were run with. A trial's number
    is its folder's name, so gaps are filled with failed trials."""
    known = len(study.get_trials(deepcopy=False))
    numbers = {int(path.name[6:]): path for path in folder.glob("trial-*") if path.name[6:].isdigit()}
    for number in range(known, max(numbers, default=-1) + 1):
        result = read_trial(numbers[number]) if number in numbers else None
        if result is None:
            study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"reason": "lost with the study"}))
        else:
            study.add_trial(frozen(space, result))


def _check_same(study: optuna.Study, space: Space, folder: Path, where: str) -> None:
    """Raises ConfigError where a trial was run with other values than the study knows of it: it would learn from
    results that are of other points, and run a trial again that was another one."""
    for row in study.get_trials(deepcopy=False):
        result = read_trial(folder / f"trial-{row.number:04d}")
        if result is None:
            continue
        for key, param in current(row.params, where).items():
            if key not in space.search or key not in result["values"]:
                continue
            said, ran = space.search[key].value(param), result["values"][key]
            numbers = isinstance(said, int | float) and isinstance(ran, int | float)
            if not (math.isclose(said, ran, rel_tol=1e-9) if numbers else said == ran):
                raise ConfigError(
                    f"{where} says {key} {said} of trial-{row.number:04d}, which ran with {ran}: it was changed, or is "
                    "another search's; remove it, and it is made again from the trials' own values"
                )


def frozen(space: Space, result: Mapping[str, Any]) -> FrozenTrial:
    """A trial's result as Optuna keeps trials.

    Raises:
        ConfigError: its values are not of this space.
    """
    params = {k: where.drawn(result["values"][k]) for k, where in space.search.items() if k in result["values"]}
    distributions = {key: space.search[key].distribution() for key in params}
    for key, value in params.items():
        if not distributions[key]._contains(distributions[key].to_internal_repr(value)):
            raise ConfigError(f"{key} {value} of a trial's result is outside the space")
    state, values = verdict(space, result)
    return create_trial(state=state, params=params, distributions=distributions, values=values)


def verdict(space: Space, result: Mapping[str, Any]) -> tuple[TrialState, list[float] | None]:
    """What a study is told of a trial: its objectives where it finished with all of them, and they are numbers."""
    values = [result["metrics"].get(objective, math.nan) for objective in space.objectives]
    if result["status"] == "finished" and all(map(math.isfinite, values)):
        return TrialState.COMPLETE, values
    return (TrialState.PRUNED if result["status"] == "stopped early" else TrialState.FAIL), None


def suggest(trial: optuna.trial.Trial, space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """Draw a trial's values, key by key, without those whose conditions do not hold.

    Args:
        trial: of the study; a parameter that it has already, enqueued or drawn before an interruption, stays.
        space: to draw from.
        config: the experiment's values by dotted key, for conditions on keys that are not searched.
    """
    values = dict(space.fixed)
    for key, where in space.search.items():
        if where.holds({**config, **values}):
            values[key] = where.value(_draw(trial, key, where))
    return values


def _draw(trial: optuna.trial.Trial, key: str, where: Range) -> Any:
    stored = current(trial.params, "the study")  # of a study that an earlier version began: by the keys of today
    if key in stored:
        return stored[key]
    if where.choices is not None:
        return trial.suggest_categorical(key, where.choices)
    assert where.low is not None and where.high is not None
    if isinstance(where.low, int) and isinstance(where.high, int):
        return trial.suggest_int(key, where.low, where.high, log=where.log)
    return trial.suggest_float(key, where.low, where.high, log=where.log)
