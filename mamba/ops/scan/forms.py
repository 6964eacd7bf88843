"""B and C in the other forms that mamba-ssm's scan takes: shared by groups of channels, or constant over time.

The backends know one form, (batch, d_state, length) for all channels; only the reference reads the others itself. Here
they are put into that form, at the operator's boundary, so that every backend has them, gradients summed over a group
or over time by autograd. No kernel is written for them, and it costs:

- Groups, (batch, groups, d_state, length): one scan a group, of its channels alone. The same work in smaller launches.
- Constants, (d_inner, d_state): a scan of d_inner x d_state channels of one state each, which gives all states h; then
  y = sum_n C h. The sequences are d_state times as large: for equality with other code, not for speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba.ops.scan.inputs import ScanInputs

Scan = Callable[..., Tensor | tuple[Tensor, Tensor]]
"""A backend: the fields of `ScanInputs`, delta_softplus, return_last_state."""


def is_plain(scan: ScanInputs) -> bool:
    """Whether a backend takes it as it is."""
    return scan.B.ndim == scan.C.ndim == 3


def has_constants(scan: ScanInputs) -> bool:
    return 2 in (scan.B.ndim, scan.C.ndim)


def groups_of(*scans: ScanInputs) -> int:
    """Into how many parts of channels the scans fall, so that each part has one B and one C."""
    return math.lcm(*(t.shape[1] for scan in scans for t in (scan.B, scan.C) if t.ndim == 4))


def parts(scan: ScanInputs, count: int) -> Iterator[ScanInputs]:
    """`count` scans of plain form, of neighbouring channels."""

    def shared(t: Tensor, i: int) -> Tensor:
        return t if t.ndim == 3 else t[:, i * t.shape[1] // count]

    size = scan.u.shape[1] // count
    for i in range(count):
        here = slice(i * size, (i + 1) * size)
        yield ScanInputs(
            scan.u[:, here],
            scan.delta[:, here],
            scan.A[here],
            shared(scan.B, i),
            shared(scan.C, i),
            None if scan.D is None else scan.D[here],
            None if scan.z is None else scan.z[:, here],
            None if scan.delta_bias is None else scan.delta_bias[here],
        )


def scan_in_any_form(
    backend: Scan, scan: ScanInputs, delta_softplus: bool, return_last_state: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`mamba.ops.scan.selective_scan` by a backend of plain form."""
    if is_plain(scan):
        return backend(*scan, delta_softplus, return_last_state)
    if has_constants(scan):
        return _by_states(backend, scan, delta_softplus, return_last_state)
    found = [backend(*part, delta_softplus, return_last_state) for part in parts(scan, groups_of(scan))]
    if return_last_state:
        outs, lasts = zip(*found, strict=True)
        return torch.cat(outs, 1), torch.cat(lasts, 1)
    return torch.cat([out for out in found if isinstance(out, Tensor)], 1)


def for_every_channel(t: Tensor, d_inner: int) -> Tensor:
    """B or C of any form, as a view that broadcasts with (batch, d_inner, d_state, length)."""
    if t.ndim == 2:
        return t[None, :, :, None]
    return t[:, None] if t.ndim == 3 else t.repeat_interleave(d_inner // t.shape[1], dim=1)


def _by_states(
    backend: Scan, scan: ScanInputs, delta_softplus: bool, return_last_state: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Every state as a channel of its own, driven by B u; C, D and the gate afterwards."""
    u, delta, A, B, C, D, z, bias = scan
    work = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, d_inner, length = u.shape
    d_state = A.shape[1]
    drive = (u.to(work)[:, :, None] * for_every_channel(B.to(work), d_inner)).reshape(batch, -1, length)
    ones = u.new_ones(batch, 1, length, dtype=work)
    wide = ScanInputs(
        drive,
        delta.to(work).repeat_interleave(d_state, dim=1),
        A.to(work).reshape(-1, 1),
        ones,
        ones,
        None,
        None,
        None if bias is None else bias.to(work).repeat_interleave(d_state),
    )
    states = backend(*wide, delta_softplus, False)
    assert isinstance(states, Tensor)
    states = states.view(batch, d_inner, d_state, length)
    y = (states * for_every_channel(C.to(work), d_inner)).sum(2)
    if D is not None:
        y = y + u.to(work) * D.to(work)[:, None]
    if z is not None:
        y = y * F.silu(z.to(work))
    y = y.to(u.dtype)
    return (y, states[..., -1]) if return_last_state else y
