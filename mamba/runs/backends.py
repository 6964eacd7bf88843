"""Where a run's metrics go besides its own folder: `tracking.backends`, each behind one small interface.

A backend of yours is a class with these five methods, under an entry point (`mamba.config.trackers`).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mamba.config.schema import RunConfig
from mamba.config.trackers import added, check
from mamba.errors import ConfigError
from mamba.runs.files import append, unwritable, write_csv

Make = Callable[[Path, RunConfig, int], "Backend"]
"""(the run's folder, its resolved config, optimizer steps that lie behind it: 0 for a new run) -> a backend."""
CSV = "metrics.csv"


class Backend:
    """What a backend is told, on rank 0 alone. Each method does nothing unless it is overridden."""

    def __init__(self, folder: Path, config: RunConfig, steps_done: int) -> None:
        self.folder, self.config, self.steps_done = folder, config, steps_done

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics by their keys (`val/accuracy`), at an optimizer step. A resumed run repeats those after the
        checkpoint that it continues from."""

    def image(self, name: str, picture: Tensor, step: int) -> None:
        """A picture of shape (3, height, width), values from 0 to 1, on the CPU."""

    def flush(self) -> None:
        """An epoch has ended: what was told so far should be seen."""

    def finish(self, status: str) -> None:
        """The run has ended in order, with one of `mamba.runs.folder.STATUSES`; `close` follows."""

    def close(self) -> None:
        """Nothing more is told by this process. Without `finish` before: stopped or failed, perhaps to be resumed."""


class CsvFile(Backend):
    """metrics.csv in the run's folder: a line for each metric at each step."""

    HEAD = ("step", "metric", "value")

    def __init__(self, folder: Path, config: RunConfig, steps_done: int) -> None:
        super().__init__(folder, config, steps_done)
        self.path = folder / CSV
        write_csv(self.path, self.HEAD, self._kept())  # a resumed run drops what it is going to repeat

    def _kept(self) -> list[dict[str, Any]]:
        if self.steps_done == 0 or not self.path.exists():
            return []
        try:
            with self.path.open(newline="", errors="replace") as file:
                lines = [line for line in csv.DictReader(file) if str(line.get("step", "")).isdecimal()]
        except OSError as error:
            raise unwritable(self.path, error) from None
        return [{key: line[key] for key in self.HEAD} for line in lines if int(line["step"]) <= self.steps_done]

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        lines = (f"{step},{key},{value if math.isfinite(value) else ''}\r\n" for key, value in metrics.items())
        append(self.path, "".join(lines))


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
