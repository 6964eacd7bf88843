"""Sweeps as data: YAML files checked against the run config.

question: what the sweep answers                    cost: what it takes
kind: measure (cut a trained model, evaluate it) | train | rounds (a series of pruning rounds a trial)
preset: what the config starts from where the command line names none
set: {dotted key: value}                            the same for every trial
grids: [{dotted key: [values]}, ...]                each a product; together their union; cut.layer: all;
                                                    preset: [names]
search: {dotted key: {low, high, log, one_minus} | {choices}}       drawn by Optuna
        with when: {other key: value | [values] | {above: number}}  drawn only where the others are so
objectives: {metric: max | min}                     of a search; two make a Pareto front
trials: how many a search draws                     seeds: [...] repeats every trial of a grid
early_stop: {grace_epochs, reduction}               ASHA, for one objective and training trials
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mamba.config.cli import TUNE, SweepArgs
from mamba.config.files import read_yaml
from mamba.config.keys import current, dotted_keys, unknown_key
from mamba.config.presets import get_preset
from mamba.config.schema import RunConfig
from mamba.errors import ConfigError
from mamba.runs.metrics import SCORE

FOLDER = Path(__file__).parents[2] / "search_spaces"
MOST_TRIALS = 10_000
"""Of one experiment: each leaves a folder, and no report could show more."""
LARGEST = 2.0**53
"""Up to here a float holds every whole number."""
SHOWN_ERRORS = 3
Scalar = bool | int | float | str | None


class Above(BaseModel):
    """A condition on a number: strictly above another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    above: float


