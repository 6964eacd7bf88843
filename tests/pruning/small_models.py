"""Small Mamba models whose every tensor holds something: no zeros that hide a mistake."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mamba.models.model import Architecture, MambaModel
from mamba.models.ssm import MIXERS, BlockShape

PLAIN = BlockShape(d_inner=12, d_state=5, d_conv=4, mlp_hidden=14)


VIM = BlockShape(12, 5, 4, 0, dt_rank=3, mixer="bidirectional_shared", learned_dt_bias=True)
"""A block of Vision Mamba's kind."""


def build(*shapes: BlockShape, d_model: int = 10, seed: int = 0, **choices: Any) -> MambaModel:
    """A model with these blocks, every parameter random and none zero, in float64 and eval mode.

    `choices`: other fields of `Architecture`.
    """
    torch.manual_seed(seed)
    model = MambaModel(Architecture(8, 4, 3, 3, d_model, 0.0, shapes or (PLAIN,) * 3, **choices)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def turns(mixer: str, depth: int) -> list[BlockShape]:
    """Blocks of a mixer that take its directions in turn."""
    directions = MIXERS[mixer].directions
    return [replace(PLAIN, mixer=mixer, direction=directions[i % len(directions)]) for i in range(depth)]


FAMILY = {
    "forward": lambda: build(),
    "bidirectional": lambda: build(
        *(replace(PLAIN, mixer="bidirectional"),) * 3, stem="conv", stem_channels=(5, 6), class_token="start"
    ),
    "bidirectional_shared": lambda: build(*(replace(PLAIN, mixer="bidirectional_shared"),) * 3, pos_embed="none"),
    "multiscale": lambda: build(*(replace(PLAIN, mixer="multiscale"),) * 3, d_model=12, pos_embed="both"),
    "alternating": lambda: build(*turns("alternating", 3), stem="cct", stem_channels=(6,), head="attention"),
    "cross": lambda: build(*turns("cross", 4), class_token="middle"),
    "vim": lambda: build(*(VIM,) * 3, names="vim", norm="rms", class_token="middle"),
    "vim, own merge": lambda: build(
        *(replace(VIM, mixer="bidirectional", mlp_hidden=9),) * 3, names="vim", norm="rms", class_token="double"
    ),
}
"""One model of each kind: every mixer, both names, class tokens, positions, stems, heads."""
