"""Test-time augmentation: several views of each image, whose class probabilities are averaged."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mamba.config.schema import DataConfig


@dataclass(frozen=True)
class Views:
    """The image, its mirror image, then both shifted right, left, down and up, as many as `count`.

    Args:
        count: views of each image, at least 1; there are no more than `most`.
        flip: whether mirror images belong to the data.
        shift: in pixels, edges reflected; 0: none.
    """

    count: int = 1
    flip: bool = True
    shift: int = 0

    @classmethod
    def fitting(cls, count: int, data: DataConfig, side: int) -> Views:
        """Of what the model was trained on: mirrored only where training mirrors, and shifted by half of what the
        training crop moves an image at most; where training does neither, there is one view."""
        if data.augment == "none":
            return cls(1, flip=False, shift=0)
        most = side * (1 - math.sqrt(data.crop_scale)) / 2 if data.crop == "resized" else side // 8
        asked = cls(count, flip=True, shift=int(most / 2 + 0.5))
        return cls(min(count, asked.most), asked.flip, asked.shift)

    @property
    def most(self) -> int:
        """How many there are."""
        return (1 + self.flip) * (5 if self.shift else 1)

    def __call__(self, images: Tensor) -> list[Tensor]:
        """(n, c, side, side) -> `count` tensors of the same shape, the first the images themselves."""
        side, shift = images.shape[-1], self.shift
        steps = [(0, 0)] + ([(0, shift), (0, -shift), (shift, 0), (-shift, 0)] if shift else [])
        padded = F.pad(images, (shift,) * 4, mode="reflect") if shift else images
        result: list[Tensor] = []
        for dy, dx in steps:
            moved = padded[:, :, shift - dy : shift - dy + side, shift - dx : shift - dx + side]
            result += [moved, moved.flip(-1)] if self.flip else [moved]
            if len(result) >= self.count:
                break
        return result[: self.count]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


ONE = Views()
"""The image as it is."""
