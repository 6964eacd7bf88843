"""CIFAR through torchvision, without a network."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mamba.data.registry import describe, load_data
from mamba.errors import DataError
from tests.data.helpers import config


def write_cifar10(root):
    """A valid, small CIFAR-10 in torchvision's own format (its checksums are switched off by the caller)."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))


def test_cifar10_through_torchvision(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = load_data(config(dataset="cifar10", root=tmp_path), 0)
    assert (len(data.train), len(data.val), len(data.test)) == (90, 10, 20)
    assert data.train.images.shape == (100, 32, 32, 3) and data.classes[3] == "class3"


@pytest.mark.parametrize("name, inner", [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_cifar_without_network_says_where_to_put_it(tmp_path, monkeypatch, name, inner):
    def offline(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(DataError, match=f"{inner} and could not be downloaded .*no network.*python.tar.gz into"):
        load_data(config(dataset=name, root=tmp_path), 0)


def test_describe_cifar_without_files(tmp_path):
    assert describe(config(dataset="cifar10", root=tmp_path / "none"), 0) == (10, 45_000)
    assert describe(config(dataset="cifar100", root=tmp_path / "none"), 0) == (100, 45_000)
