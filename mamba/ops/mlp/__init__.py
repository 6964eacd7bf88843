"""The block's MLP: in torch on any device; with GELU inside the products on a GPU where that candidate is on."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba.ops.candidates import ON
from mamba.ops.conv import HAS_TRITON
from mamba.ops.mlp.reference import mlp_reference

__all__ = ["mlp", "mlp_reference"]

_HALVES = (torch.bfloat16, torch.float16)


def mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """gelu(x up' + up_bias) down' + down_bias, with the exact GELU (https://arxiv.org/abs/1606.08415).

    x: (..., channels); up: (hidden, channels); up_bias: (hidden,); down: (channels, hidden); down_bias: (channels,);
    returns (..., channels), under autocast in its type. The Triton kernels serve 16-bit types on GPUs where both widths
    are multiples of 8 (memory is read in pieces of 16 bytes), the plain form everything else.
    """
    if "mlp" in ON and HAS_TRITON and x.is_cuda:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        if dtype in _HALVES and up.shape[0] % 8 == up.shape[1] % 8 == 0 and down.shape[0] == up.shape[1]:
            from mamba.ops.mlp.triton import mlp_triton  # on first use: not every machine has triton

            return mlp_triton(x.to(dtype), up.to(dtype), up_bias, down.to(dtype), down_bias)
    return mlp_reference(x, up, up_bias, down, down_bias)
