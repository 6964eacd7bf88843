"""Splits are fixed, disjoint, balanced, or refused."""

from __future__ import annotations

import numpy as np
import pytest

from mamba.data.images import ImageSet
from mamba.data.registry import load_data
from mamba.data.split import split_validation
from mamba.errors import DataError
from tests.data.helpers import config


def test_digits_splits_are_fixed_disjoint_and_balanced():
    data, other_seed = load_data(config(dataset="digits"), 0), load_data(config(dataset="digits"), 1)
    assert (len(data.train), len(data.val), len(data.test)) == (1295, 143, 359)
    assert data.train.images.shape[1:] == (8, 8, 3) and data.train.images.max() == 255
    assert not set(data.train.index) & set(data.val.index)
    assert np.array_equal(data.test.images, other_seed.test.images)  # the test set does not depend on the seed
    assert not np.array_equal(data.val.index, other_seed.val.index)
    counts = np.bincount(data.val.labels[data.val.index])
    assert counts.min() >= 14 and counts.max() <= 15
    assert np.array_equal(data.val.index, load_data(config(dataset="digits"), 0).val.index)


def test_no_validation_split():
    data = load_data(config(dataset="digits", val_fraction=0), 0)
    assert data.val is None and len(data.train) == 1438


def test_validation_split_that_would_be_empty():
    tiny = ImageSet.whole(np.zeros((6, 2, 2, 3), np.uint8), np.array([0, 0, 0, 1, 1, 1]))
    with pytest.raises(DataError, match="data.val_fraction 0.1 of 6 training images leaves 6 to train on and 0"):
        split_validation(tiny, 0.1, 0)


def test_resized_digits():
    data = load_data(config(dataset="digits", img_size=16), 0)
    assert data.train.images.shape[1:] == data.test.images.shape[1:] == (16, 16, 3)
