"""What trainings and measurements that are compared with each other were begun with: their data and the models that
they start from, kept in their folder, so that none goes on with others under the same name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mamba.errors import ConfigError
from mamba.runs.checkpoint import find_checkpoint, read_description
from mamba.runs.files import SEAL, read_sealed, sealed, write_sealed
from mamba.runs.provenance import difference
from mamba.runs.unchanged import changed

INPUTS = "inputs.json"


def keep_inputs(
    folder: Path,
    data: Mapping[str, Mapping[str, Any]],
    models: Iterable[Path] = (),
    config: Mapping[str, Any] | None = None,
) -> None:
    """Keep what an experiment or a series uses, or compare it with what it used before; what is new is added.

    Args:
        folder: of the experiment or the series.
        data: fingerprints by any names that stay.
        models: checkpoints, or runs whose best is used.
        config: dotted key -> value, where nothing else keeps it.

    Raises:
        ConfigError: other data, another model or another config than it was begun with; names the first difference.
        FolderError: the file is damaged, or cannot be written.
        CheckpointError: a model that is not there.
    """
    now: dict[str, dict[str, Any]] = {"data": dict(data), "models": {str(path): _identity(path) for path in models}}
    now["config"] = dict(config or {})
    before: dict[str, dict[str, Any]] = {"data": {}, "models": {}, "config": {}}
    with suppress(FileNotFoundError):  # of an earlier version, or at the beginning
        before |= read_sealed(folder / INPUTS)
    for name, found in now["data"].items():
        told = difference(before["data"][name], found) if name in before["data"] else None
        if told:
            raise ConfigError(
                f"{folder} was begun with other data: {told}; what is measured on both cannot be compared"
            )
    for path, identity in now["models"].items():
        if before["models"].get(path, identity) != identity:
            raise ConfigError(
                f"{folder} was begun with another model: {path} has changed since; begin anew, by another --name"
            )
    if told := changed(now["config"], before["config"]):
        raise ConfigError(f"{folder / 'config.yaml'} was changed since: {told}; undo that, or begin anew")
    merged = {part: {**before[part], **now[part]} for part in now}
    if merged != before:
        write_sealed(folder / INPUTS, merged)


def _identity(path: Path) -> str:
    """Of a checkpoint's description, which has a checksum of each of its files."""
    return str(sealed(read_description(find_checkpoint(path)))[SEAL])
