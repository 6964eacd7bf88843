"""Published weights from files: Vision Mamba's, by the authors' names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mamba.errors import CheckpointError
from mamba.models.embed import resize_positions
from mamba.models.model import MambaModel
from mamba.runs.checkpoint import load_tensors


def load_published(model: MambaModel, weights: Path | Mapping[str, Tensor]) -> None:
    """Load weights with the published names, strictly; positions are interpolated where the model's grid is another.

    Args:
        model: of `vim_tiny`, `vim_small` or `vim_base`, with the weights' patch size and number of classes.
        weights: a file (.pth with the weights under "model" or at the top, or .safetensors), or a state dict.

    Raises:
        CheckpointError: a file that cannot be read, or a name or a shape that differs; the first is named.
    """
    if isinstance(weights, Path):
        tensors, where = read_weights(weights), str(weights)
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


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or of what torch saved, under "model" or at the top; raises CheckpointError."""
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
