"""Where a run's metrics go besides its own folder: `tracking.backends`, each behind one small interface.

A backend of yours is a class with these five methods, under an entry point (`mamba.config.trackers`).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mamba.config.schema import RunConfig
from mamba.runs.files import append, unwritable, write_csv

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
