"""Small things that train in milliseconds."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # what only hands tests to other processes needs none of it
    from mamba.config.schema import RunConfig
    from mamba.data.images import ImageData, ImageSet
    from mamba.train.hooks import TrainHook

WORKER = "PYTEST_XDIST_WORKER" in os.environ
"""Is this one of several processes that run tests?"""
if WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"  # each has a core
    if os.environ["PYTEST_XDIST_WORKER"] != "gw0" and hasattr(os, "nice"):
        os.nice(5)  # gw0 begins with Ray's tests, the longest chain: the others fill what it leaves

ROOT = Path(__file__).parent.parent
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
    from mamba.config.schema import RunConfig

    overrides = {k.replace("__", "."): v for k, v in values.items()}
    return RunConfig(out=out).with_values({**SMALL, **overrides}).resolve()


@pytest.fixture
def small_config(tmp_path: Path):
    """`make_small_config` in this test's folder."""
    return partial(make_small_config, tmp_path / "runs")


def make_small_data() -> ImageData:
    """Three classes of 8x8 images that differ in brightness: 72 to train, 24 to validate, 30 to test on."""
    import numpy as np

    from mamba.data.images import ImageData, ImageSet
    from mamba.data.split import split_validation

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
        from mamba.train.distributed import local_process
        from mamba.train.trainer import fit

        return fit(small_config(**values), local_process(), tmp_path / name, data, hooks)

    (tmp_path / "run").mkdir()
    return run


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not item.get_closest_marker("gpu"):
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


# --- several processes: `pytest -n auto` ------------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, for tests of Ray wait half of their time; at most four: each takes a gigabyte and
    reads all tests."""
    return min(len(os.sched_getaffinity(0)) + 1, 4)


@cache
def starts_ray(file: str) -> bool:
    """Has a test file, relative to the root, tests that need a cluster?"""
    return "pytest.mark.cluster" in (ROOT / file).read_text()


@cache
def interprets(file: str) -> bool:
    """Has a test file, relative to the root, tests of Triton's interpreter, which one process is started for?"""
    return "(in_the_interpreter" in (ROOT / file).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file stay together, for they share what is trained for them; those that start Ray are one group,
    which begins, and those that have Triton interpret its kernels another. (Marks of groups do nothing here:
    https://github.com/pytest-dev/pytest-xdist/issues/1386.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "Ray" if starts_ray(file) else "Triton" if interprets(file) else file

    config.option.loadscopereorder = False  # as collected, not the most tests first
    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few tests come last, so that the processes end together."""
    if not WORKER:
        return
    files = [item.nodeid.split("::")[0] for item in items]
    tests = Counter(files)
    ranked = sorted(zip(files, items, strict=True), key=lambda one: (not starts_ray(one[0]), -tests[one[0]], one[0]))
    items[:] = [item for _, item in ranked]


def pytest_collection_finish() -> None:
    """What was imported stays: the collector of garbage need not look at it (a million objects) again and again."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # some libraries complain at the end of what is left
    if "torch" in sys.modules:
        from pruning import measure

        measure.TURNS, measure.SECONDS = 1, 0.02  # a speed that no test looks at need not be taken long
