"""The causal depthwise convolution in plain torch: what the kernels are tested against, and what other devices use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv_silu_reference(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """The plain form of `causal_conv_silu`, against which the kernels are tested."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.silu(causal_conv1d(x.to(wide), weight.to(wide), bias.to(wide), reverse)).to(x.dtype)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool = False) -> Tensor:
    """Depthwise causal convolution of a channels-last sequence, as shifted multiply-adds.

    A few taps over a short sequence do not fill a convolution routine. Arguments as in `causal_conv_silu`.
    """
    taps = weight.shape[-1]
    length = x.shape[1]
    padded = F.pad(x, (0, 0, 0, taps - 1) if reverse else (0, 0, taps - 1, 0))
    ordered = weight[:, 0].flip(1) if reverse else weight[:, 0]
    out = padded[:, :length] * ordered[:, 0]
    for k in range(1, taps):
        out = out + padded[:, k : k + length] * ordered[:, k]
    return out if bias is None else out + bias
