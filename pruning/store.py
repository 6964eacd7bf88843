"""Pruned models on disk: a checkpoint's masks lie beside its weights, and both are read and written together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mamba.models.model import MambaModel
from mamba.runs import checkpoint as ckpt
from pruning.masks import FILE, Masks, load_masks
from pruning.shrink import Shrunk, shrink


def masks_of(path: Path) -> Masks:
    """The masks of a checkpoint or of a run's best; empty where it has none.

    Raises:
        CheckpointError: no checkpoint there, or masks that cannot be read.
    """
    file = ckpt.find_checkpoint(path) / FILE
    return load_masks(file) if file.exists() else {}


def load_smaller(
    path: Path, device: str | torch.device = "cpu", drop_path: float | None = None
) -> tuple[Shrunk, dict[str, Any]]:
    """A checkpoint's model (`mamba.runs.checkpoint.load_model`) without the units that its masks take whole, with what
    is left of the masks, and the checkpoint's description."""
    model, description = ckpt.load_model(path, device=device, drop_path=drop_path)
    return shrink(model, masks_of(path)), description


def save_pruned(folder: Path, model: MambaModel, masks: Masks, description: dict[str, Any]) -> Path:
    """Write a pruned model and the masks that hold it in training, as a checkpoint to load or to start from."""
    extra = {FILE: masks} if masks else None
    return ckpt.save_checkpoint(folder, model, None, {**description, "weights": "raw"}, None, extra)


def of_cut(description: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's description for what is left of its model after a cut: without what was measured before."""
    return {key: value for key, value in description.items() if key not in ("metrics", "epoch")}
