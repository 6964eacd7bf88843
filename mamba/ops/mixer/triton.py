"""What a mixer of one scan does between its two projections, as one operator: convolution, projection to B, C and
delta, scan.

Nothing is computed otherwise than by the operators of the parts (`mamba.ops.conv`, `mamba.ops.scan`). What is saved is
the memory traffic between them in backward: the gradients of x and z are written side by side, as the projection before
wants them, those of B, C and delta likewise, and the two gradients that meet at the convolution's output are added
inside a matrix product. As separate operators, each of these is one more pass over tensors of the full width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mamba.ops.mixer import conv
from mamba.ops.scan import triton as scan
from mamba.ops.scan.inputs import ScanInputs


def _scan_inputs(xz: Tensor, x: Tensor, rows: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor) -> ScanInputs:
    """x: the convolution's output; rows (batch, length, 2 d_state + d_inner): B, C and delta side by side."""
    d_inner, d_state = A.shape
    B, C, delta = rows.split((d_state, d_state, d_inner), dim=-1)
    u, delta, B, C, z = (t.transpose(1, 2) for t in (x, delta, B, C, xz[..., d_inner:]))
    return ScanInputs(u, delta, A, B, C, D, z, delta_bias)


@torch.library.custom_op("mamba_forge::mixer", mutates_args=())
def _mixer(
    xz: Tensor, taps: Tensor, taps_bias: Tensor, project: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and what backward needs: the convolution's output, B C delta, and what the scan keeps."""
    x = conv.launch_forward(xz[..., : A.shape[0]], taps, taps_bias, False)
    rows = torch.matmul(x, project.t())
    p = _scan_inputs(xz, x, rows, A, D, delta_bias)
    y, _, _, states, packed, parameters = scan.launch_forward(p, p, 1, True, keep, False)
    return y.transpose(1, 2), x, rows, states, packed, parameters


@_mixer.register_fake
def _(
    xz: Tensor, taps: Tensor, taps_bias: Tensor, project: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = xz.new_empty((*xz.shape[:2], A.shape[0]))
    rows = xz.new_empty((*xz.shape[:2], project.shape[0]))
    p = _scan_inputs(xz, x, rows, A, D, delta_bias)
    return xz.new_empty(x.shape), x, rows, *scan.empty_kept(p, 1, keep)


@torch.library.custom_op("mamba_forge::mixer_backward", mutates_args=())
def _mixer_backward(
    dy: Tensor, xz: Tensor, taps: Tensor, taps_bias: Tensor, project: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor,
    x: Tensor, rows: Tensor, states: Tensor, packed: Tensor, parameters: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the first seven arguments of `_mixer`, each in its tensor's type."""
    d_inner = A.shape[0]
    p = _scan_inputs(xz, x, rows, A, D, delta_bias)
    d_xz, d_x, d_rows = xz.new_empty(xz.shape), x.new_empty(x.shape), rows.new_empty(rows.shape)
    to = _scan_inputs(d_xz, d_x, d_rows, A.new_empty(A.shape), D.new_empty(D.shape), delta_bias.new_empty(d_inner))
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    scan.launch_backward(dy.transpose(1, 2), None, None, p, p, (states, packed, parameters), True, [to])
    d_project = d_rows.flatten(0, 1).t() @ x.flatten(0, 1)
    d_x.flatten(0, 1).addmm_(d_rows.flatten(0, 1), project)
    d_taps, d_taps_bias = conv.launch_backward(d_x, xz[..., :d_inner], taps, taps_bias, False, d_xz[..., :d_inner])
    assert to.D is not None and to.delta_bias is not None
    return d_xz, d_taps, d_taps_bias, d_project, to.A, to.D, to.delta_bias


@_mixer_backward.register_fake
def _(
    dy: Tensor, xz: Tensor, taps: Tensor, taps_bias: Tensor, project: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor,
    x: Tensor, rows: Tensor, states: Tensor, packed: Tensor, parameters: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    channels, _, count = taps.shape
    d_taps = taps.new_empty((count, channels)).t().unsqueeze(1)
    rest = [t.new_empty(t.shape) for t in (taps_bias, project, A, D, delta_bias)]
    return xz.new_empty(xz.shape), d_taps, *rest  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.keep = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.keep:
        raise RuntimeError("the mixer was run without gradients in mind")
    return *_mixer_backward(dy, *ctx.saved_tensors), None


_mixer.register_autograd(_backward, setup_context=_setup_context)


def mixer_triton(
    xz: Tensor, taps: Tensor, taps_bias: Tensor, project: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """Arguments as in `mamba.ops.mixer.mixer`; float32, bfloat16 or float16. Differentiable once; deterministic."""
    given = (xz, taps, taps_bias, project, A, D, delta_bias)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    y, *_ = _mixer(*given, keep)
    return y
