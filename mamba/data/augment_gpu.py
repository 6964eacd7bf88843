"""The augmentation of `augment.py` for many images at once, on the device that holds them.

What happens to an image is drawn on the host, as a function of (seed, epoch, step) for the whole global batch, so it
depends neither on how the batch is shared out nor on which images are worked on together. Images that get the same
operation at the same magnitude lie next to each other while torchvision's batched function is applied to them: the
policies, magnitudes and operations are torchvision's own, only the order of the work differs.

Against the single-image path: operations are torchvision's for tensors instead of Pillow's, which differ by rounding,
and the random numbers are others. The distributions are the same (tests/data/test_augment_gpu.py).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


class Operation(NamedTuple):
    """A torchvision operation at one signed magnitude."""

    name: str
    magnitude: float


class Policy:
    """torchvision's AutoAugment (CIFAR-10) or RandAugment (2 operations, magnitude 9) as tables to draw from."""

    slots = 2

    def __init__(self, name: str, side: int) -> None:
        from torchvision.transforms import v2

        self.transform = (
            v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
            if name == "autoaugment"
            else v2.RandAugment(num_ops=self.slots, magnitude=9)
        )
        self.side = side
        self.operations = [Operation("Identity", 0.0)]
        if isinstance(self.transform, v2.AutoAugment):
            sub_policies = self.transform._policies  # ((operation, probability, magnitude index), ...) a slot
            rows = [[self._entry(op, 10, index) for op, _, index in pair] for pair in sub_policies]
            self.codes = np.array(rows)  # (sub-policy, slot, sign)
            chances = [[p for _, p, _ in pair] for pair in sub_policies]
            self.probabilities: NDArray[np.float64] | None = np.array(chances)
        else:
            bins, magnitude = self.transform.num_magnitude_bins, self.transform.magnitude
            table = [self._entry(op, bins, magnitude) for op in self.transform._AUGMENTATION_SPACE]
            self.codes, self.probabilities = np.array(table), None

    def _entry(self, name: str, bins: int, index: int | None) -> tuple[int, int]:
        """Numbers in `operations` of an operation with magnitude as it is and negated (the same one where unsigned)."""
        values, signed = self.transform._AUGMENTATION_SPACE[name]
        magnitudes = values(bins, self.side, self.side)
        magnitude = 0.0 if magnitudes is None else float(magnitudes[index])
        both = [Operation(name, magnitude), Operation(name, -magnitude if signed else magnitude)]
        for operation in both:
            if operation not in self.operations:
                self.operations.append(operation)
        first, second = (self.operations.index(operation) for operation in both)
        return first, second

    def draw(self, rng: np.random.Generator, n: int) -> Ints:
        """(n, slots) numbers in `operations`; 0 does nothing."""
        sign = (rng.random((n, self.slots)) <= 0.5).astype(np.int64)
        if self.probabilities is None:
            return self.codes[rng.integers(len(self.codes), size=(n, self.slots)), sign]
        chosen = rng.integers(len(self.codes), size=n)
        codes = self.codes[chosen[:, None], np.arange(self.slots), sign]
        return np.where(rng.random((n, self.slots)) <= self.probabilities[chosen], codes, 0)

    def apply(self, images: Tensor, operation: Operation) -> Tensor:
        """(n, 3, side, side) uint8 -> the same."""
        return self.transform._apply_image_or_video_transform(
            images, *operation, interpolation=self.transform.interpolation, fill=self.transform._fill
        )


@dataclass
class Draws:
    """What is to happen to n images: crop offsets and mirroring, operations, rectangle to erase (y0, y1, x0, x1)."""

    crop: Ints  # (n, 3): rows down, columns right, mirrored
    codes: Ints  # (n, slots)
    erase: Ints  # (n, 4), an empty rectangle for most

    def part(self, lo: int, hi: int) -> Draws:
        return Draws(self.crop[lo:hi], self.codes[lo:hi], self.erase[lo:hi])

    @classmethod
    def join(cls, parts: list[Draws]) -> Draws:
        return cls(
            np.concatenate([p.crop for p in parts]),
            np.concatenate([p.codes for p in parts]),
            np.concatenate([p.erase for p in parts]),
        )


