"""Sweeps as data: YAML files checked against the run config, and what they expand to.

question: what the sweep answers                    cost: what it takes
kind: measure (cut a trained model, evaluate it) | train
set: {dotted key: value}                            the same for every trial
grids: [{dotted key: [values]}, ...]                each a product; together their union; cut.layer: all
search: {dotted key: {low, high, log, one_minus} | {choices}}       drawn by Optuna
objectives: {metric: max | min}                     of a search; two make a Pareto front
trials: how many a search draws                     seeds: [...] repeats every trial
early_stop: {grace_epochs, reduction}               ASHA, for one objective and training trials
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mamba.config.keys import current
from mamba.config.schema import RunConfig
from mamba.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "search_spaces"
Scalar = bool | int | float | str | None


class Range(BaseModel):
    """Where a search draws a value from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float | int | None = None
    high: float | int | None = None
    log: bool = False
    one_minus: bool = False
    """The value is one minus what is drawn: for decays close to 1 on a log scale."""
    choices: list[Scalar] | None = None

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


class EarlyStop(BaseModel):
    """ASHA (https://arxiv.org/abs/1810.05934): after grace_epochs, and each time `reduction` times as many, only the
    best 1 / reduction of the trials go on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grace_epochs: int = Field(1, ge=1)
    reduction: int = Field(3, ge=2)


class Space(BaseModel):
    """One file of `search_spaces/`."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    question: str
    cost: str
    kind: Literal["measure", "train"]
    fixed: dict[str, Scalar] = Field(default_factory=dict, alias="set")
    grids: list[dict[str, list[Scalar] | Literal["all"]]] = Field(default_factory=list)
    search: dict[str, Range] = Field(default_factory=dict)
    objectives: dict[str, Literal["max", "min"]] = Field(default_factory=dict)
    trials: int = Field(0, ge=0)
    seeds: list[int] = Field(default_factory=list)
    early_stop: EarlyStop | None = None

    @field_validator("fixed", "grids", "search", mode="before")
    @classmethod
    def _by_todays_names(cls, given: Any) -> Any:
        if isinstance(given, list):
            return [cls._by_todays_names(grid) for grid in given]
        return current(given, "the search space") if isinstance(given, dict) else given


@dataclass(frozen=True)
class Trial:
    """One point of a grid: the folder's name and the values that differ from the experiment's config."""

    name: str
    values: dict[str, Any]


def load_space(path: str | Path) -> Space:
    """Read and check a space: a file's path, or the name of one that ships.

    Raises:
        ConfigError: the file, the key, what was wrong, what is valid.
    """
    file = Path(path)
    if not file.is_file() and (FOLDER / f"{path}.yaml").exists():
        file = FOLDER / f"{path}.yaml"
    try:
        tree = yaml.safe_load(file.read_text())
        space = Space.model_validate(tree)
    except FileNotFoundError:
        shipped = ", ".join(sorted(f.stem for f in FOLDER.glob("*.yaml")))
        raise ConfigError(f"there is no search space {path}; a file, or one of those that ship: {shipped}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {_sentence(error)}") from None
    try:
        _check(space)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return space


def expand(space: Space, depth: int, prefix: str = "") -> list[Trial]:
    """Every trial of a space's grids, in order, each once.

    Args:
        space: with grids.
        depth: blocks of the model, for `cut.layer: all`.
        prefix: of the trials' names.
    """
    trials: dict[str, Trial] = {}
    for grid in space.grids:
        lists = {key: list(range(depth)) if values == "all" else values for key, values in grid.items()}
        for point in product(*lists.values()):
            values = {**space.fixed, **dict(zip(lists, point, strict=True))}
            seeds: list[int | None] = [*space.seeds] or [None]
            for seed in seeds:
                own = values if seed is None else {**values, "seed": seed}
                varied = {k: v for k, v in own.items() if k in lists and (len(space.grids) > 1 or len(lists[k]) > 1)}
                name = prefix + (_slug(varied) or "one") + (f"-seed{seed}" if seed is not None else "")
                trials[name] = Trial(name, own)
    return list(trials.values())


def _slug(values: dict[str, Any]) -> str:
    words = []
    for key, value in values.items():
        leaf = key.rpartition(".")[2]
        words.append(f"{leaf}-{value:02d}" if isinstance(value, int) and leaf == "layer" else f"{leaf}-{value}")
    return "_".join(words)


def _check(space: Space) -> None:
    """Every key and every extreme value against the config's own bounds, and the parts against each other."""
    if bool(space.grids) == bool(space.search):
        raise ConfigError("a space has either grids or search, one of them and not empty")
    base = RunConfig().with_values(space.fixed)
    for grid in space.grids:
        if not grid:
            raise ConfigError("grids: an empty grid has no trial")
        for key, values in grid.items():
            if values == "all":
                if key != "cut.layer":
                    raise ConfigError(f"grids: '{key}: all' means nothing; only cut.layer takes all")
                continue
            if not values:
                raise ConfigError(f"grids: {key} lists no value")
            for value in values:
                base.with_values({key: value})
    for key, where in space.search.items():
        if (where.choices is None) == (where.low is None or where.high is None):
            raise ConfigError(f"search: {key} needs low and high, or choices")
        if where.choices is None:
            assert where.low is not None and where.high is not None
            if where.low >= where.high or (where.log and where.low <= 0):
                raise ConfigError(f"search: {key} needs low < high, and low above 0 on a log scale")
        elif not where.choices:
            raise ConfigError(f"search: {key} lists no choice")
        for value in where.extremes():
            base.with_values({key: value})
    if space.search and not (space.objectives and space.trials):
        raise ConfigError("a search needs objectives and a number of trials")
    if len(space.objectives) > 2:
        raise ConfigError("objectives: one or two")
    if space.early_stop and (space.kind != "train" or len(space.objectives) != 1):
        raise ConfigError("early_stop needs kind train and one objective")


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):
        items = (f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors(include_url=False))
        return f"{'; '.join(items)}; valid keys: {', '.join('set' if f == 'fixed' else f for f in Space.model_fields)}"
    return " ".join(str(error).split())
