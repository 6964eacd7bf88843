"""Whether a data set is one: what every source of images, one of a user's too, has to give before anything trains on
it. Looks at shapes, types, labels and rows, never at pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mamba.data.images import ImageData, ImageSet
from mamba.errors import DataError


def check_images(data: Any, where: str, side: int | None = None) -> ImageData:
    """Returns the data.

    Args:
        data: what a source gave.
        where: the source, for the error.
        side: that was asked for; None: any.

    Raises:
        DataError: what is wrong, and what is valid.
    """
    if not isinstance(data, ImageData):
        raise DataError(f"{where} gives a {type(data).__name__}; valid: an ImageData")
    check_classes(data.classes, where)
    for name, part in (("training", data.train), ("validation", data.val), ("test", data.test)):
        if part is None and name == "validation":
            continue
        found = check_set(part, data.classes, f"{where}: the {name} set").images.shape[1]
        if found != (side or data.side):
            raise DataError(
                f"{where}: the {name} set's images are of {found} pixels; valid: those of data.img_size, "
                f"{side or data.side}"
            )
    seen = np.bincount(data.train.labels[data.train.index], minlength=len(data.classes))
    if not seen.all():
        raise DataError(f"{where}: class {data.classes[int(seen.argmin())]} has no image to train on")
    if data.val is not None and data.val.images is data.train.images:
        both = len(np.intersect1d(data.val.index, data.train.index))
        if both:
            raise DataError(f"{where}: {both} of {len(data.val)} validation images are training images")
    for key, values, low in (("mean", data.mean, -math.inf), ("std", data.std, 0.0)):
        if len(values) != 3 or not all(math.isfinite(v) and v > low for v in values):
            raise DataError(
                f"{where}: {key} {tuple(values)}; valid: three finite numbers{' above 0' * (key == 'std')}, of pixels "
                "from 0 to 1"
            )
    return data


def check_classes(classes: Any, where: str) -> None:
    """Raises DataError for what does not name classes, each once."""
    if not isinstance(classes, Sequence) or isinstance(classes, str) or not all(isinstance(c, str) for c in classes):
        raise DataError(f"{where}: classes {classes!r:.80}; valid: a tuple of their names")
    if len(classes) < 2 or len({*classes, ""}) <= len(classes):
        raise DataError(f"{where}: classes {', '.join(classes):.80}; valid: two or more, each name once")


def check_set(part: Any, classes: Sequence[str], where: str) -> ImageSet:
    """Returns the set; raises DataError for what is no split of images with labels."""
    if not isinstance(part, ImageSet):
        raise DataError(f"{where} is a {type(part).__name__}; valid: an ImageSet")
    shape, n = tuple(part.images.shape), len(part.images)
    kind = getattr(part.images, "dtype", np.dtype(np.uint8))  # files that are decoded when asked have none
    if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or kind != np.uint8:
        raise DataError(
            f"{where} has images of shape {shape} and type {kind}; valid: (number, side, side, 3), uint8 from 0 to 255"
        )
    labels = part.labels
    if not isinstance(labels, np.ndarray) or labels.shape != (n,) or labels.dtype != np.int64:
        about = f"shape {labels.shape} and type {labels.dtype}" if isinstance(labels, np.ndarray) else repr(labels)[:40]
        raise DataError(f"{where} has labels of {about}; valid: ({n},), int64, one for each image")
    rows = part.index
    if not len(rows) or rows.min() < 0 or rows.max() >= n or len(np.unique(rows)) < len(rows):
        raise DataError(f"{where} has {len(rows)} rows of {n} images; valid: some of 0 to {n - 1}, each once")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        raise DataError(f"{where} has labels from {low} to {high}; valid: 0 to {len(classes) - 1}, for {len(classes)} "
                        "classes")  # fmt: skip
    return part
