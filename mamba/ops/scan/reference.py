"""The selective scan written as plainly as possible: the oracle that every faster backend is tested against.

Follows Algorithm 2 and section 3.3 of Mamba (Gu & Dao 2023, https://arxiv.org/abs/2312.00752), with the zero-order
hold on A and the Euler step on B that the paper's own code uses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba.ops.scan.inputs import ScanInputs


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step after the other, everything through autograd. Arguments as in `mamba.ops.scan.selective_scan`."""
    work = torch.float64 if u.dtype == torch.float64 else torch.float32
    out_dtype, length = u.dtype, u.shape[-1]
    u, delta, A, B, C = (t.to(work) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(work)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    state = u.new_zeros(u.shape[0], A.shape[0], A.shape[1])
    outputs = []
    for t in range(length):
        decay = torch.exp(delta[:, :, t, None] * A)
        drive = (delta[:, :, t] * u[:, :, t])[:, :, None] * _at(B, t, u.shape[1])
        state = decay * state + drive
        if C.ndim == 3:
            outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
        else:
            outputs.append((state * _at(C, t, u.shape[1])).sum(-1))
    y = torch.stack(outputs, dim=2)
    if D is not None:
        y = y + u * D.to(work)[:, None]
    if z is not None:
        y = y * F.silu(z.to(work))
    y = y.to(out_dtype)
    return (y, state) if return_last_state else y


def _at(t: Tensor, step: int, d_inner: int) -> Tensor:
    """B or C of one step, to be multiplied with (batch, d_inner, d_state)."""
    if t.ndim == 2:  # (d_inner, d_state), constant
        return t
    if t.ndim == 3:  # (batch, d_state, length)
        return t[:, None, :, step]
    return t[..., step].repeat_interleave(d_inner // t.shape[1], dim=1)  # (batch, groups, d_state, length)


def bidirectional_scan_by_flips(
    scan: Callable[..., Tensor | tuple[Tensor, Tensor]], forward: ScanInputs, backward: ScanInputs, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    """`mamba.ops.scan.bidirectional_scan` as two one-way scans, the second of sequences flipped in time and back."""
    flipped = (t.flip(-1) if t is not None and t.ndim >= 3 else t for t in backward)
    out, out2 = scan(*forward, delta_softplus), scan(*flipped, delta_softplus)
    assert isinstance(out, Tensor) and isinstance(out2, Tensor)
    return out, out2.flip(-1)
