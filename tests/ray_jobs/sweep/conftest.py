"""One trained model for all tests of sweeps."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from mamba.config.schema import RunConfig
from mamba.data.images import ImageData
from mamba.train.distributed import local_process
from mamba.train.trainer import fit
from ray_jobs.sweep.shared import Shared, _loaded
from tests.conftest import SMALL


def small_run(folder: Path, data: ImageData | None, **values: Any) -> Path:
    """A run with a model of two blocks, trained in this process on the given images, or on the digits."""
    own = {"out": folder.parents[1], "name": folder.parent.name, "trial": folder.name}
    config = RunConfig().with_values({**SMALL, **own, **values}).resolve()
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    fit(config, local_process(), folder, data)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, small_data: ImageData) -> Path:
    """A run on `small_data`."""
    folder = tmp_path_factory.mktemp("trained") / "runs" / "small" / "one"
    return small_run(folder, small_data, **{"data.batch_size": 24})


@pytest.fixture(scope="session")
def trained_on_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for sweeps whose trials have processes of their own."""
    folder = tmp_path_factory.mktemp("trained") / "runs" / "small" / "digits"
    return small_run(folder, None, **{"data.batch_size": 128})


@pytest.fixture(scope="session", autouse=True)
def _what_is_imported_is_not_looked_at_again() -> None:
    """A trial collects its garbage when it ends, which takes as long as there are objects; some are of late imports."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def shared_of(trained: Path, tmp_path: Path, small_data: ImageData, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(kind, values of the experiment's config) -> what trials of an experiment share, in this test's folder. They
    train and measure on `small_data`."""
    monkeypatch.setattr("ray_jobs.sweep.shared.load_data", lambda config, seed: small_data)
    _loaded.cache_clear()

    def shared(kind: str = "measure", folder: str = "exp", **changes: Any) -> Shared:
        values = {key.replace("__", "."): value for key, value in changes.items() if "__" in key}
        own = {key: value for key, value in changes.items() if "__" not in key}
        config = RunConfig.from_yaml(trained / "config.yaml").with_values({"trial": None, **values})
        where = tmp_path / "runs" / folder
        where.mkdir(parents=True, exist_ok=True)
        checkpoint = trained if kind == "measure" else None
        tree = config.model_dump(mode="json")
        return Shared(**{"kind": kind, "folder": where, "config": tree, "checkpoint": checkpoint, "threads": 1,
                         "workers": 1, "gpu": False, **own})  # fmt: skip

    yield shared
    _loaded.cache_clear()
