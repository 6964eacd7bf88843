"""Policies: which operations an image gets, drawn on the host, and how a batch gets them on its device.

torchvision's own (its tables, magnitudes and operations) and timm's RandAugment of increasing severity.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamba.config.choices import Registry
from mamba.data import operations as ops
from mamba.errors import ConfigError

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Policy(Protocol):
    """`draw` on the host, then `apply` on the device to images that get the same operation."""

    slots: int
    """Operations an image, one after the other."""

    def draw(self, rng: np.random.Generator, n: int) -> tuple[Ints, Floats]:
        """(n, slots) numbers of operations, of which 0 does nothing, and (n, slots) arguments for them."""
        ...

    def apply(self, images: Tensor, code: int, arguments: Tensor) -> Tensor:
        """Operation `code` on (n, 3, side, side) uint8 with (n,) arguments -> the same shape and type."""
        ...


class Fixed(NamedTuple):
    """A torchvision operation at one signed magnitude."""

    name: str
    magnitude: float


class TorchvisionPolicy:
    """AutoAugment (https://arxiv.org/abs/1805.09501) or RandAugment (https://arxiv.org/abs/1909.13719; 2 operations,
    magnitude 9) of torchvision, as tables to draw from."""

    slots = 2

    def __init__(self, name: str, side: int) -> None:
        from torchvision.transforms import v2  # it imports torch.compile: seconds that not every process needs

        tables = {
            "autoaugment": v2.AutoAugmentPolicy.CIFAR10,
            "autoaugment_imagenet": v2.AutoAugmentPolicy.IMAGENET,
        }
        self.transform = v2.AutoAugment(tables[name]) if name in tables else v2.RandAugment(self.slots, magnitude=9)
        self.side = side
        self.operations = [Fixed("Identity", 0.0)]
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
        magnitude = 0.0 if magnitudes is None or index is None else float(magnitudes[index])
        both = [Fixed(name, magnitude), Fixed(name, -magnitude if signed else magnitude)]
        for operation in both:
            if operation not in self.operations:
                self.operations.append(operation)
        first, second = (self.operations.index(operation) for operation in both)
        return first, second

    def draw(self, rng: np.random.Generator, n: int) -> tuple[Ints, Floats]:
        nothing = np.zeros((n, self.slots), np.float32)
        sign = (rng.random((n, self.slots)) <= 0.5).astype(np.int64)
        if self.probabilities is None:
            return self.codes[rng.integers(len(self.codes), size=(n, self.slots)), sign], nothing
        chosen = rng.integers(len(self.codes), size=n)
        codes = self.codes[chosen[:, None], np.arange(self.slots), sign]
        return np.where(rng.random((n, self.slots)) <= self.probabilities[chosen], codes, 0), nothing

    def apply(self, images: Tensor, code: int, arguments: Tensor) -> Tensor:
        operation = self.operations[code]
        if operation.name == "Identity":
            return images
        return self.transform._apply_image_or_video_transform(
            images, *operation, interpolation=self.transform.interpolation, fill=self.transform._fill
        )


class Increasing(NamedTuple):
    """An operation whose severity grows with its level, 0 to 10."""

    apply: ops.Operation
    argument: Callable[[NDArray[np.float64], NDArray[np.float64], int], NDArray[np.float64]]
    """(levels, signs of 1 or -1, side in pixels) -> what the operation takes."""


def _factor(level: NDArray[np.float64], sign: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    return np.maximum(0.1, 1 + sign * level / 10 * 0.9)


INCREASING = {
    "AutoContrast": Increasing(ops.autocontrast, lambda level, sign, side: level),
    "Equalize": Increasing(ops.equalize, lambda level, sign, side: level),
    "Invert": Increasing(ops.invert, lambda level, sign, side: level),
    "Rotate": Increasing(ops.rotate, lambda level, sign, side: sign * level / 10 * 30),
    "Posterize": Increasing(ops.posterize, lambda level, sign, side: 4 - np.floor(level / 10 * 4)),
    "Solarize": Increasing(ops.solarize, lambda level, sign, side: 256 - np.floor(level / 10 * 256)),
    "SolarizeAdd": Increasing(ops.solarize_add, lambda level, sign, side: np.floor(level / 10 * 110)),
    "Color": Increasing(ops.color, _factor),
    "Contrast": Increasing(ops.contrast, _factor),
    "Brightness": Increasing(ops.brightness, _factor),
    "Sharpness": Increasing(ops.sharpness, _factor),
    "ShearX": Increasing(ops.shear_x, lambda level, sign, side: sign * level / 10 * 0.3),
    "ShearY": Increasing(ops.shear_y, lambda level, sign, side: sign * level / 10 * 0.3),
    "TranslateX": Increasing(ops.translate_x, lambda level, sign, side: sign * level / 10 * 0.45 * side),
    "TranslateY": Increasing(ops.translate_y, lambda level, sign, side: sign * level / 10 * 0.45 * side),
}
"""timm's fifteen operations of "inc1", each of which changes more at a higher level."""


