"""The validation split: cut out of the training set class by class, by a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mamba.config.schema import DataConfig
from mamba.data.held import split_like
from mamba.data.images import ImageData, ImageSet, Split, Statistics, resize
from mamba.data.sound import check_classes, check_set
from mamba.errors import DataError

VAL_FRACTION = 0.1
"""What `data.val_fraction` None means of a run that starts from nothing."""


def split_training(
    train: ImageSet, config: DataConfig, seed: int, classes: Sequence[str]
) -> tuple[ImageSet, ImageSet | None, Split]:
    """Cut the validation split as `data.split_from` says, else `data.val_fraction` and `data.split_seed` (None:
    `seed`)."""
    if config.split_from is not None:
        return *split_like(train, config.split_from, classes), Split(None, None)
    fraction = VAL_FRACTION if config.val_fraction is None else config.val_fraction
    seed = seed if config.split_seed is None else config.split_seed
    train, val = split_validation(train, fraction, seed, classes)
    return train, val, Split(seed, fraction)


def split_validation(
    train: ImageSet, fraction: float, seed: int, classes: Sequence[str] = ()
) -> tuple[ImageSet, ImageSet | None]:
    """Cut a class-balanced validation split out of the training set: round(fraction n_c) images of each class.

    Raises:
        DataError: a class would have no image left to train on, or none to validate on; with the numbers.
    """
    if fraction == 0:
        return train, None
    held: list[NDArray[np.int64]] = []
    for label in np.unique(train.labels):
        rows = train.index[train.labels[train.index] == label]
        kept = round(fraction * len(rows))
        if kept == 0 or kept == len(rows):
            raise _unbalanced(train, fraction, classes)
        rng = np.random.default_rng([seed, int(label)])
        held.append(rng.permutation(rows)[:kept])
    val = np.sort(np.concatenate(held))
    rest = np.setdiff1d(train.index, val)
    return replace(train, index=rest), replace(train, index=val)


def _unbalanced(train: ImageSet, fraction: float, classes: Sequence[str]) -> DataError:
    """Says how many images each class would train and validate with, the smallest classes first."""
    labels, counts = np.unique(train.labels[train.index], return_counts=True)
    order = np.argsort(counts, kind="stable")
    bad = [i for i in order if round(fraction * counts[i]) in (0, counts[i])]
    name = lambda i: classes[int(labels[i])] if classes else f"number {int(labels[i])}"  # noqa: E731
    shown = ", ".join(
        f"{name(i)} ({counts[i] - round(fraction * counts[i])} and {round(fraction * counts[i])})" for i in bad[:5]
    )
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    smallest = int(counts.min())
    advice = "give such classes two images or more"
    if smallest > 1:
        least = math.floor(50 / smallest + 1) / 100  # above half an image
        most = math.ceil(100 - 50 / smallest - 1) / 100
        advice = f"choose a fraction from {least:g} to {max(least, most):g}, or 0"
    return DataError(
        f"data.val_fraction {fraction:g} of {len(train)} training images leaves no image to train on, or none to "
        f"validate on, of {len(bad)} of {len(counts)} classes: {shown}{more} (to train and to validate on); {advice}"
    )


def from_arrays(
    train: ImageSet, test: ImageSet, classes: tuple[str, ...], config: DataConfig, seed: int, statistics: Statistics
) -> ImageData:
    """A data set that comes as two arrays: resized to `data.img_size` where it has another side, and split.

    Raises:
        DataError: arrays that are no images with labels, or a split that leaves a class without one.
    """
    side, where = config.img_size, f"data.dataset '{config.dataset}'"
    assert side is not None, "the config must be resolved"
    check_classes(classes, where)
    for name, part in (("training", train), ("test", test)):
        check_set(part, classes, f"{where}: the {name} set")
    if train.images.shape[1] != side:  # hashes stay those of the originals: the same data at every size
        train, test = (replace(s, images=resize(s.images[:], side), hashes=s.pixel_hashes) for s in (train, test))
    train, val, split = split_training(train, config, seed, classes)
    return ImageData(train, val, test, classes, *statistics, split=split)
