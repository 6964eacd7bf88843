"""Data sets by name. To add one: a file that loads it, an entry in `DATASETS`, and its name in `data.dataset`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mamba.config.choices import Registry
from mamba.config.facts import DATASETS as KNOWN
from mamba.config.facts import DatasetFacts
from mamba.config.schema import DataConfig
from mamba.data.cifar import load_cifar
from mamba.data.digits import load_digits_images
from mamba.data.folder import load_folder
from mamba.data.images import ImageData
from mamba.data.sound import check_images
from mamba.data.split import VAL_FRACTION
from mamba.errors import DataError


@dataclass(frozen=True)
class Source:
    """A data set that can be named in `data.dataset`."""

    side: int | None
    """Side in pixels that `data.img_size` takes when it is not given; None: it has to be given."""
    load: Callable[[DataConfig, int], ImageData]
    """A resolved config and the split's seed -> the data, decoded and split."""
    classes: int | None = None
    """Number of classes, where it is the same for everybody."""
    train_images: int | None = None
    """Size of the training set before the split, likewise; it is balanced."""
    rooted: bool = True
    """Whether it lies in `data.root`."""
    files: bool = False
    """Whether its images are files, for which `data.fit`, `data.cache`, `data.strict` and `data.split_from` count."""

    @property
    def facts(self) -> DatasetFacts:
        """What the config has to know."""
        return DatasetFacts(self.side, self.rooted, self.files)


DATASETS = Registry(
    "data.dataset",
    {
        "digits": Source(load=load_digits_images, classes=10, **KNOWN["digits"]._asdict()),
        "cifar10": Source(load=load_cifar, classes=10, train_images=50_000, **KNOWN["cifar10"]._asdict()),
        "cifar100": Source(load=load_cifar, classes=100, train_images=50_000, **KNOWN["cifar100"]._asdict()),
        "folder": Source(load=load_folder, **KNOWN["folder"]._asdict()),
    },
    facts=KNOWN,
    fact=lambda source: source.facts,
)


def load_data(config: DataConfig, seed: int) -> ImageData:
    """Load, or decode and cache, the data set of a resolved config. Safe to call from many processes at once.

    Raises:
        DataError: missing, empty, inconsistent or unreadable files, what was looked for and where; what is no data
            set, of a source that was added.
    """
    assert config.img_size is not None, "the config must be resolved"
    source, where = DATASETS[config.dataset], f"data.dataset '{config.dataset}'"
    data = check_images(source.load(config, seed), where, config.img_size)
    if source.classes not in (None, len(data.classes)):
        raise DataError(
            f"{where} is registered with {source.classes} classes, and its images are of {len(data.classes)}"
        )
    return data


def describe(config: DataConfig, seed: int) -> tuple[int, int]:
    """Number of classes and of training images; of CIFAR, without downloading it."""
    source = DATASETS[config.dataset]
    if source.classes and source.train_images:
        per_class = source.train_images // source.classes
        fraction = VAL_FRACTION if config.val_fraction is None else config.val_fraction
        return source.classes, source.classes * (per_class - round(fraction * per_class))
    data = load_data(config, seed)
    return len(data.classes), len(data.train)
