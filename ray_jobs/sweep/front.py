"""The Pareto front: what nothing else beats. Ours beside Optuna's `best_trials`, since grids have a front too and no
study."""

from __future__ import annotations

from collections.abc import Sequence


def unbeaten(points: Sequence[Sequence[float]]) -> list[int]:
    """The places of points, less being better in each of their values, of which no other is at least as good in every
    value and better in one. Points that are the same beat none of each other."""
    kept = [tuple(point) for point in points]

    def beaten(point: tuple[float, ...]) -> bool:
        return any(q != point and all(b <= a for a, b in zip(point, q, strict=True)) for q in kept)

    return [place for place, point in enumerate(kept) if not beaten(point)]
