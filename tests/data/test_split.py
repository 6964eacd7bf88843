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


@pytest.mark.parametrize(
    "counts, fraction, message",
    [
        ((3, 3), 0.1, r"2 of 2 classes: a \(3 and 0\), b \(3 and 0\) .* choose a fraction from 0.17 to 0.83, or 0"),
        ((40, 4), 0.1, r"1 of 2 classes: b \(4 and 0\) .* choose a fraction from 0.13 to 0.87, or 0"),
        ((1, 9), 0.6, r"1 of 2 classes: a \(0 and 1\) .*; give such classes two images or more"),
        ((2, 9), 0.9, r"1 of 2 classes: a \(0 and 2\)"),
    ],
)
def test_a_split_that_leaves_a_class_without_images_is_refused(counts, fraction, message):
    labels = np.repeat([0, 1], counts)
    tiny = ImageSet.whole(np.zeros((len(labels), 2, 2, 3), np.uint8), labels)
    with pytest.raises(DataError, match=message):
        split_validation(tiny, fraction, 0, ("a", "b"))


def test_the_split_has_a_seed_of_its_own():
    own, seed = load_data(config(dataset="digits", split_seed=3), 0), load_data(config(dataset="digits"), 3)
    assert np.array_equal(own.val.index, seed.val.index) and own.split == seed.split and own.split.seed == 3
    assert load_data(config(dataset="digits", val_fraction=0.2), 0).split.fraction == 0.2


def test_resized_digits():
    data = load_data(config(dataset="digits", img_size=16), 0)
    assert data.train.images.shape[1:] == data.test.images.shape[1:] == (16, 16, 3)