class IncreasingRandAugment:
    """timm's RandAugment "rand-mM-mstdS-inc1" (https://github.com/huggingface/pytorch-image-models).

    Two operations an image, drawn with replacement, each applied with probability 0.5 at a level from a normal
    distribution around `magnitude`, clipped to 0..10. Geometry is bilinear, and fills with the mean colour.

    Args:
        side: of the images, in pixels.
        magnitude: mean level.
        deviation: of the level.
        mean: (3,), the data set's mean colour in 0..1.
    """

    slots = 2

    def __init__(self, side: int, magnitude: float, deviation: float, mean: tuple[float, ...]) -> None:
        self.side, self.magnitude, self.deviation = side, magnitude, deviation
        self.fill = torch.tensor([float(min(255, round(255 * m))) for m in mean])

    def draw(self, rng: np.random.Generator, n: int) -> tuple[Ints, Floats]:
        size = (n, self.slots)
        codes = rng.integers(len(INCREASING), size=size) + 1
        levels = np.clip(rng.normal(self.magnitude, self.deviation, size), 0, 10)
        signs = np.where(rng.random(size) < 0.5, -1.0, 1.0)
        arguments = np.zeros(size, np.float32)
        for i, operation in enumerate(INCREASING.values()):
            mine = codes == i + 1
            arguments[mine] = operation.argument(levels[mine], signs[mine], self.side)
        return np.where(rng.random(size) < 0.5, codes, 0), arguments

    def apply(self, images: Tensor, code: int, arguments: Tensor) -> Tensor:
        if code == 0:
            return images
        if self.fill.device != images.device:
            self.fill = self.fill.to(images.device)
        return list(INCREASING.values())[code - 1].apply(images, arguments, self.fill)


def apply_slot(policy: Policy, images: Tensor, codes: Ints, arguments: Tensor) -> Tensor:
    """Images in ascending order of their codes (n,), each run of equal codes worked on at once, in place."""
    edges = np.flatnonzero(np.diff(codes, prepend=-1, append=-1)).tolist()
    for lo, hi in itertools.pairwise(edges):
        if codes[lo]:
            some = images[lo:hi]
            made = policy.apply(some, int(codes[lo]), arguments[lo:hi])
            if not isinstance(made, Tensor) or made.shape != some.shape or made.dtype != some.dtype:
                about = f"{tuple(made.shape)} {made.dtype}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
                raise ConfigError(
                    f"data.augment: {type(policy).__name__} makes {about} of images {tuple(some.shape)} {some.dtype}; "
                    "valid: as many of the same shape and type"
                )
            images[lo:hi] = made
    return images


def make_policy(
    name: str, side: int, mean: tuple[float, ...], magnitude: float = 9.0, deviation: float = 0.5
) -> Policy | None:
    """The policy of `data.augment`; None where it has none."""
    return POLICIES[name](side, mean, magnitude, deviation) if name in POLICIES else None


POLICIES: Registry[Callable[[int, tuple[float, ...], float, float], Policy]] = Registry(
    "data.augment",
    {
        "randaugment": lambda side, mean, magnitude, deviation: TorchvisionPolicy("randaugment", side),
        "autoaugment": lambda side, mean, magnitude, deviation: TorchvisionPolicy("autoaugment", side),
        "autoaugment_imagenet": lambda side, mean, *_: TorchvisionPolicy("autoaugment_imagenet", side),
        "randaugment_inc": lambda side, mean, magnitude, deviation: IncreasingRandAugment(
            side, magnitude, deviation, mean
        ),
    },
    besides=("none", "basic"),
)
"""Values of `data.augment` that bring a policy; every one but `none` also crops and mirrors."""
