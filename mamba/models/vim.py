"""Vision Mamba (Vim, https://arxiv.org/abs/2401.09417) with the names and shapes of its published weights.

A Vim is a `MambaModel` of certain choices, and of other names: blocks without an MLP, RMSNorm (eps 1e-5) in front of
each mixer, which scans both ways on shared projections and averages (the authors' BiMamba v2, outputs divided by 2), a
low-rank time step of rank d_model / 16 with a learned bias, and a class token in the middle of the sequence, whose
normed features go to the head. The authors write a layer as "add, norm, mix" and return the sum and the mixer's output
apart; here it is "norm, mix, add", which is the same.

Deviations: with `pos_embed` rope or both, each mixer reads turned features (the authors turn the residual stream before
each layer, again and again), rows and columns count patches of the model's own grid (the authors stretch every grid to
14), and class tokens do not turn; no published weights use it. The patch embedding starts from torch's defaults.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mamba.errors import CheckpointError
from mamba.models.embed import resize_positions
from mamba.models.model import MambaModel, named_model
from mamba.runs.checkpoint import load_tensors


def vim_tiny(num_classes: int = 1000, img_size: int = 224, drop_path: float = 0.0, **overrides: Any) -> MambaModel:
    """d_model 192, 24 layers; 7,148,008 parameters at the defaults. Overrides: any field of `ModelConfig`; stride=8 is
    the authors' Vim-Ti+, img_size=32 has patches of 4 pixels."""
    return named_model("vim_tiny", num_classes, img_size, drop_path=drop_path, **overrides)


def vim_small(num_classes: int = 1000, img_size: int = 224, drop_path: float = 0.0, **overrides: Any) -> MambaModel:
    """d_model 384, 24 layers; 25,796,584 parameters at the defaults. Overrides: as of `vim_tiny`."""
    return named_model("vim_small", num_classes, img_size, drop_path=drop_path, **overrides)


def vim_base(num_classes: int = 1000, img_size: int = 224, drop_path: float = 0.0, **overrides: Any) -> MambaModel:
    """d_model 768, 24 layers; 97,598,440 parameters at the defaults. Overrides: as of `vim_tiny`."""
    return named_model("vim_base", num_classes, img_size, drop_path=drop_path, **overrides)


def load_published(model: MambaModel, weights: Path | Mapping[str, Tensor]) -> None:
    """Load weights with the published names, strictly; positions are interpolated where the model's grid is another.

    Args:
        model: of `vim_tiny`, `vim_small` or `vim_base`, with the weights' patch size and number of classes.
        weights: a file (.pth with the weights under "model" or at the top, or .safetensors), or a state dict.

    Raises:
        CheckpointError: a file that cannot be read, or a name or a shape that differs; the first is named.
    """
    if isinstance(weights, Path):
        tensors, where = _read(weights), str(weights)
    else:
        tensors, where = dict(weights), "the state dict"
    a = model.architecture
    same_names = tensors.keys() == model.state_dict().keys()
    if same_names and "pos_embed" in tensors and tensors["pos_embed"].shape[1] != a.num_tokens:
        try:
            tensors["pos_embed"] = resize_positions(tensors["pos_embed"], a.grid, a.class_token)
        except ValueError as error:
            raise CheckpointError(f"{where} does not fit: {error}") from None
    load_tensors(model, tensors, where)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors keep their command line beside
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error})") from None
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(f"{path} cannot be read as weights ({str(error).splitlines()[0]})") from None
    tree = tree.get("model", tree)
    return {name: tensor for name, tensor in tree.items() if isinstance(tensor, Tensor)}
