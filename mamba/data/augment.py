"""Augmentation of many images at once, on the device that holds them: crop, mirror, policy, rectangles.

What happens to an image is drawn on the host, as a function of (seed, epoch, step) for the whole global batch, so it
depends neither on how the batch is shared out nor on which images are worked on together, nor on the device. Images
that get the same operation lie next to each other while it is applied to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mamba.config.schema import DataConfig
from mamba.data import operations
from mamba.data.policies import Floats, Ints, apply_slot, make_policy


@dataclass
class Draws:
    """What is to happen to n images."""

    boxes: Ints  # (n, 5): first row, first column, rows, columns of the crop, mirrored; outside of the image is black
    codes: Ints  # (n, slots): operations of the policy
    arguments: Floats  # (n, slots)
    erased: Ints  # (n, 2, 4): rectangles y0, y1, x0, x1 of random erasing and of cutout, empty for most

    def part(self, lo: int, hi: int) -> Draws:
        return Draws(self.boxes[lo:hi], self.codes[lo:hi], self.arguments[lo:hi], self.erased[lo:hi])

    @classmethod
    def join(cls, parts: list[Draws]) -> Draws:
        return cls(
            np.concatenate([p.boxes for p in parts]),
            np.concatenate([p.codes for p in parts]),
            np.concatenate([p.arguments for p in parts]),
            np.concatenate([p.erased for p in parts]),
        )


class BatchAugment:
    """`draw` on the host, `transform` and `erase` on the device.

    Random erasing: https://arxiv.org/abs/1708.04896; cutout: https://arxiv.org/abs/1708.04552; the random resized crop
    is torchvision's (ratio 3/4 to 4/3) with the area of `data.crop_scale`.

    Args:
        config: resolved.
        side: of the images, in pixels.
        mean: (3,), the data set's mean colour in 0..1.
        seed: of the run.
    """

    def __init__(self, config: DataConfig, side: int, mean: tuple[float, ...], seed: int) -> None:
        self.side, self.seed = side, seed
        self.random_erasing, self.cutout = config.random_erasing, config.cutout
        self.moves = config.augment != "none"  # crops and mirrors
        self.resized, self.scale = config.crop == "resized", config.crop_scale
        self.pad = max(1, side // 8)
        self.policy = make_policy(config.augment, side, mean, config.magnitude, config.magnitude_std)

    @property
    def active(self) -> bool:
        return self.moves or self.random_erasing > 0 or self.cutout > 0

    # --- on the host -------------------------------------------------------------------------------------------------

    def draw(self, epoch: int, step: int, batch_size: int) -> Draws:
        """For a global batch."""
        rng = np.random.default_rng([self.seed, epoch, step, 2])
        boxes = np.tile(np.array([0, 0, self.side, self.side, 0]), (batch_size, 1))
        if self.moves:
            if self.resized:
                boxes[:, :4] = self._resized_boxes(rng, batch_size)
            else:
                boxes[:, :2] = rng.integers(-self.pad, self.pad + 1, size=(batch_size, 2))
            boxes[:, 4] = rng.random(batch_size) < 0.5
        if self.policy:
            codes, arguments = self.policy.draw(rng, batch_size)
        else:
            codes, arguments = np.zeros((batch_size, 0), np.int64), np.zeros((batch_size, 0), np.float32)
        erased = np.stack([self._rectangles(rng, batch_size), self._squares(rng, batch_size)], axis=1)
        return Draws(boxes, codes, arguments, erased)

    def _resized_boxes(self, rng: np.random.Generator, n: int) -> Ints:
        """As torchvision's RandomResizedCrop; (n, 4)."""
        side = self.side
        height, width, fits = self._tries(rng, n, (self.scale, 1.0), (3 / 4, 4 / 3), side)
        h, w = np.where(fits, height, side), np.where(fits, width, side)  # torchvision's fallback: all of a square
        y, x = (_offset(rng, side - v) for v in (h, w))
        return np.stack([y, x, h, w], axis=1)

    def _rectangles(self, rng: np.random.Generator, n: int) -> Ints:
        """As torchvision's RandomErasing with its default scale and ratio; (n, 4)."""
        if self.random_erasing == 0:
            return np.zeros((n, 4), np.int64)
        h, w, fits = self._tries(rng, n, (0.02, 0.33), (0.3, 3.3), self.side - 1)
        y, x = (_offset(rng, np.maximum(self.side - v, 0)) for v in (h, w))
        erased = (rng.random(n) < self.random_erasing) & fits
        return np.stack([y, y + h, x, x + w], axis=1) * erased[:, None]

    def _squares(self, rng: np.random.Generator, n: int) -> Ints:
        """Cutout: a square around any pixel, cut off at the edges; (n, 4)."""
        if self.cutout == 0:
            return np.zeros((n, 4), np.int64)
        first = rng.integers(self.side, size=(n, 2)) - self.cutout // 2
        edges = np.stack([first[:, 0], first[:, 0] + self.cutout, first[:, 1], first[:, 1] + self.cutout], axis=1)
        return edges.clip(0, self.side)

    def _tries(
        self, rng: np.random.Generator, n: int, scale: tuple[float, float], ratio: tuple[float, float], limit: int
    ) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        """Heights and widths of the first of ten tries that fits within `limit`, and whether one did."""
        area = self.side**2 * rng.uniform(*scale, (n, 10))
        aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1]), (n, 10)))
        height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (height <= limit) & (width <= limit) & (height > 0) & (width > 0)
        first = fits.argmax(1)
        h, w = (v[np.arange(n), first].astype(np.int64) for v in (height, width))
        return h, w, np.asarray(fits.any(1))

    # --- on the device -----------------------------------------------------------------------------------------------

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Crop, mirror and policy. (n, 3, side, side) uint8 -> the same."""
        if not self.moves:
            return images
        device, slots = images.device, draws.codes.shape[1]
        orders = [draws.codes[:, slot].argsort(kind="stable") for slot in range(slots)]
        table = np.column_stack([draws.boxes, *orders, *(o.argsort(kind="stable") for o in orders)])
        columns = to_device(torch.from_numpy(table.T.copy()), device)
        ordered = [draws.arguments[order, slot] for slot, order in enumerate(orders)]
        arguments = to_device(torch.from_numpy(np.stack(ordered)), device) if ordered else None
        top, left, _, _, mirrored = boxes = columns[:5]
        images = operations.resample(images, boxes.T) if self.resized else self._crop(images, top, left, mirrored)
        for slot, order in enumerate(orders):
            assert self.policy is not None and arguments is not None
            forth, back = columns[5 + slot], columns[5 + slots + slot]
            codes = draws.codes[order, slot]
            images = apply_slot(self.policy, images[forth], codes, arguments[slot])[back]
        return images

    def _crop(self, images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
        """A crop of the same side that may reach `pad` pixels out of the image."""
        side, n = self.side, len(images)
        at = torch.arange(side, device=images.device)
        rows = at + top[:, None] + self.pad
        columns = torch.where(mirrored[:, None] > 0, side - 1 - at, at) + left[:, None] + self.pad
        padded = F.pad(images, (self.pad,) * 4)
        entry = torch.arange(n, device=images.device)[:, None, None, None]
        channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
        return padded[entry, channel, rows[:, None, :, None], columns[:, None, None, :]]

    def erase(self, images: Tensor, rectangles: Tensor) -> Tensor:
        """Zero the rectangles (y0, y1, x0, x1) of each normalised image; (n, 3, side, side) and (n, 2, 4)."""
        if self.random_erasing == 0 and self.cutout == 0:
            return images
        at = torch.arange(self.side, device=images.device)
        y0, y1, x0, x1 = rectangles[..., None].unbind(2)
        rows, columns = (at >= y0) & (at < y1), (at >= x0) & (at < x1)
        return images.masked_fill((rows[..., :, None] & columns[..., None, :]).any(1)[:, None], 0.0)


def _offset(rng: np.random.Generator, room: Ints) -> Ints:
    """A whole number from 0 to `room`, both included, for each of them."""
    return np.floor(rng.random(len(room)) * (room + 1)).astype(np.int64)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy that does not wait for what the device still has to do."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
