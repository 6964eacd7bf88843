"""The selective scan in two phases of plain torch: first the recurrence over all states, then every output at once.

The loop over time only carries `h_t = a_t h_(t-1) + b_t`, one fused multiply-add on a contiguous slice a step;
exponentials, the reads through C and every gradient are single batched operations. The gradient is written out
rather than left to autograd, which would keep three tensors a step. Runs on any device and in float64; the fast path
of a CPU without a compiler.

Memory: two tensors of (length, batch, d_inner, d_state) in the working precision are kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _TwoPhaseScan(torch.autograd.Function):
    """(u, delta, A, B, C) -> (y, last state), all in one floating type; time is the last axis, as in the interface."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        # time first, so that one step's slice is contiguous
        u, delta = u.permute(2, 0, 1).contiguous(), delta.permute(2, 0, 1).contiguous()  # (L, batch, d_inner)
        B, C = B.permute(2, 0, 1).contiguous(), C.permute(2, 0, 1).contiguous()  # (L, batch, d_state)
        decay = (delta[..., None] * A).exp_()
        states = (delta * u)[..., None] * B[:, :, None, :]
        for t in range(1, len(states)):
            states[t].addcmul_(decay[t], states[t - 1])
        y = (states @ C[..., None]).squeeze(-1)
        ctx.save_for_backward(u, delta, A, B, C, decay, states)
        return y.permute(1, 2, 0), states[-1].clone()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
        u, delta, A, B, C, decay, states = ctx.saved_tensors
        grad_y = grad_y.permute(2, 0, 1).contiguous()
        grad_C = (grad_y[:, :, None, :] @ states).squeeze(2)
        # g_t = dLoss/dh_t, from the last step to the first
        g = grad_y[..., None] * C[:, :, None, :]
        g[-1] += grad_last
        for t in range(len(g) - 2, -1, -1):
            g[t].addcmul_(decay[t + 1], g[t + 1])
        grad_drive = (g @ B[..., None]).squeeze(-1)  # with respect to delta_t u_t
        grad_B = ((delta * u)[:, :, None, :] @ g).squeeze(2)
        # with respect to the exponent delta_t A; the first step has no state before it
        g[1:].mul_(decay[1:]).mul_(states[:-1])
        g[0].zero_()
        grad_delta = (g * A).sum(-1) + grad_drive * u
        grad_A = (g * delta[..., None]).sum((0, 1))
        back = (1, 2, 0)
        return (
            (grad_drive * delta).permute(back),
            grad_delta.permute(back),
            grad_A,
            grad_B.permute(back),
            grad_C.permute(back),
        )


def selective_scan_two_phase(
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
    """Arguments as in `mamba.ops.scan.selective_scan`. What surrounds the recurrence is left to autograd: it is
    cheap."""
    work = torch.float64 if u.dtype == torch.float64 else torch.float32
    out_dtype = u.dtype
    u, delta = u.to(work), delta.to(work)
    if delta_bias is not None:
        delta = delta + delta_bias.to(work)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    y, last_state = _TwoPhaseScan.apply(u, delta, A.to(work), B.to(work), C.to(work))
    if D is not None:
        y = y + u * D.to(work)[:, None]
    if z is not None:
        y = y * F.silu(z.to(work))
    y = y.to(out_dtype)
    return (y, last_state) if return_last_state else y
