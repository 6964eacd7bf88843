"""Data sets by name. To add one: a file that loads it, an entry in `DATASETS`, and its name in `data.dataset`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mamba.config.choices import Registry
from mamba.config.resolve import DATASET_SIDES
from mamba.config.schema import DataConfig
from mamba.data.cifar import load_cifar
from mamba.data.digits import load_digits_images
from mamba.data.folder import load_folder
from mamba.data.images import ImageData
from mamba.data.sound import check_images
from mamba.data.split import VAL_FRACTION


@dataclass(frozen=True)
class Source:
    """A data set that can be named in `data.dataset`."""

    side: int
    """Side in pixels that `data.img_size` takes when it is not given."""
    load: Callable[[DataConfig, int], ImageData]
    """A resolved config and the split's seed -> the data, decoded and split."""
    classes: int | None = None
    """Number of classes, where it is the same for everybody."""
    train_images: int | None = None
    """Size of the training set before the split, likewise; it is balanced."""


DATASETS = Registry(
    "data.dataset",
    {
        "digits": Source(DATASET_SIDES["digits"], load_digits_images, 10),
        "cifar10": Source(DATASET_SIDES["cifar10"], load_cifar, 10, 50_000),
        "cifar100": Source(DATASET_SIDES["cifar100"], load_cifar, 100, 50_000),
        "folder": Source(DATASET_SIDES["folder"], load_folder),
    },
)


def load_data(config: DataConfig, seed: int) -> ImageData:
    """Load, or decode and cache, the data set of a resolved config. Safe to call from many processes at once.

    Raises:
        DataError: missing, empty, inconsistent or unreadable files, what was looked for and where; what is no data
            set, of a source that was added.
    """
    assert config.img_size is not None, "the config must be resolved"
    data = DATASETS[config.dataset].load(config, seed)
    return check_images(data, f"data.dataset '{config.dataset}'", config.img_size)


def describe(config: DataConfig, seed: int) -> tuple[int, int]:
    """Number of classes and of training images; of CIFAR, without downloading it."""
    source = DATASETS[config.dataset]
    if source.classes and source.train_images:
        per_class = source.train_images // source.classes
        fraction = VAL_FRACTION if config.val_fraction is None else config.val_fraction
        return source.classes, source.classes * (per_class - round(fraction * per_class))
    data = load_data(config, seed)
    return len(data.classes), len(data.train)
