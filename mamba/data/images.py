"""Images in memory: a split of a data set, the data set, and what every source of images needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """A split: rows `index` of images (n, side, side, 3) uint8 and labels (n,) int64."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def whole(cls, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> ImageSet:
        return cls(images, labels, np.arange(len(labels)))


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

    @property
    def side(self) -> int:
        """Of its square images, in pixels."""
        return self.train.images.shape[1]

    def normalise(self, images: Tensor) -> Tensor:
        """(n, side, side, 3) uint8 -> (n, 3, side, side) float32 with mean 0 and deviation 1, on the same device."""
        mean, std = (torch.tensor(v, device=images.device) for v in (self.mean, self.std))
        return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def resize(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(n, any, any, 3) -> (n, side, side, 3), bicubic."""
    return np.stack([np.asarray(Image.fromarray(i).resize((side, side), Image.Resampling.BICUBIC)) for i in images])


Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of each channel, in [0, 1]."""


def statistics(images: NDArray[np.uint8]) -> Statistics:
    """Mean and deviation of each channel in [0, 1], over at most 10,000 images spread over the set."""
    some = images[:: max(1, len(images) // 10_000)].astype(np.float32) / 255
    mean, std = some.mean(axis=(0, 1, 2), dtype=np.float64), some.std(axis=(0, 1, 2), dtype=np.float64)
    return tuple(mean.tolist()), tuple(np.maximum(std, 1e-3).tolist())
