"""Data sets by name: one dictionary, in step with the config."""

from __future__ import annotations

from typing import get_args

from mamba.config.facts import DATASETS as KNOWN
from mamba.config.schema import DataConfig
from mamba.data.digits import load_digits_images
from mamba.data.registry import DATASETS, Source, load_data
from tests.data.helpers import config


def test_the_registry_is_in_step_with_the_config():
    assert set(DATASETS) == set(get_args(DataConfig.model_fields["dataset"].annotation))
    assert {name: source.facts for name, source in DATASETS.items()} == KNOWN


def test_a_data_set_is_one_entry(monkeypatch):
    monkeypatch.setitem(DATASETS, "toy", Source(8, load_digits_images))
    data = load_data(config(dataset="digits").model_copy(update={"dataset": "toy"}), 0)
    assert len(data.train) == 1295


def test_the_digits_file_holds_what_scikit_learn_reads():
    from sklearn.datasets import load_digits

    from mamba.data.digits import read_digits

    levels, labels = read_digits()
    bunch = load_digits()
    assert (levels == bunch.images).all() and (labels == bunch.target).all() and labels.dtype == "int64"
