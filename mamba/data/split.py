"""The validation split: cut out of the training set class by class, by a seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mamba.config.schema import DataConfig
from mamba.data.images import ImageData, ImageSet, Statistics, resize
from mamba.errors import DataError


def split_validation(train: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet | None]:
    """Cut a class-balanced validation split out of the training set: round(fraction n_c) images of each class."""
    if fraction == 0:
        return train, None
    held: list[NDArray[np.int64]] = []
    for label in np.unique(train.labels):
        rows = train.index[train.labels[train.index] == label]
        rng = np.random.default_rng([seed, int(label)])
        held.append(rng.permutation(rows)[: round(fraction * len(rows))])
    val = np.sort(np.concatenate(held))
    rest = np.setdiff1d(train.index, val)
    if len(val) == 0 or len(rest) == 0:
        raise DataError(
            f"data.val_fraction {fraction} of {len(train)} training images leaves {len(rest)} to train on and "
            f"{len(val)} to validate on; choose a fraction that leaves some of both, or 0"
        )
    return ImageSet(train.images, train.labels, rest), ImageSet(train.images, train.labels, val)


def from_arrays(
    train: ImageSet, test: ImageSet, classes: tuple[str, ...], config: DataConfig, seed: int, statistics: Statistics
) -> ImageData:
    """A data set that comes as two arrays: resized to `data.img_size` where it has another side, and split."""
    side = config.img_size
    assert side is not None, "the config must be resolved"
    if train.images.shape[1] != side:
        train, test = (ImageSet.whole(resize(s.images, side), s.labels) for s in (train, test))
    train, val = split_validation(train, config.val_fraction, seed)
    return ImageData(train, val, test, classes, *statistics)
