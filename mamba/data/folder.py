"""Image folders: data.root/{train, test or val}/<class>/<image>, and what is said of what they hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from mamba.config.schema import DataConfig
from mamba.data.cache import Job, open_images
from mamba.data.files import ImageFiles, known_of
from mamba.data.images import ImageData, ImageSet, statistics
from mamba.data.listing import Listing, count, is_hidden, list_split
from mamba.data.split import split_training
from mamba.errors import DataError

SPLITS = ("train", "val", "test")
DECODED_BYTES = 8 * 2**30
"""More than this, all splits together, is not decoded into a cache by `data.cache` auto."""


def load_folder(config: DataConfig, seed: int) -> ImageData:
    """data.root/train and data.root/test or data.root/val. With both test and val, val is the validation split as it
    is; with val alone, val is the final test and the validation split is cut out of train."""
    root = config.root
    held_out = [name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not held_out:
        raise DataError(
            f"data.root {root} is not an image folder; it must hold train/<class>/<image> and test/ or val/ likewise"
        )
    listings = {name: list_split(root / name) for name in ("train", *held_out)}
    classes = _classes(root, listings)
    left_out = said_of(root, listings)
    if left_out and config.strict:
        raise DataError(f"data.strict: {left_out}; remove it, or leave data.strict out")
    keep = keep_files(config, sum(len(listing.files) for listing in listings.values()))
    sets = {name: _images(config, name, listing, keep) for name, listing in listings.items()}
    test, images = sets[held_out[0]], sets["train"].images
    if isinstance(images, ImageFiles):
        (mean, std), sample = known_of(images)
        sets["train"] = replace(sets["train"], sample=sample)
    else:
        mean, std = statistics(images)
    notes: tuple[str, ...] = (left_out,) if left_out else ()
    if len(held_out) == 2:
        if config.split_from is not None:
            raise DataError(f"data.split_from {config.split_from} has no effect: {root}/val is the validation split")
        asked = {"data.val_fraction": config.val_fraction, "data.split_seed": config.split_seed}
        idle = [f"{key} {value}" for key, value in asked.items() if value is not None]
        if idle:
            notes += (f"{root}/val is the validation split as it is: {' and '.join(idle)} without effect",)
        return ImageData(sets["train"], sets["val"], test, classes, mean, std, notes)
    train, val, split = split_training(sets["train"], config, seed, classes)
    return ImageData(train, val, test, classes, mean, std, notes, split)


def keep_files(config: DataConfig, images: int) -> bool:
    """Whether images stay files, by the rule of `data.cache`."""
    assert config.img_size is not None, "the config must be resolved"
    return config.cache == "files" or (config.cache == "auto" and images * config.img_size**2 * 3 > DECODED_BYTES)


def _images(config: DataConfig, name: str, listing: Listing, keep: bool) -> ImageSet:
    assert config.img_size is not None
    job, index = Job(config.root, name, listing.files, config.img_size, config.fit), np.arange(len(listing.labels))
    if keep:
        return ImageSet(ImageFiles(job), listing.labels, index, listing.files)
    images, hashes = open_images(job)
    return ImageSet(images, listing.labels, index, listing.files, hashes)


def _classes(root: Path, listings: dict[str, Listing]) -> tuple[str, ...]:
    """The classes that all splits share; raises DataError where they differ or are too few."""
    classes = listings["train"].classes
    for name, listing in listings.items():
        if listing.classes != classes:
            here, there = set(classes), set(listing.classes)
            texts = (("train", here - there), (name, there - here))
            raise DataError(
                f"the class folders of {root}/train and {root}/{name} differ; "
                + "; ".join(f"only in {where}/: {sorted(names)}" for where, names in texts if names)
            )
    if len(classes) < 2:
        raise DataError(f"{root}/train holds one class, {classes[0]}; a classifier needs two or more")
    return classes


def said_of(root: Path, listings: dict[str, Listing]) -> str:
    """One line about what was not read, with counts; empty where nothing was left out."""
    unread, hidden = Counter[str](), Counter[str]()
    loose = 0
    for listing in listings.values():
        unread, hidden, loose = unread + listing.unread, hidden + listing.hidden, loose + listing.loose
    others = sorted(d.name for d in root.iterdir() if d.is_dir() and d.name not in SPLITS and not is_hidden(d.name))
    parts = []
    if unread:
        parts.append(f"{sum(unread.values()):,} files that are no images to Pillow ({count(unread)})")
    if loose:
        parts.append(f"{loose:,} files beside the class folders")
    if hidden:
        parts.append(f"hidden: {', '.join(f'{number} {name}' for name, number in hidden.most_common(5))}")
    if others:
        shown = ", ".join(f"{name}/" for name in others[:5])
        parts.append(f"{shown}{' and more' if len(others) > 5 else ''} beside train/")
    read = sum(len(listing.files) for listing in listings.values())
    return f"{root}: {read:,} images read, left out were {'; '.join(parts)}" if parts else ""
