"""What a mixer of one scan does between its two projections, as one operator where there are kernels for it."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba.ops.candidates import ON
from mamba.ops.conv import HAS_TRITON
from mamba.ops.mixer.reference import mixer_reference
from mamba.ops.scan import is_replaced

__all__ = ["mixer", "mixer_reference", "serves"]


def serves(xz: Tensor) -> bool:
    """Whether `mixer` takes this tensor, and is to; the scan must not be one that somebody else put there."""
    return "mixer" in ON and HAS_TRITON and xz.is_cuda and xz.dtype != torch.float64 and not is_replaced()


def mixer(
    xz: Tensor, taps: Tensor, taps_bias: Tensor, project: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """Causal convolution with SiLU of x, its projection to B, C and delta, and the scan with the gate z.

    xz: (batch, length, 2 d_inner), x and z side by side; taps: (d_inner, 1, width) and taps_bias: (d_inner,), as in
    `mamba.ops.conv.causal_conv_silu`; project: (2 d_state + d_inner, d_inner), of xz's type, for B, C and delta in this
    order; A: (d_inner, d_state); D, delta_bias: (d_inner,), as in `mamba.ops.scan.selective_scan`, softplus on.
    Returns (batch, length, d_inner). `mamba.ops.mixer.mixer_reference` is the same in plain torch.
    """
    from mamba.ops.mixer.triton import mixer_triton  # on first use: not every machine has triton

    return mixer_triton(xz, taps, taps_bias, project, A, D, delta_bias)
