"""What a mixer of one scan does between its two projections, from the references of its parts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mamba.ops.conv.reference import causal_conv_silu_reference
from mamba.ops.scan.reference import selective_scan_reference


def mixer_reference(
    xz: Tensor, taps: Tensor, taps_bias: Tensor, project: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """Arguments as in `mamba.ops.mixer.mixer`."""
    d_inner, d_state = A.shape
    x, z = xz.split(d_inner, dim=-1)
    x = causal_conv_silu_reference(x, taps, taps_bias)
    B, C, delta = F.linear(x, project).split((d_state, d_state, d_inner), dim=-1)
    u, delta, B, C, z = (t.transpose(1, 2) for t in (x, delta, B, C, z))
    y = selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True)
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)
