"""What a run's folder and its backends are told while the run goes on. Only rank 0 writes.

metrics.jsonl, progress.json and result.json are the folder's own; TensorBoard, CSV, Weights & Biases and MLflow are
backends (`tracking.backends`). A resumed run drops what was logged after the checkpoint that it continues from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba.config.schema import RunConfig
from mamba.config.trackers import added, check
from mamba.config.versions import FORMAT
from mamba.errors import ConfigError
from mamba.runs.backends import Backend, CsvFile
from mamba.runs.confusion import Confusion
from mamba.runs.files import append, to_json, unwritable, write_json, write_sealed, write_text
from mamba.runs.folder import METRICS_LOG, PROGRESS, RESULT, logged_epochs
from mamba.runs.hparams import write_hparams

Make = Callable[[Path, RunConfig, int], Backend]
"""(the run's folder, its resolved config, optimizer steps that lie behind it: 0 for a new run) -> a backend."""


class Tracker:
    """Writes a run's folder as it goes, and tells its backends. Made on rank 0 only."""

    def __init__(self, folder: Path, config: RunConfig, epochs_done: int, steps_done: int) -> None:
        self.folder, self.config = folder, config
        try:
            self._drop_after(epochs_done)
            self.backends = open_backends(folder, config, steps_done)
        except OSError as error:
            raise unwritable(folder, error) from None

    def _drop_after(self, epochs_done: int) -> None:
        path = self.folder / METRICS_LOG
        if path.is_symlink() or path.exists():
            kept = [line for line, row in logged_epochs(self.folder).items() if row["epoch"] <= epochs_done]
            write_text(path, "".join(line + "\n" for line in kept))

    def step(self, global_step: int, metrics: Mapping[str, float]) -> None:
        """Scalars of one optimizer step, under tags of their own (`step/*`)."""
        self.scalars({f"step/{name}": value for name, value in metrics.items()}, global_step)

    def epoch(self, epoch: int, global_step: int, metrics: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """Scalars at the end of the epoch-th epoch. Of the learning rates by group the lowest, where they differ:
        `train/lr` is the highest, and the others lie between. Like every scalar they are drawn against the optimizer
        step, the one axis on which a resumed run can drop what it is going to repeat."""
        lowest = min(rates.values(), default=metrics.get("train/lr", 0.0))
        others = {"train/lr_lowest": lowest} if lowest < metrics.get("train/lr", lowest) else {}
        self.scalars({**metrics, **others}, global_step)
        for backend in self.backends:
            backend.flush()
        append(self.folder / METRICS_LOG, to_json({"epoch": epoch, **metrics}) + "\n")

    def scalars(self, metrics: Mapping[str, float], global_step: int) -> None:
        """Scalars by their tags; what has no epochs needs no more than this."""
        for backend in self.backends:
            backend.scalars(metrics, global_step)

    def samples(self, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """A grid of the first training batch as the model sees it, normalisation undone."""
        from torchvision.utils import make_grid  # not above: a slow import

        shift, scale = (torch.tensor(v)[:, None, None] for v in (mean, std))
        pictures = (images[:32].detach().float().cpu() * scale + shift).clamp(0, 1)
        factor = max(1, 64 // pictures.shape[-1])
        pictures = pictures.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
        grid = make_grid(pictures, nrow=8)
        for backend in self.backends:
            backend.image("train/augmented", grid, 0)

    def confusion(self, found: Confusion, global_step: int) -> None:
        """Which test images are taken for which class, and how many of each class are recognised: two pictures."""
        shown = {"test/confusion": found.picture(), "test/classes": found.class_picture()}
        pictures = {name: torch.from_numpy(one.copy()).permute(2, 0, 1) / 255 for name, one in shown.items()}
        self.pictures(pictures, global_step)

    def pictures(self, pictures: Mapping[str, Tensor], global_step: int) -> None:
        """Pictures of shape (3, height, width), values from 0 to 1, by their tags."""
        for name, picture in pictures.items():
            for backend in self.backends:
                backend.image(name, picture, global_step)

    def progress(self, **position: Any) -> None:
        write_json(self.folder / PROGRESS, position)

    def finish(self, result: Mapping[str, Any], global_step: int) -> None:
        """The final scalars, the HPARAMS entry's status, and result.json."""
        final = {name: v for name, v in result["metrics"].items() if name.split("/")[0] in ("test", "model")}
        self.scalars(final, global_step)
        for backend in self.backends:
            backend.finish("finished")
        self.close()
        write_hparams(self.folder, self.config, "finished")
        write_sealed(self.folder / RESULT, {"format": FORMAT, **result, "config": self.config.flat()})

    def close(self) -> None:
        """Close the backends, each of them whatever the others say."""
        errors = []
        for backend in self.backends:
            try:
                backend.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


def open_backends(folder: Path, config: RunConfig, steps_done: int) -> list[Backend]:
    """The backends of `tracking.backends`, open.

    Raises:
        ForgeError: one that is not there, or does not start.
    """
    words = config.tracking.backends
    check(words)
    return [maker(word)(folder, config, steps_done) for word in words]


def maker(word: str) -> Make:
    """What makes a backend; nothing that is not used is imported.

    Raises:
        ConfigError: an entry point that cannot be imported.
    """
    if word == "tensorboard":
        from mamba.runs.tensorboard import TensorBoard

        return TensorBoard
    if word == "csv":
        return CsvFile
    if word in ("wandb", "mlflow"):
        from mamba.runs.remote import MLflow, WeightsAndBiases

        return WeightsAndBiases if word == "wandb" else MLflow
    try:
        return added()[word].load()
    except Exception as error:
        raise ConfigError(f"tracking.backends: {word} cannot be imported ({type(error).__name__}: {error})") from error
