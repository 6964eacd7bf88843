"""Checkpoints as folders: weights as safetensors, the training state without pickled code, the description as JSON.

    model.safetensors       the weights
    ema.safetensors         their moving average, if the run keeps one
    training_state.pt       optimizer, scaler, RNG of every rank, position, best metric (torch.load, weights_only)
    config.json             architecture with every block's actual widths, classes, statistics, metrics

A folder is written under a temporary name, synced, then renamed: a name that exists is complete. A model is rebuilt
from its folder alone; a folder without training_state.pt (the best of a run) cannot be resumed, only loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mamba.errors import CheckpointError
from mamba.models.model import Architecture, MambaModel, count_parameters

ADVICE = "remove that folder to go on from an earlier checkpoint, if there is one, or from the start"
WEIGHTS, EMA_WEIGHTS, STATE, DESCRIPTION = "model.safetensors", "ema.safetensors", "training_state.pt", "config.json"


def save_checkpoint(
    folder: Path,
    model: MambaModel,
    ema: MambaModel | None,
    description: dict[str, Any],
    training_state: dict[str, Any] | None,
    extra: dict[str, dict[str, torch.Tensor]] | None = None,
) -> Path:
    """Write a checkpoint folder atomically. `description` is JSON; the architecture is added to it. `extra` holds more
    safetensors files by name (masks).

    Raises:
        CheckpointError: the folder cannot be written (no space left, no permission).
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_tensors(model), partial / WEIGHTS)
        if ema is not None:
            save_file(_tensors(ema), partial / EMA_WEIGHTS)
        for name, tensors in (extra or {}).items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial / name)
        if training_state is not None:
            torch.save(training_state, partial / STATE)
        text = json.dumps({**description, "architecture": model.architecture.to_dict()}, indent=1)
        (partial / DESCRIPTION).write_text(text)
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        _sync(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors wrap a full disk
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(next(p for p in folder.parents if p.exists())).free
        raise CheckpointError(
            f"the checkpoint {folder} could not be written: {error} ({free / 2**20:.0f} MiB are free there); earlier "
            "checkpoints are untouched"
        ) from None
    return folder


def load_model(
    path: str | Path,
    weights: Literal["best", "raw", "ema"] = "best",
    device: str | torch.device = "cpu",
    drop_path: float | None = None,
) -> tuple[MambaModel, dict[str, Any]]:
    """Rebuild a model from a checkpoint folder, or from a run's folder (its best checkpoint, else its newest).

    Args:
        path: the folder.
        weights: raw, ema, or the one of both that validated best (ema, if kept, where nothing was validated).
        device: where the model is put.
        drop_path: another rate of stochastic depth than the one it was trained with.

    Returns:
        the model in eval mode, and the checkpoint's description (classes, mean, std, metrics).

    Raises:
        CheckpointError: no checkpoint there, a file missing or truncated, or no average kept.
    """
    folder = find_checkpoint(Path(path))
    description = read_description(folder)
    try:
        architecture = Architecture.from_dict(description["architecture"])
        if drop_path is not None:
            architecture = replace(architecture, drop_path=drop_path)
        model = MambaModel(architecture)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / DESCRIPTION} does not describe a model of ours: {error}") from None
    use_ema = weights == "ema" or (weights == "best" and description.get("weights") == "ema")
    load_weights(model, folder, EMA_WEIGHTS if use_ema else WEIGHTS)
    return model.to(device).eval(), description


def check_start(path: Path, num_classes: int, img_size: int, key: str = "model.checkpoint") -> None:
    """See that a run on data of so many classes and pixels can start from a checkpoint, or use it as `key` says.

    Raises:
        CheckpointError: there is none, or its model is for other data.
    """
    try:
        own = read_description(find_checkpoint(path)).get("architecture", {})
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}", every_rank=error.every_rank) from None
    if (own.get("num_classes"), own.get("img_size")) != (num_classes, img_size):
        raise CheckpointError(
            f"{key} {path} is for {own.get('num_classes')} classes at {own.get('img_size')} pixels, and the "
            f"data has {num_classes} classes at {img_size} pixels",
            every_rank=True,
        )


