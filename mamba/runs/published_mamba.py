"""Published Mamba-1 weights, by Hugging Face's names or mamba-ssm's, as a stack of our blocks.

Both name a layer alike (`backbone.layers.N.mixer.A_log`, `backbone.layers.N.norm.weight`); the embedding is
`embeddings` there and `embedding` here. The layers' names and layouts are those of our blocks with Vision
Mamba's names, so nothing is transposed or reordered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mamba.errors import CheckpointError
from mamba.models.language import MambaLanguageModel
from mamba.models.ssm import BlockShape
from mamba.runs.checkpoint import load_tensors
from mamba.runs.published import read_weights

EMBEDDINGS = ("embeddings.weight", "embedding.weight")
"""Of Hugging Face's MambaForCausalLM, and of mamba-ssm's MambaLMHeadModel."""
HEAD = "lm_head.weight"


def load_published_mamba(weights: Path | Mapping[str, Tensor]) -> MambaLanguageModel:
    """The language model that weights of `state-spaces/mamba-*` describe (Mamba 1; Mamba 2 has other tensors), in
    float32 and eval mode. Sizes are read from the tensors; the norms' epsilon is the published 1e-5.

    Args:
        weights: a file (model.safetensors, or pytorch_model.bin, not divided into shards), or a state dict, as
            `MambaForCausalLM.from_pretrained(...).state_dict()`.

    Raises:
        CheckpointError: a file that cannot be read, weights of something else, or a name or a shape that differs; the
            first is named.
    """
    tensors, where = (read_weights(weights), str(weights)) if isinstance(weights, Path) else (weights, "the state dict")
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("backbone.")
        own["embedding.weight" if short in EMBEDDINGS else short] = tensor.float()
    model = _model(own, where)
    own.setdefault(HEAD, own["embedding.weight"])
    load_tensors(model, own, where)
    return model.eval()


def _model(own: Mapping[str, Tensor], where: str) -> MambaLanguageModel:
    """A model of the weights' sizes."""
    layers = {int(found[1]) for name in own if (found := re.match(r"layers\.(\d+)\.", name))}
    first = {name: f"layers.0.mixer.{name}" for name in ("A_log", "conv1d.weight", "dt_proj.weight")}
    missing = [name for name in ("embedding.weight", *first.values()) if name not in own]
    if missing:
        raise CheckpointError(f"{where} holds no weights of a Mamba 1 language model: backbone.{missing[0]} is absent")
    sizes = {name: tuple(own[full].shape) for name, full in first.items()}
    if [len(sizes[name]) for name in first] != [2, 3, 2] or layers != set(range(len(layers))):
        raise CheckpointError(f"{where} holds no weights of a Mamba 1 language model: layers {sorted(layers)}, {sizes}")
    (d_inner, d_state), d_conv, dt_rank = sizes["A_log"], sizes["conv1d.weight"][2], sizes["dt_proj.weight"][1]
    embedding = own["embedding.weight"]
    tied = HEAD not in own or (own[HEAD].shape == embedding.shape and torch.equal(own[HEAD], embedding))
    shape = BlockShape(d_inner, d_state, d_conv, mlp_hidden=0, dt_rank=dt_rank, learned_dt_bias=True)
    return MambaLanguageModel(embedding.shape[0], embedding.shape[1], len(layers), shape, tied)
