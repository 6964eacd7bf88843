"""The block's MLP in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mlp_reference(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """Arguments as in `mamba.ops.mlp.mlp`; under autocast in its type, as any two layers."""
    return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)