class BatchAugment:
    """`draw` on the host, `transform` and `erase` on the device."""

    def __init__(self, augment: str, random_erasing: float, side: int, seed: int) -> None:
        self.side, self.seed, self.random_erasing = side, seed, random_erasing
        self.pad = max(1, side // 8) if augment != "none" else 0
        self.policy = Policy(augment, side) if augment in ("autoaugment", "randaugment") else None

    def draw(self, epoch: int, step: int, batch_size: int) -> Draws:
        """For a global batch."""
        rng = np.random.default_rng([self.seed, epoch, step, 2])
        crop = np.zeros((batch_size, 3), np.int64)
        if self.pad:
            crop[:, :2] = rng.integers(2 * self.pad + 1, size=(batch_size, 2))
            crop[:, 2] = rng.random(batch_size) < 0.5
        codes = self.policy.draw(rng, batch_size) if self.policy else np.zeros((batch_size, 0), np.int64)
        return Draws(crop, codes, self._rectangles(rng, batch_size))

    def _rectangles(self, rng: np.random.Generator, n: int) -> Ints:
        """As torchvision's RandomErasing with its default scale and ratio: the first of ten tries that fits."""
        if self.random_erasing == 0:
            return np.zeros((n, 4), np.int64)
        side = self.side
        area = side**2 * rng.uniform(0.02, 0.33, (n, 10))
        ratio = np.exp(rng.uniform(np.log(0.3), np.log(3.3), (n, 10)))
        height, width = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (height < side) & (width < side)
        first = fits.argmax(1)
        h, w = (v[np.arange(n), first].astype(np.int64) for v in (height, width))
        y, x = (np.floor(rng.random(n) * (side - np.minimum(v, side) + 1)).astype(np.int64) for v in (h, w))
        erased = (rng.random(n) < self.random_erasing) & fits.any(1)
        return np.stack([y, y + h, x, x + w], axis=1) * erased[:, None]

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Crop, flip and policy. (n, 3, side, side) uint8 -> the same."""
        if not self.pad:
            return images
        device, n = images.device, len(images)
        orders = [draws.codes[:, slot].argsort(kind="stable") for slot in range(draws.codes.shape[1])]
        table = torch.from_numpy(np.column_stack([draws.crop, *orders, *(o.argsort(kind="stable") for o in orders)]))
        columns = to_device(table.t().contiguous(), device)
        images = self._crop(images, *columns[:3])
        assert len(table) == n
        for slot, order in enumerate(orders):
            assert self.policy is not None
            forth, back = columns[3 + slot], columns[3 + len(orders) + slot]
            codes = draws.codes[order, slot]
            edges = np.flatnonzero(np.diff(codes, prepend=-1, append=-1)).tolist()
            images = images[forth]
            for lo, hi in itertools.pairwise(edges):
                operation = self.policy.operations[codes[lo]]
                if operation.name != "Identity":
                    images[lo:hi] = self.policy.apply(images[lo:hi], operation)
            images = images[back]
        return images

    def _crop(self, images: Tensor, dy: Tensor, dx: Tensor, mirrored: Tensor) -> Tensor:
        side, n = self.side, len(images)
        at = torch.arange(side, device=images.device)
        rows = at + dy[:, None]
        columns = torch.where(mirrored[:, None] > 0, side - 1 - at, at) + dx[:, None]
        padded = F.pad(images, (self.pad,) * 4)
        entry = torch.arange(n, device=images.device)[:, None, None, None]
        channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
        return padded[entry, channel, rows[:, None, :, None], columns[:, None, None, :]]

    def erase(self, images: Tensor, rectangles: Tensor) -> Tensor:
        """Zero a rectangle (y0, y1, x0, x1) of each normalised image; (n, 3, side, side) and (n, 4)."""
        if self.random_erasing == 0:
            return images
        at = torch.arange(self.side, device=images.device)
        y0, y1, x0, x1 = rectangles[:, :, None].unbind(1)
        rows, columns = (at >= y0) & (at < y1), (at >= x0) & (at < x1)
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy that does not wait for what the device still has to do."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
