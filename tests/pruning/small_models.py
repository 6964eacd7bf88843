"""Small Mamba models whose every tensor holds something: no zeros that hide a mistake."""

from __future__ import annotations

import torch

from mamba.layers import BlockShape
from mamba.model import Architecture, MambaModel

PLAIN = BlockShape(d_inner=12, d_state=5, d_conv=4, mlp_hidden=14)


def build(*shapes: BlockShape, d_model: int = 10, seed: int = 0) -> MambaModel:
    """A model with these blocks, every parameter random and none zero, in float64 and eval mode."""
    torch.manual_seed(seed)
    model = MambaModel(Architecture(8, 4, 3, 3, d_model, 0.0, shapes or (PLAIN,) * 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()
