"""Small things that train in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mamba.config.schema import RunConfig
from mamba.data.images import ImageData, ImageSet
from mamba.data.split import split_validation
from mamba.train.distributed import local_process
from mamba.train.hooks import TrainHook
from mamba.train.trainer import fit

SMALL = {
    "data.dataset": "digits",
    "data.batch_size": 16,
    "data.augment": "none",
    "model.d_model": 12,
    "model.depth": 2,
    "model.d_state": 4,
    "model.drop_path": 0.2,
    "optim.epochs": 3,
    "optim.lr": 5e-3,
    "optim.warmup_epochs": 1,
    "ema.decay": 0.9,
}


def make_small_config(out: Path, **values: Any) -> RunConfig:
    """A resolved config of a two-block model; overrides as dotted keys, with two underscores for a dot."""
    overrides = {k.replace("__", "."): v for k, v in values.items()}
    return RunConfig(out=out).with_values({**SMALL, **overrides}).resolve()


@pytest.fixture
def small_config(tmp_path: Path):
    """`make_small_config` in this test's folder."""
    return partial(make_small_config, tmp_path / "runs")


def make_small_data() -> ImageData:
    """Three classes of 8x8 images that differ in brightness: 72 to train, 24 to validate, 30 to test on."""
    rng = np.random.default_rng(0)

    def images(n: int) -> ImageSet:
        labels = np.arange(n) % 3
        pixels = rng.integers(0, 90, (n, 8, 8, 3)) + 80 * labels[:, None, None, None]
        return ImageSet.whole(pixels.astype(np.uint8), labels.astype(np.int64))

    train, val = split_validation(images(96), 0.25, seed=0)
    return ImageData(train, val, images(30), ("dark", "grey", "bright"), (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="session")
def small_data() -> ImageData:
    """`make_small_data`, once."""
    return make_small_data()


@pytest.fixture
def small_fit(small_config, small_data, tmp_path):
    """Train in this process: (folder name, overrides) -> the result; the same name again continues the run."""

    def run(
        name: str = "run", data: ImageData = small_data, hooks: Sequence[TrainHook] = (), **values: Any
    ) -> dict[str, Any]:
        return fit(small_config(**values), local_process(), tmp_path / name, data, hooks)

    (tmp_path / "run").mkdir()
    return run


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
