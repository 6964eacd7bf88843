"""A trained model with all that it takes to use it: three lines from an image to its class.

model = mamba.load("runs/quickstart/first")
print(model.predict("cat.jpg"))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mamba.config.schema import DataConfig, RunConfig
from mamba.data.transform import Picture, Transform, as_list, is_one
from mamba.data.views import ONE, Views
from mamba.errors import CheckpointError, ConfigError
from mamba.models.model import MambaModel
from mamba.runs.checkpoint import load_model
from mamba.train.evaluate import probabilities

BATCH = 64
"""Images of a forward pass, where nothing else is asked for."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image."""

    label: str
    """The most probable class."""
    probability: float
    """Of that class, from 0 to 1."""
    top: tuple[tuple[str, float], ...]
    """The most probable classes and their probabilities, the first one first."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in self.top)


class Predictor:
    """A model in eval mode, its classes, and the transform that its images need.

    Attributes:
        model: the `MambaModel`, (n, 3, side, side) -> logits (n, classes).
        classes: names, in the order of the model's outputs.
        transform: images of any kind -> what the model reads.
        description: of its checkpoint.
        views: of each image, whose class probabilities are averaged.
    """

    def __init__(self, model: MambaModel, description: dict[str, Any], where: str, views: int = 1) -> None:
        self.model, self.description, self.where = model.eval(), description, where
        transform, classes = description.get("transform"), description.get("classes")
        outputs = model.base.num_classes
        if not isinstance(transform, Transform):
            raise CheckpointError(
                f"{where} does not say how its images were scaled (mean and std): load_model reads it"
            )
        if not isinstance(classes, list) or len(classes) != outputs:
            known = len(classes) if isinstance(classes, list) else "no"
            raise CheckpointError(f"{where} names {known} classes for the model's {outputs} outputs")
        self.transform, self.classes = transform, tuple(str(name) for name in classes)
        self.views = ONE if views == 1 else Views.fitting(views, self._data_config(), transform.side)

    def _data_config(self) -> DataConfig:
        """How its images were shown in training, which decides what views fit."""
        tree = self.description.get("config")
        if tree is None:
            raise CheckpointError(f"{self.where} does not say how it was trained, so no views are known that fit it")
        return RunConfig.stored(tree, self.where).data

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device

    @torch.inference_mode()
    def probabilities(self, images: Picture | Sequence[Picture], batch_size: int = BATCH) -> Tensor:
        """(n, classes) float32 on the CPU: of one image or many, of the kinds that `Transform` takes.

        Raises:
            DataError: something that is no image, or whose numbers have an unknown range.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size}: valid are whole numbers from 1")
        found = as_list(images)
        parts = (found[at : at + batch_size] for at in range(0, len(found), batch_size))
        return torch.cat([self.of_batch(self.transform(part)).cpu() for part in parts])

    @torch.inference_mode()
    def of_batch(self, images: Tensor) -> Tensor:
        """Probabilities (n, classes) of normalised images (n, 3, side, side), on the model's device."""
        return probabilities(self.model, images.to(self.device), self.views)

    @overload
    def predict(  # type: ignore[overload-overlap]
        self, images: Picture, k: int = 5, batch_size: int = BATCH
    ) -> Prediction: ...

    @overload
    def predict(self, images: Sequence[Picture], k: int = 5, batch_size: int = BATCH) -> list[Prediction]: ...

    def predict(
        self, images: Picture | Sequence[Picture], k: int = 5, batch_size: int = BATCH
    ) -> Prediction | list[Prediction]:
        """The k most probable classes of one image, or of each of many.

        Args:
            images: a file, a picture, an array or a tensor, as `Transform` takes it; or a sequence or batch of them.
            k: classes to name.
            batch_size: images of a forward pass.

        Raises:
            ConfigError: numbers below 1.
            DataError: something that is no image, or whose numbers have an unknown range.
        """
        found = list(self.predictions(self.probabilities(images, batch_size), k))
        return found[0] if is_one(images) else found

    def predictions(self, rows: Tensor, k: int = 5) -> Iterator[Prediction]:
        """Rows of probabilities (n, classes) in words."""
        if k < 1:
            raise ConfigError(f"k {k}: valid are whole numbers from 1")
        values, places = rows.topk(min(k, len(self.classes)), dim=-1)
        for row, names in zip(values.tolist(), places.tolist(), strict=True):
            top = tuple((self.classes[name], value) for name, value in zip(names, row, strict=True))
            yield Prediction(*top[0], top)

    def __repr__(self) -> str:
        side = self.transform.side
        return f"Predictor({self.where}: {len(self.classes)} classes, {side}x{side} pixels, on {self.device})"


def load(
    path: str | Path,
    weights: Literal["best", "raw", "ema"] = "best",
    device: str | torch.device = "auto",
    views: int = 1,
) -> Predictor:
    """A trained model, dense or pruned, ready to be used.

    Args:
        path: a run's folder (its best checkpoint is taken, else its newest) or a checkpoint's.
        weights: raw, ema, or the one of both that validated best.
        device: auto: a GPU where there is one.
        views: of each image whose probabilities are averaged, as far as training shows images in as many ways.

    Raises:
        CheckpointError: no checkpoint there, one that is damaged, or that does not name its classes and statistics.
        ConfigError: a device that is not there, a word or a number that is not valid.
    """
    if views < 1:
        raise ConfigError(f"views {views}: valid are whole numbers from 1")
    device = device_named(device)
    model, description = load_model(path, weights, device)
    return Predictor(model, description, str(path), views)


def device_named(device: str | torch.device) -> torch.device:
    """auto: a GPU where there is one; raises ConfigError for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device}: valid are auto, cpu, cuda, cuda:0, ...") from None
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device}: valid are auto, cpu, cuda, cuda:0, ...")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device}: this machine has {torch.cuda.device_count()} CUDA GPUs")
    return found
