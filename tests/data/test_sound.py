"""What is no data set is refused by what is wrong with it, whoever made it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mamba.config.schema import RunConfig
from mamba.data.images import ImageData, ImageSet, statistics
from mamba.data.registry import DATASETS, Source, load_data
from mamba.data.sound import check_images
from mamba.data.split import from_arrays
from mamba.errors import DataError


def images(n=60, side=16, kind=np.uint8, channels=3, seed=0):
    labels = np.arange(n) % 2
    pixels = np.random.default_rng(seed).integers(0, 60, (n, side, side, channels)) + 80 * labels[:, None, None, None]
    return ImageSet.whole(pixels.astype(kind), labels.astype(np.int64))


@pytest.fixture
def source():
    """Loads a data set that a module of a user's has registered."""

    def load(found, side=16, **more):
        DATASETS["mine"] = Source(side=side, load=found, **more)
        config = RunConfig().with_values({"data.dataset": "mine", "data.img_size": 16}).resolve()
        return load_data(config.data, 0)

    yield load
    if "mine" in DATASETS:
        del DATASETS["mine"]


ARRAYS = {
    "fractions": (lambda s: replace(s, images=s.images.astype(np.float32) / 255), "and type float32; valid: .* uint8"),
    "four channels": (lambda s: images(channels=4), r"shape \(60, 16, 16, 4\)"),
    "grey": (lambda s: images(channels=1), r"shape \(60, 16, 16, 1\)"),
    "channels first": (lambda s: replace(s, images=s.images.transpose(0, 3, 1, 2)), r"shape \(60, 3, 16, 16\)"),
    "no squares": (lambda s: replace(s, images=s.images[:, :8]), r"shape \(60, 8, 16, 3\)"),
    "labels below": (lambda s: replace(s, labels=s.labels - 1), "labels from -1 to 0; valid: 0 to 1, for 2 classes"),
    "labels above": (lambda s: replace(s, labels=s.labels + 1), "labels from 1 to 2; valid: 0 to 1"),
    "fewer labels": (lambda s: replace(s, labels=s.labels[:-5]), r"labels of shape \(55,\) .*one for each image"),
    "one-hot": (lambda s: replace(s, labels=np.eye(2, dtype=np.int64)[s.labels]), r"labels of shape \(60, 2\)"),
    "other numbers": (lambda s: replace(s, labels=s.labels.astype(np.int32)), "type int32; valid: .* int64"),
    "nothing": (lambda s: ImageSet.whole(s.images[:0], s.labels[:0]), "0 rows of 0 images"),
    "none": (lambda s: None, "is a NoneType; valid: an ImageSet"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_no_images_with_labels(source, name):
    change, told = ARRAYS[name]

    def load(config, seed):
        train = images()
        return from_arrays(change(train), images(20, seed=1), ("a", "b"), config, seed, statistics(train.images))

    with pytest.raises(DataError, match=f"data.dataset 'mine': the training set.*{told}"):
        source(load)


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (("a", "a"), "each name once"),
        (("a",), "two or more"),
        (("a", ""), "each name once"),
        ((0, 1), "a tuple of their names"),
        ("ab", "a tuple of their names"),
        (("a", "b", "c"), "class c has no image to train on"),
    ],
)
def test_classes_that_name_nothing(source, classes, told):
    def load(config, seed):
        return from_arrays(images(), images(20, seed=1), classes, config, seed, statistics(images().images))

    with pytest.raises(DataError, match=f"data.dataset 'mine': .*{told}"):
        source(load)


WHOLE = ImageData(images(), images(10, seed=4), images(20, seed=1), ("a", "b"), (0.5,) * 3, (0.2,) * 3)
CHANGED = {
    "other sides": ({"test": images(20, 8)}, "the test set's images are of 8 pixels; valid: those of .*, 16"),
    "no deviation": ({"std": (0.0,) * 3}, r"std \(0.0, 0.0, 0.0\); valid: three finite numbers above 0"),
    "NaN": ({"mean": (float("nan"),) * 3}, "valid: three finite numbers"),
    "one number": ({"mean": (0.5,)}, "valid: three finite numbers"),
    "validated on what is trained on": ({"val": WHOLE.train}, "60 of 60 validation images are training images"),
    "no test": ({"test": None}, "the test set is a NoneType"),
    "rows twice": ({"test": replace(WHOLE.test, index=np.zeros(3, np.int64))}, "each once"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_data_that_is_none(source, name):
    values, told = CHANGED[name]
    with pytest.raises(DataError, match=f"data.dataset 'mine': .*{told}"):
        source(lambda config, seed: replace(WHOLE, **values))


def test_a_source_that_gives_something_else(source):
    with pytest.raises(DataError, match="data.dataset 'mine' gives a NoneType; valid: an ImageData"):
        source(lambda config, seed: None)


def test_a_source_that_gives_other_classes_than_it_says(source):
    """A dry run counts parameters by what it says."""
    with pytest.raises(DataError, match="'mine' is registered with 7 classes, and its images are of 2"):
        source(lambda config, seed: WHOLE, classes=7)


def test_what_is_sound_is_taken(source, small_data):
    assert source(lambda config, seed: WHOLE) is WHOLE
    assert check_images(small_data, "here") is small_data


def test_a_trainer_looks_too(small_fit, small_data):
    with pytest.raises(DataError, match="the data given: .*float64"):
        small_fit(data=replace(small_data, test=replace(small_data.test, images=small_data.test.images / 255)))
