"""From any one image to what a trained model reads: the same decoding, resizing and scaling as in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mamba.data.decode import fit_image, read_fitted, to_rgb
from mamba.data.images import normalise
from mamba.errors import DataError

Picture = str | Path | Image.Image | NDArray[Any] | Tensor
"""One image: a file, a picture of Pillow's, an array (rows, columns[, 1, 3 or 4]) or a tensor (1, 3 or 4, rows,
columns). Numbers are whole from 0 to 255, or fractions from 0 to 1."""
CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Transform:
    """Called with one image or a sequence of them, it gives (n, 3, side, side) float32, normalised.

    A batch may also be one array (n, rows, columns, channels) or one tensor (n, channels, rows, columns).
    """

    side: int
    """Of the square that the model reads, in pixels."""
    fit: str
    """How an image becomes a square: crop, pad or stretch, as `data.fit`."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Raises DataError for what is no image, or has numbers of an unknown range."""
        pixels = np.stack([self.pixels(image) for image in as_list(images)])
        return normalise(torch.from_numpy(pixels), self.mean, self.std)

    def pixels(self, image: Picture) -> NDArray[np.uint8]:
        """(side, side, 3), as a picture that people can look at."""
        if isinstance(image, str | Path):
            return read_fitted(Path(image), self.side, self.fit)
        if not isinstance(image, Image.Image):
            image = _picture(image)
        try:
            return fit_image(to_rgb(image), self.side, self.fit)
        except ValueError as error:
            raise DataError(f"this image cannot be read: {error}") from None


def transform_of(description: Mapping[str, Any], side: int) -> Transform | None:
    """What a checkpoint's description says of its images; None where it does not (a model that was made by hand)."""
    try:
        mean, std = (tuple(float(v) for v in description[key]) for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        return None
    config = description.get("config")
    data = config.get("data") if isinstance(config, Mapping) else None
    fit = data.get("fit", "crop") if isinstance(data, Mapping) else "crop"  # before there was a choice: crop
    return Transform(side, str(fit), mean, std)


def is_one(images: Any) -> bool:
    """Whether this is one image, not a batch or a sequence of them."""
    if isinstance(images, np.ndarray):
        return images.ndim <= 3
    return images.ndim <= 3 if isinstance(images, Tensor) else isinstance(images, str | Path | Image.Image)


def as_list(images: Picture | Sequence[Picture]) -> list[Picture]:
    """One image, a batch or a sequence, as a list; raises DataError where there is none."""
    if not is_one(images) and (isinstance(images, Mapping) or not isinstance(images, Iterable)):
        raise DataError(
            f"a {type(images).__name__} is no image; valid: a file, a picture, an array, a tensor, or a list"
        )
    found: list[Any] = [images] if is_one(images) else [*images]  # type: ignore[misc]
    if not found:
        raise DataError("there are no images to predict")
    return found


def _picture(image: Any) -> Image.Image:
    """An array or tensor as a picture; raises DataError where its shape or its numbers leave a doubt."""
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] not in CHANNELS:
            raise DataError(f"a tensor of shape {tuple(image.shape)} is no image; valid: (1, 3 or 4, rows, columns)")
        array = image.detach().cpu().permute(1, 2, 0).numpy()
    elif isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        if array.ndim != 3 or array.shape[2] not in CHANNELS:
            raise DataError(
                f"an array of shape {image.shape} is no image; valid: (rows, columns) or (rows, columns, 1, 3 or 4)"
            )
    else:
        raise DataError(f"a {type(image).__name__} is no image; valid: a file, a picture, an array, a tensor")
    if 0 in array.shape:
        raise DataError(f"an image of shape {tuple(image.shape)} has no pixels")
    whole = np.issubdtype(array.dtype, np.integer)
    if not whole and not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"an image of {array.dtype} numbers; valid: whole ones from 0 to 255, fractions from 0 to 1")
    low, high, top = float(array.min()), float(array.max()), 255 if whole else 1
    if not (low >= 0 and high <= top):  # NaN neither
        raise DataError(
            f"an image of {array.dtype} with values from {low:g} to {high:g}; valid are 0 to {top}: scaling by mean "
            "and deviation is the transform's work"
        )
    levels = array.astype(np.uint8) if whole else np.rint(array * 255).astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else np.ascontiguousarray(levels))
