"""How far an accuracy can be trusted: the images behind it, and its standard error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ray_jobs.report.rows import Row, measured, score

IMAGES = "val/images"


def standard_error(percent: float, images: float) -> float:
    """Standard error, in points, of an accuracy measured on so many images: that of a binomial share.

    Of none or all right the formula says 0, which no finite number of images can show: half an image is taken instead.
    """
    if images < 1:
        return math.nan
    share = min(max(percent / 100, 0.5 / images), 1 - 0.5 / images)
    return 100 * math.sqrt(share * (1 - share) / images)


def images_of(rows: Sequence[Row], baseline: Mapping[str, Any]) -> int:
    """Images of the validation split that all trials share; 0 where nothing says so."""
    counts = {measured(row, IMAGES) for row in rows} | {measured({"metrics": baseline}, IMAGES)}
    known = {int(count) for count in counts if count}
    return known.pop() if len(known) == 1 else 0


def error_of(rows: Sequence[Row], images: int) -> float | None:
    """Standard error of the mean score of trials that differ in their seed alone; of one trial, that of its images.
    None where it cannot be known."""
    values = [value for row in rows if (value := score(row)) is not None]
    if len(values) > 1:
        return statistics.stdev(values) / math.sqrt(len(values))
    return standard_error(values[0], images) if values and images else None


def images_in_words(images: int) -> str:
    """How coarse the percents of a split are: `143 images: one is 0.7 points`."""
    return f"{images:,} image{'s' * (images != 1)}: one is {100 / images:.2g} points"
