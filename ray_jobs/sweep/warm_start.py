"""What a search may begin with: the best values that another search found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mamba.errors import ConfigError
from ray_jobs.sweep.experiment import load
from ray_jobs.sweep.front import unbeaten
from ray_jobs.sweep.results import read_trial
from ray_jobs.sweep.space import Range, Space
from ray_jobs.sweep.study import verdict


def best_of(folder: Path, space: Space) -> list[dict[str, Any]]:
    """What of another search's best trials this space can draw too: the best, or those on the front of two objectives.

    Raises:
        ConfigError: no search there, or nothing in common.
    """
    other = load(folder)
    if not other.space.search:
        raise ConfigError(f"--warm-start {folder}: it is no search")
    done = []
    for path in sorted(folder.glob("trial-*")):
        result = read_trial(path)
        values = verdict(other.space, result)[1] if result else None
        if values and result:
            modes = other.space.objectives.values()
            signed = [v if mode == "min" else -v for v, mode in zip(values, modes, strict=True)]
            done.append((signed, result["values"]))
    best = [done[place][1] for place in unbeaten([signed for signed, _ in done])]
    found = []
    for values in best if len(other.space.objectives) > 1 else best[:1]:
        params = {k: w.drawn(values[k]) for k, w in space.search.items() if k in values and _within(w, values[k])}
        if params:
            found.append(params)
    if not found:
        raise ConfigError(f"--warm-start {folder}: none of its best values is within this space")
    return found


def _within(where: Range, value: Any) -> bool:
    distribution = where.distribution()
    try:
        return bool(distribution._contains(distribution.to_internal_repr(where.drawn(value))))
    except (ValueError, TypeError):
        return False
