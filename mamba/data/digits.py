"""scikit-learn's digits: a data set that needs neither a download nor a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamba.config.schema import DataConfig
from mamba.data.images import ImageData, ImageSet, statistics
from mamba.data.split import from_arrays, split_validation


def read_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Levels from 0 to 16, (1797, 8, 8), and labels (1797,), from scikit-learn's file: importing the library for it
    takes more than a second, in every process of a sweep."""
    package = find_spec("sklearn")
    for folder in (package.submodule_search_locations or []) if package else []:
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.exists():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target.astype(np.int64)


def load_digits_images(config: DataConfig, seed: int) -> ImageData:
    """1,797 digits, 8x8, grey repeated to 3 channels; a fixed fifth of each class is the test set."""
    levels, labels = read_digits()
    images = np.repeat(np.round(levels * (255 / 16)).astype(np.uint8)[..., None], 3, axis=3)
    train, test = split_validation(ImageSet.whole(images, labels), 0.2, seed=0)
    assert test is not None
    parts = [ImageSet.whole(s.images[s.index], s.labels[s.index]) for s in (train, test)]
    classes = tuple(str(d) for d in range(10))
    return from_arrays(parts[0], parts[1], classes, config, seed, statistics(parts[0].images))
