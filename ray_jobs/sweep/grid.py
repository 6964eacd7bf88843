"""The trials of a space's grids: every point once, each in a folder whose name is its own."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from mamba.config.presets import get_preset
from mamba.errors import ConfigError
from ray_jobs.sweep.space import MOST_TRIALS, Space

LONGEST = 120
"""Characters of a trial's name: file systems take 255, and paths have other parts."""
RESERVED = {"baseline", "report", "start"}
"""Folders of an experiment that are no trials."""


@dataclass(frozen=True)
class Trial:
    """One point of a grid: the folder's name and the values that differ from the experiment's config."""

    name: str
    values: dict[str, Any]


def expand(space: Space, depth: int, prefix: str = "", given: Collection[str] = ()) -> list[Trial]:
    """Every trial of a space's grids, in order, each once.

    Args:
        space: with grids.
        depth: blocks of the model, for `cut.layer: all`.
        prefix: of the trials' names.
        given: keys that the command line gave, over whatever a preset says.

    Raises:
        ConfigError: more than MOST_TRIALS; two presets that are the same here.
    """
    lists = [{k: list(range(depth)) if v == "all" else v for k, v in grid.items()} for grid in space.grids]
    points: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}  # in order, each once: values, and those in its name
    for grid in lists:
        for point in product(*grid.values()):
            values = {**space.fixed, **dict(zip(grid, point, strict=True))}
            named = {k: v for k, v in values.items() if k in grid and (len(lists) > 1 or len(grid[k]) > 1)}
            preset = values.pop("preset", None)
            if preset is not None:
                values = {**preset_values(space.presets, str(preset), given), **values}
            _, first = points.setdefault(_identity(values), (values, named))
            if first.get("preset") != named.get("preset"):
                raise ConfigError(f"grids: presets {first['preset']} and {preset} are the same with the keys given")
            if len(points) * max(1, len(space.seeds)) > MOST_TRIALS:
                raise ConfigError(f"grids: more than {MOST_TRIALS:,} trials, the most that can be run")
    names = unique_names([named for _, named in points.values()], prefix)
    trials = []
    for name, (values, _) in zip(names, points.values(), strict=True):
        if space.seeds:
            trials += [Trial(f"{name}-seed{seed}", {**values, "seed": seed}) for seed in space.seeds]
        else:
            trials.append(Trial(name, values))
    return trials


def preset_values(presets: Sequence[str], name: str, given: Collection[str]) -> dict[str, Any]:
    """What a preset says, of the keys in which some presets differ and that the command line did not give."""
    flats = {preset: get_preset(preset).flat() for preset in presets}
    own = flats[name]
    return {
        key: value
        for key, value in own.items()
        if key not in ("name", *given) and any(flat[key] != value for flat in flats.values())
    }


def unique_names(points: Sequence[Mapping[str, Any]], prefix: str = "") -> list[str]:
    """A folder's name for each point, different from all others on every file system, whatever the keys and values.

    Made of the last word of each key (the whole key where two end alike) and of the value. Where characters had to be
    replaced, where two names would be the same but for upper and lower case, and where a name would be too long, a hash
    of keys and values is added.
    """
    keys = dict.fromkeys(key for point in points for key in point)
    leaves = Counter(key.rpartition(".")[2].casefold() for key in keys)
    labels = {key: leaf if leaves[leaf.casefold()] == 1 else key for key in keys for leaf in [key.rpartition(".")[2]]}
    names, exact = [], []
    for point in points:
        words = [f"{labels[key]}-{_text(key, value)}" for key, value in point.items()]
        name = prefix + ("_".join(words) or "one")
        plain = re.sub(r"[^A-Za-z0-9._-]", "-", name)
        names.append(plain)
        exact.append(plain == name and len(name) <= LONGEST)
    alike = defaultdict(list)
    for i, name in enumerate(names):
        alike[name.casefold()].append(i)
    for same in alike.values():
        for i in same:
            if len(same) > 1 or not exact[i] or names[i].casefold() in RESERVED:
                digest = hashlib.sha256(_identity(points[i]).encode()).hexdigest()[:10]
                names[i] = f"{names[i][:LONGEST]}-{digest}"
    return names


def check_names(names: Iterable[str]) -> None:
    """Refuse trials' names that are no folder's, or not each its own: those of a file that others may have written.

    Raises:
        ConfigError: the name.
    """
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}", name):
            raise ConfigError(
                f"a trial's name is {name!r}, and must be a folder's of letters, digits, '.', '_' and '-'"
            )
        if name.casefold() in seen | RESERVED:
            raise ConfigError(f"a trial's name is {name!r}, which is another's too")
        seen.add(name.casefold())


def _identity(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _text(key: str, value: Any) -> str:
    return f"{value:02d}" if isinstance(value, int) and key.endswith(".layer") else str(value)