class Range(BaseModel):
    """Where a search draws a value from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float | int | None = None
    high: float | int | None = None
    log: bool = False
    one_minus: bool = False
    """The value is one minus what is drawn: for decays close to 1 on a log scale."""
    choices: list[Scalar] | None = None
    when: dict[str, Scalar | list[Scalar] | Above] = Field(default_factory=dict)
    """Conditions on other keys: without them the value is not drawn, and is what the experiment's config says."""

    def distribution(self) -> BaseDistribution:
        if self.choices is not None:
            return CategoricalDistribution(self.choices)
        assert self.low is not None and self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def value(self, drawn: Any) -> Any:
        return 1 - drawn if self.one_minus else drawn

    def drawn(self, value: Any) -> Any:
        """What a value was made of: the inverse of `value`."""
        return 1 - value if self.one_minus else value

    def ends(self) -> tuple[Any, Any]:
        """The values at the two ends of an axis."""
        listed = self.extremes()
        return listed[0], listed[-1]

    def place(self, value: Any) -> float:
        """Where a value lies between the ends, from 0 to 1, as the search draws it."""
        if self.choices is not None:
            return self.choices.index(value) / max(1, len(self.choices) - 1)
        assert self.low is not None and self.high is not None
        scale = math.log if self.log else float
        low, here, high = scale(self.low), scale(self.drawn(value)), scale(self.high)
        return (here - low) / (high - low)

    def extremes(self) -> list[Any]:
        """The values that decide whether all are valid."""
        return list(self.choices) if self.choices is not None else [self.value(self.low), self.value(self.high)]

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether the conditions hold where the other keys have these values."""
        return all(_holds(condition, values[key]) for key, condition in self.when.items())


def _holds(condition: Any, value: Any) -> bool:
    if isinstance(condition, Above):
        return isinstance(value, int | float) and value > condition.above
    return value in condition if isinstance(condition, list) else value == condition


class EarlyStop(BaseModel):
    """ASHA (https://arxiv.org/abs/1810.05934): after grace_epochs, and each time `reduction` times as many, only the
    best 1 / reduction of the trials go on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grace_epochs: int = Field(1, ge=1, le=10**6)
    reduction: int = Field(3, ge=2, le=1000)


class Space(BaseModel):
    """One file of `search_spaces/`."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    question: str
    cost: str
    kind: Literal["measure", "train", "rounds"]
    preset: str | None = None
    fixed: dict[str, Scalar] = Field(default_factory=dict, alias="set")
    grids: list[dict[str, list[Scalar] | Literal["all"]]] = Field(default_factory=list)
    search: dict[str, Range] = Field(default_factory=dict)
    objectives: dict[str, Literal["max", "min"]] = Field(default_factory=dict)
    trials: int = Field(0, ge=0, le=MOST_TRIALS)
    seeds: list[int] = Field(default_factory=list)
    early_stop: EarlyStop | None = None

    @property
    def presets(self) -> list[str]:
        """The presets that its grids vary, in order; none where they vary none."""
        return list(dict.fromkeys(str(name) for grid in self.grids for name in grid.get("preset", [])))

    @property
    def first_objective(self) -> tuple[str, str]:
        """What trials are ranked by first, and its direction; the validation accuracy where nothing is said."""
        return next(iter(self.objectives.items()), (SCORE, "max"))

    @field_validator("fixed", "grids", "search", mode="before")
    @classmethod
    def _by_todays_names(cls, given: Any) -> Any:
        if isinstance(given, list):
            return [cls._by_todays_names(grid) for grid in given]
        return current(given, "the search space") if isinstance(given, dict) else given


def load_space(path: str | Path) -> Space:
    """Read and check a space: a file's path, or the name of one that ships.

    Raises:
        ConfigError: the file, the key, what was wrong, what is valid.
    """
    file = Path(path)
    try:
        if not file.is_file() and (FOLDER / f"{path}.yaml").exists():
            file = FOLDER / f"{path}.yaml"
        if not file.exists():
            shipped = ", ".join(sorted(f.stem for f in FOLDER.glob("*.yaml")))
            raise ConfigError(f"there is no search space {path}; a file, or one of those that ship: {shipped}")
    except OSError as error:
        raise ConfigError(f"--space {str(path)[:80]} cannot be read: {error.strerror}") from None
    tree = read_yaml(file, "a search space")
    try:
        space = Space.model_validate(tree)
    except ValueError as error:
        raise ConfigError(f"{file}: {_sentence(error)}") from None
    try:
        return checked(space)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def base_of(space: Space, args: SweepArgs) -> RunConfig:
    """The config that an experiment's trials start from: the command line's, over the preset that the space names where
    no other is named.

    Raises:
        ConfigError: a preset or a trained model beside a space that varies presets.
    """
    if space.presets:
        if "preset" in args.over or args.config.model.checkpoint is not None:
            word = "preset" if "preset" in args.over else "checkpoint"
            raise ConfigError(f"--{word}: the space varies presets, {', '.join(space.presets)}; leave it out")
        preset: str | None = space.presets[0]
    else:
        preset = space.preset if "preset" not in args.over and args.config.model.checkpoint is None else None
    if preset is None:
        return args.config
    return get_preset(preset).with_values({**TUNE.defaults, **args.over})


def checked(space: Space) -> Space:
    """A space whose values are of their keys' types, each checked against the config's own bounds, and the parts
    against each other; what depends on the experiment's config is checked by `ray_jobs.sweep.checks`.

    Raises:
        ConfigError: the key, what was wrong, what is valid.
    """
    if bool(space.grids) == bool(space.search):
        raise ConfigError("a space has either grids or search, one of them and not empty")
    fixed = {key: typed(key, value) for key, value in space.fixed.items()}
    grids = [_checked_grid(grid, fixed) for grid in space.grids]
    search = {key: _checked_range(key, where) for key, where in space.search.items()}
    for key in fixed:
        if key in search or any(key in grid for grid in grids):
            raise ConfigError(f"set: {key} varies too; leave it out of one of both")
    for key, where in search.items():
        _check_conditions(key, where, fixed, search)
    for seed in space.seeds:
        typed("seed", seed)
    if len(set(space.seeds)) < len(space.seeds):
        raise ConfigError("seeds: one is given twice")
    if space.seeds and ("seed" in fixed or any("seed" in grid for grid in grids)):
        raise ConfigError("seeds: seed is given as a key too; leave one out")
    if space.search:
        if space.seeds:
            raise ConfigError("seeds repeat the trials of grids and have no effect on a search; leave them out")
        if not (space.objectives and space.trials):
            raise ConfigError("a search needs objectives and a number of trials")
    else:
        for part in ("objectives", "trials", "early_stop"):
            if getattr(space, part):
                raise ConfigError(f"{part} is of a search; a space with grids has none")
        _check_count(grids, len(space.seeds) or 1)
    if len(space.objectives) > 2:
        raise ConfigError("objectives: one or two")
    if space.kind == "rounds" and space.search:
        raise ConfigError("kind rounds has grids; a search draws single trainings or cuts")
    if space.preset is not None:
        get_preset(space.preset)
    _check_presets(space)
    if space.early_stop and (space.kind != "train" or len(space.objectives) != 1):
        raise ConfigError("early_stop needs kind train and one objective")
    return space.model_copy(update={"fixed": fixed, "grids": grids, "search": search})


@cache
def _default() -> RunConfig:
    return RunConfig()


def typed(key: str, value: Any) -> Any:
    """A value as the type that its key has in the config; paths as text.

    Raises:
        ConfigError: an unknown key, a value of another type or out of bounds.
    """
    return _default().with_values({key: value}).flat()[key]


def number_type(key: str) -> type[int] | type[float] | None:
    """What numbers a key takes; None: no numbers."""
    if key not in dotted_keys():
        raise unknown_key(key)
    annotation = dotted_keys()[key].model_fields[key.rpartition(".")[2]].annotation
    kinds = {annotation, *get_args(annotation)}
    return float if float in kinds else int if int in kinds else None


def _checked_grid(grid: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    if not grid:
        raise ConfigError("grids: an empty grid has no trial")
    found: dict[str, Any] = {}
    for key, values in grid.items():
        if values == "all":
            if key != "cut.layer":
                raise ConfigError(f"grids: '{key}: all' means nothing; only cut.layer takes all")
            found[key] = values
            continue
        if key == "preset":
            found[key] = [str(value) for value in values]
            for name in found[key]:
                get_preset(name)
        if not values:
            raise ConfigError(f"grids: {key} lists no value")
        if len(values) > MOST_TRIALS:
            raise ConfigError(f"grids: {key} lists {len(values):,} values; at most {MOST_TRIALS:,} trials can be run")
        found[key] = found.get(key) or [typed(key, value) for value in values]
        if _twice(found[key]):
            raise ConfigError(f"grids: {key} lists a value twice")
    return found


def _check_presets(space: Space) -> None:
    if not space.presets:
        return
    if space.kind == "measure":
        raise ConfigError("grids: preset says how a model is trained, and kind measure trains none")
    if space.preset is not None or not all("preset" in grid for grid in space.grids):
        raise ConfigError("grids: preset stands in one grid: it stands in each, and there is no preset beside")


def _check_count(grids: list[dict[str, Any]], seeds: int) -> None:
    count = seeds * sum(math.prod(1 if v == "all" else len(v) for v in grid.values()) for grid in grids)
    if count > MOST_TRIALS:
        raise ConfigError(f"grids: {count:,} trials, and at most {MOST_TRIALS:,} can be run")


def _checked_range(key: str, where: Range) -> Range:
    if (where.choices is None) == (where.low is None or where.high is None):
        raise ConfigError(f"search: {key} needs low and high, or choices")
    if where.choices is not None:
        if not where.choices:
            raise ConfigError(f"search: {key} lists no choice")
        if where.log or where.one_minus or where.low is not None or where.high is not None:
            raise ConfigError(f"search: {key} has choices, with which low, high, log and one_minus have no effect")
        choices = [typed(key, value) for value in where.choices]
        if _twice(choices):
            raise ConfigError(f"search: {key} lists a choice twice")
        return where.model_copy(update={"choices": choices})
    low, high, kind = where.low, where.high, number_type(key)
    assert low is not None and high is not None
    if kind is None:
        raise ConfigError(f"search: {key} is no number and needs choices")
    if not (abs(low) < LARGEST and abs(high) < LARGEST):
        raise ConfigError(f"search: {key} needs ends between -2^53 and 2^53")
    if kind is int:
        if low != int(low) or high != int(high):
            raise ConfigError(f"search: {key} takes whole numbers, got {low:g} to {high:g}")
        low, high = int(low), int(high)
    else:
        low, high = float(low), float(high)
    if low >= high or (where.log and low <= 0):
        raise ConfigError(f"search: {key} needs low < high, and low above 0 on a log scale")
    for value in where.extremes():
        typed(key, value)
    return where.model_copy(update={"low": low, "high": high})


def _check_conditions(key: str, where: Range, fixed: Mapping[str, Any], search: Mapping[str, Range]) -> None:
    earlier = list(search)[: list(search).index(key)]
    for other, condition in where.when.items():
        if other not in dotted_keys():
            raise unknown_key(other)
        if other in search and other not in earlier:
            raise ConfigError(f"search: {key} depends on {other}, which has to stand before it")
        for value in condition if isinstance(condition, list) else [] if isinstance(condition, Above) else [condition]:
            if typed(other, value) != value:
                raise ConfigError(f"search: {key} when {other} is {value!r}: it cannot be")
        if other in fixed and not _holds(condition, fixed[other]):
            raise ConfigError(f"search: {key} is never drawn: {other} is {fixed[other]}")
        if other in search:
            ends = search[other].extremes()
            if not any(_holds(condition, value) for value in ends) and search[other].choices is not None:
                raise ConfigError(f"search: {key} is never drawn: {other} is one of {ends}")


def _twice(values: list[Any]) -> bool:
    return len({(type(value), value) for value in values}) < len(values)


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):
        found = error.errors(include_url=False, include_input=False)
        items = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in found[:SHOWN_ERRORS]]
        more = [f"and {len(found) - SHOWN_ERRORS} more"] if len(found) > SHOWN_ERRORS else []
        valid = ", ".join("set" if f == "fixed" else f for f in Space.model_fields)
        return f"{'; '.join([*items, *more])}; valid keys: {valid}"
    return " ".join(str(error).split())
