"""scikit-learn's digits: a data set that needs neither a download nor a GPU."""

from __future__ import annotations

import numpy as np

from mamba.config.schema import DataConfig
from mamba.data.images import ImageData, ImageSet, statistics
from mamba.data.split import from_arrays, split_validation


def load_digits_images(config: DataConfig, seed: int) -> ImageData:
    """1,797 digits, 8x8, grey repeated to 3 channels; a fixed fifth of each class is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=3)
    train, test = split_validation(ImageSet.whole(images, bunch.target.astype(np.int64)), 0.2, seed=0)
    assert test is not None
    parts = [ImageSet.whole(s.images[s.index], s.labels[s.index]) for s in (train, test)]
    classes = tuple(str(d) for d in range(10))
    return from_arrays(parts[0], parts[1], classes, config, seed, statistics(parts[0].images))
