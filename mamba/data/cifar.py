"""CIFAR-10 and CIFAR-100, read and downloaded by torchvision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from filelock import FileLock

from mamba.config.schema import DataConfig
from mamba.data.images import ImageData, ImageSet
from mamba.data.split import from_arrays
from mamba.errors import DataError

CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def load_cifar(config: DataConfig, seed: int) -> ImageData:
    """CIFAR-10 or CIFAR-100, as `config.dataset` names it; normalised by the usual constants."""
    train, test, classes = _read(config.dataset, config.root)
    return from_arrays(train, test, classes, config, seed, CIFAR_STATISTICS[config.dataset])


def _read(name: str, root: Path) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    from torchvision.datasets import CIFAR10, CIFAR100  # not above: a slow import

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    folder = root / source.base_folder
    try:
        try:
            parts = [source(str(root), train=train) for train in (True, False)]
        except RuntimeError:  # missing or incomplete
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{name}.lock"):
                parts = [source(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
        raise DataError(
            f"{name} is not complete at {folder} and could not be downloaded ({error}); on a machine without network, "
            f"unpack {source.filename} into {root}, so that {folder} exists"
        ) from None
    sets = [ImageSet.whole(p.data, np.asarray(p.targets, dtype=np.int64)) for p in parts]
    return sets[0], sets[1], tuple(parts[0].classes)