def parameters_in(path: Path) -> int:
    """How many parameters the model of a checkpoint or run has, without loading its weights."""
    description = read_description(find_checkpoint(path))
    with torch.device("meta"):
        return count_parameters(MambaModel(Architecture.from_dict(description["architecture"])))


def load_weights(model: nn.Module, folder: Path, file: str = WEIGHTS) -> None:
    """Load one weights file of a checkpoint into a model of the same shape.

    Raises:
        CheckpointError: missing, truncated, or of another architecture (the first difference is named).
    """
    path = folder / file
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the folder holds {_listing(folder)}") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); {ADVICE}") from None
    load_tensors(model, tensors, str(path))


def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Load a state dict whose names and shapes are all the model's; `where` says whence it is, for the error.

    Raises:
        CheckpointError: of another architecture (the first difference is named).
    """
    own = model.state_dict()
    for name in [*own, *tensors]:
        if name not in tensors or name not in own or own[name].shape != tensors[name].shape:
            ours = tuple(own[name].shape) if name in own else "absent"
            theirs = tuple(tensors[name].shape) if name in tensors else "absent"
            raise CheckpointError(
                f"{where} is of another architecture: {name} is {theirs} there and {ours} in this run's model"
            )
    model.load_state_dict(tensors)


def load_training_state(folder: Path) -> dict[str, Any]:
    """Raises CheckpointError where it is missing or truncated."""
    path = folder / STATE
    if not path.exists():
        raise CheckpointError(f"{path} is missing: this checkpoint can be loaded, but a run cannot resume from it")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(f"{path} is truncated or damaged ({error}); {ADVICE}") from None
    if not isinstance(state, dict) or "optimizer" not in state or "train_images" not in state:
        raise CheckpointError(f"{path} does not hold a training state of ours; {ADVICE}")
    return state


def check_resumable(run: Path) -> None:
    """Read a run's newest checkpoint as a trainer would, so that a damaged one is found before workers start.

    Raises:
        CheckpointError: the file, and what is wrong with it.
    """
    folder = newest_checkpoint(run)
    if folder is None:
        return
    load_training_state(folder)
    load_model(folder, weights="raw")
    if (folder / EMA_WEIGHTS).exists():
        load_model(folder, weights="ema")


def read_description(folder: Path) -> dict[str, Any]:
    """The checkpoint's JSON; raises CheckpointError where it is missing or damaged."""
    path = folder / DESCRIPTION
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the folder holds {_listing(folder)}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {ADVICE}") from None


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder: `path` itself, or, of a run's folder, its best, else its newest.

    Raises:
        CheckpointError: there is none.
    """
    if (path / DESCRIPTION).exists():
        return path
    found = best_checkpoint(path) or newest_checkpoint(path)
    if found is None:
        where = "" if path.is_absolute() else f" (seen from {Path.cwd()})"
        if not path.exists():
            raise CheckpointError(f"there is no {path}{where}; give a checkpoint's folder, or that of a run")
        rounds = max(path.glob("round-*/pruned"), default=None)
        hint = f"; it holds rounds of pruning: did you mean {rounds}?" if rounds else ""
        raise CheckpointError(
            f"{path}{where} is neither a checkpoint (with {DESCRIPTION} and {WEIGHTS}) nor a run with checkpoints/ in "
            f"it{hint}"
        )
    return found


def newest_checkpoint(run: Path) -> Path | None:
    """The last complete training state of a run."""
    return max((run / "checkpoints").glob("step-*"), default=None)


def best_checkpoint(run: Path) -> Path | None:
    """The weights that validated best."""
    return max((run / "checkpoints").glob("best-*"), default=None)


def remove_old(run: Path, pattern: str, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of a name pattern."""
    for folder in sorted((run / "checkpoints").glob(pattern))[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def remove_best_after(run: Path, epoch: int) -> None:
    """Delete the best checkpoints of epochs that a resumed run is going to repeat."""
    for folder in (run / "checkpoints").glob("best-*"):
        if int(folder.name.partition("-")[2]) > epoch:
            shutil.rmtree(folder, ignore_errors=True)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _listing(folder: Path) -> str:
    return ", ".join(sorted(f.name for f in folder.iterdir())) if folder.is_dir() else "nothing (it does not exist)"
