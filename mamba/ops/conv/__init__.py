"""The mixer's causal depthwise convolution with its SiLU: in torch on any device, fused by hand on a GPU."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from mamba.ops.conv.reference import causal_conv1d, causal_conv_silu_reference

__all__ = ["HAS_TRITON", "causal_conv1d", "causal_conv_silu", "causal_conv_silu_reference"]

HAS_TRITON = importlib.util.find_spec("triton") is not None


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """silu(causal_conv1d(x)) in the type of x, computed in float32 or wider.

    x: (batch, length, channels); weight: (channels, 1, taps), the last tap meets the current token; bias: (channels,);
    reverse: the sequence is read from its end, so that no output sees an earlier token (nothing is flipped in memory);
    returns (batch, length, channels). The Triton kernels serve GPUs, the plain form everything else.
    """
    if HAS_TRITON and x.is_cuda and x.dtype != torch.float64:
        from mamba.ops.conv.triton import causal_conv_silu_triton  # on first use: not every machine has triton

        return causal_conv_silu_triton(x, weight, bias, reverse)
    return causal_conv_silu_reference(x, weight, bias, reverse)
