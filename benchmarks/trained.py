"""A trained model for the benchmarks that need one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mamba.config.presets import get_preset
from mamba.train.distributed import local_process
from mamba.train.trainer import fit


@contextmanager
def trained(checkpoint: Path | str | None, epochs: int, overrides: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A run's folder: the one given, or the quickstart model's, trained for so many epochs in a scratch folder.
    overrides: of its config, for toys."""
    if checkpoint is not None:
        yield Path(checkpoint)
        return
    with tempfile.TemporaryDirectory() as scratch:
        values: dict[str, Any] = {
            "out": Path(scratch),
            "optim.epochs": epochs,
            "optim.warmup_epochs": min(2, epochs - 1),
            **(overrides or {}),
        }
        folder = Path(scratch) / "quickstart"
        folder.mkdir()
        fit(get_preset("quickstart").with_values(values).resolve(), local_process(), folder)
        yield folder
