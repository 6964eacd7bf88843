"""Images: a split of a data set, the data set, and what every source of images needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mamba.data.copies import copies
from mamba.data.decode import hash_images
from mamba.data.listing import Files

FEW = 100
"""Validation or test images below which it is said what one of them is worth."""


class Images(Protocol):
    """(n, side, side, 3) uint8: an array, a file that is mapped into memory, or files that are decoded when asked."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True)
class ImageSet:
    """A split: rows `index` of images (n, side, side, 3) uint8 and labels (n,) int64."""

    images: Images
    labels: NDArray[np.int64]
    index: NDArray[np.int64]
    files: Files | None = None
    """Where the images come from, if from files of their own."""
    hashes: NDArray[np.uint64] | None = None
    """(n,): of every image's pixels, where they are known."""
    sample: str = ""
    """A digest of the pixels of `spread`, where images stay files; else it follows from their hashes."""

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def whole(cls, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> ImageSet:
        return cls(images, labels, np.arange(len(labels)))

    @cached_property
    def pixel_hashes(self) -> NDArray[np.uint64] | None:
        """(n,): `hashes`, computed where the images are an array; None where that would read every file."""
        if self.hashes is None and isinstance(self.images, np.ndarray):
            return hash_images(self.images)
        return self.hashes


@dataclass(frozen=True)
class Split:
    """How the validation split was cut out of the training set. None: it is that of another run (`data.split_from`)."""

    seed: int | None
    fraction: float | None


@dataclass(frozen=True)
class ImageData:
    """The splits of a data set, its class names, and the per-channel statistics of its training images in [0, 1].

    `val` is None where nothing was kept for validation.
    """

    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()
    """What its source has to say to the user, a line each."""
    split: Split | None = None
    """None: the splits are as they were found."""

    @property
    def side(self) -> int:
        """Of its square images, in pixels."""
        return self.train.images.shape[1]

    def normalise(self, images: Tensor) -> Tensor:
        """(n, side, side, 3) uint8 -> (n, 3, side, side) float32 with mean 0 and deviation 1, on the same device."""
        return normalise(images, self.mean, self.std)

    def remarks(self) -> list[str]:
        """What a user should know before believing a number of this data, a line each: `notes`, splits so small that
        an image is worth a point, test images that are training images too."""
        lines = list(self.notes)
        for name, part in (("validation split", self.val), ("test set", self.test)):
            if part is not None and 0 < len(part) < FEW:
                points = 100 / len(part)
                lines.append(f"{name} of {len(part)} images: one is {points:.{0 if points >= 10 else 1}f} points")
        lines += self._validated_on_training_images()
        train, test = self.train.pixel_hashes, self.test.pixel_hashes
        if train is not None and test is not None:
            both = int(np.isin(test[self.test.index], train).sum())
            if both:
                lines.append(f"{both:,} of {len(self.test):,} test images are training images too, pixel for pixel")
        elif self.train.files is not None and self.test.files is not None:
            both = copies(self.train.files, self.test.files)
            if both:
                lines.append(
                    f"{both:,} of {len(self.test):,} test images are training images too, byte for byte (pixels are "
                    "not compared with data.cache files)"
                )
        return lines

    def _validated_on_training_images(self) -> list[str]:
        """Where an image lies twice in the training set, one may be trained on and the other validated on."""
        if self.val is None:
            return []
        train, val = self.train.pixel_hashes, self.val.pixel_hashes
        if train is None or val is None:
            return []
        both = int(np.isin(val[self.val.index], train[self.train.index]).sum())
        more = f"{both:,} of {len(self.val):,} validation images are training images too, pixel for pixel: the "
        return [more + "validation accuracy is too high by as much as those are known"] if both else []


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(n, side, side, 3) uint8 -> (n, 3, side, side) float32, on the same device."""
    shift, scale = (torch.tensor(v, device=images.device) for v in (mean, std))
    return ((images.float() / 255 - shift) / scale).permute(0, 3, 1, 2).contiguous()


def resize(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(n, any, any, 3) -> (n, side, side, 3), bicubic."""
    return np.stack([np.asarray(Image.fromarray(i).resize((side, side), Image.Resampling.BICUBIC)) for i in images])


Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of each channel, in [0, 1]."""


def spread(n: int) -> NDArray[np.int64]:
    """Up to 20,000 of n rows, evenly: those that statistics are taken of."""
    return np.arange(0, n, max(1, n // 10_000))


class Moments:
    """Sums of pixels and of their squares, exact, from which `Statistics` follow."""

    def __init__(self) -> None:
        self.total, self.squares, self.count = np.zeros(3, np.int64), np.zeros(3, np.int64), 0

    def add(self, images: NDArray[np.uint8]) -> None:
        flat = images.reshape(-1, 3)
        for lo in range(0, len(flat), 2**18):  # as 64-bit numbers they take eight times the memory
            pixels = flat[lo : lo + 2**18].astype(np.int64)
            self.total, self.squares = self.total + pixels.sum(0), self.squares + (pixels**2).sum(0)
        self.count += len(flat)

    def result(self) -> Statistics:
        mean = self.total / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        return tuple((mean / 255).tolist()), tuple(np.maximum(std / 255, 1e-3).tolist())


def statistics(images: Images) -> Statistics:
    """Mean and deviation of each channel in [0, 1], over the images of `spread`; exact, a few images at a time."""
    rows, moments = spread(len(images)), Moments()
    for lo in range(0, len(rows), 64):
        moments.add(np.asarray(images[rows[lo : lo + 64]]))
    return moments.result()
