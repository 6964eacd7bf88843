"""The causal depthwise convolution with SiLU as Triton kernels, and as an operator that torch.compile sees whole.

    pre_l = bias + sum_k w_k x_(l - taps + 1 + k),   y = pre sigmoid(pre)

and, reversed, x_(l + taps - 1 - k): STEP is the way in which a later tap's token lies, 1 or -1.

The compiler's own version of this (shifted slices of a padded copy) took 13 ms of a 73 ms training step of mamba_small
at batch 1024 on an H200, five times what its bytes cost: docs/LOG.md. Here a program holds a tile of tokens x channels
and reads the shifted rows from the cache. Backward recomputes `pre`; it writes d(pre) once, because with it dx is
another short convolution, backwards in time. Sums over tokens are written per tile and added by torch in a fixed order:
the same inputs give the same bits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 64  # channels of a tile: a 128-byte row in 16 bits
MOST_ROWS = 64  # tokens of a tile


@triton.jit
def _tile(chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's batch entry, token numbers (ROWS, 1) and channel numbers (1, COLUMNS)."""
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    rows = (tl.program_id(0) % chunks) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return batch, rows, columns


@triton.jit
def _load(pointer, batch, rows, columns, L, D, stride_b, stride_l):
    """Rows outside the sequence are zero."""
    inside = (rows >= 0) & (rows < L) & (columns < D)
    return tl.load(pointer + batch * stride_b + rows * stride_l + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _convolve(x, weight, bias, batch, rows, columns, L, D, stride_b, stride_l, TAPS: tl.constexpr, STEP: tl.constexpr):
    out = tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)
    for k in tl.static_range(TAPS):
        w = tl.load(weight + columns * TAPS + k, mask=columns < D, other=0.0).to(tl.float32)
        out += w * _load(x, batch, rows - STEP * (TAPS - 1 - k), columns, L, D, stride_b, stride_l)
    return out


@triton.jit
def _conv_kernel(
    x, weight, bias, y, L, D, chunks, stride_b, stride_l,
    TAPS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    batch, rows, columns = _tile(chunks, ROWS, COLUMNS)
    pre = _convolve(x, weight, bias, batch, rows, columns, L, D, stride_b, stride_l, TAPS, STEP)
    tl.store(y + (batch * L + rows) * D + columns, pre * tl.sigmoid(pre), mask=(rows < L) & (columns < D))


@triton.jit
def _conv_backward_pre_kernel(
    x, weight, bias, dy, dpre, sums, L, D, chunks, stride_b, stride_l, dy_stride_b, dy_stride_l,
    TAPS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d(pre), and this tile's sums for the gradients of the taps and, last, of the bias."""
    batch, rows, columns = _tile(chunks, ROWS, COLUMNS)
    pre = _convolve(x, weight, bias, batch, rows, columns, L, D, stride_b, stride_l, TAPS, STEP)
    s = tl.sigmoid(pre)
    d = _load(dy, batch, rows, columns, L, D, dy_stride_b, dy_stride_l) * s * (1 + pre * (1 - s))
    tl.store(dpre + (batch * L + rows) * D + columns, d, mask=(rows < L) & (columns < D))
    out = sums + tl.program_id(0).to(tl.int64) * (TAPS + 1) * D
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    for k in tl.static_range(TAPS):
        share = tl.sum(d * _load(x, batch, rows - STEP * (TAPS - 1 - k), columns, L, D, stride_b, stride_l), axis=0)
        tl.store(out + k * D + column, share, mask=column < D)
    tl.store(out + TAPS * D + column, tl.sum(d, axis=0), mask=column < D)


@triton.jit
def _conv_backward_x_kernel(
    dpre, weight, dx, L, D, chunks,
    TAPS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    batch, rows, columns = _tile(chunks, ROWS, COLUMNS)
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.static_range(TAPS):
        w = tl.load(weight + columns * TAPS + k, mask=columns < D, other=0.0).to(tl.float32)
        out += w * _load(dpre, batch, rows + STEP * (TAPS - 1 - k), columns, L, D, L * D, D)
    tl.store(dx + (batch * L + rows) * D + columns, out, mask=(rows < L) & (columns < D))


def _grid(x: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The launch grid, tiles a sequence, and the tile's size."""
    batch, length, channels = x.shape
    rows = min(MOST_ROWS, max(4, triton.next_power_of_2(length)))
    chunks = triton.cdiv(length, rows)
    return (batch * chunks, triton.cdiv(channels, COLUMNS)), chunks, {"ROWS": rows, "COLUMNS": COLUMNS}


def _readable(t: Tensor) -> Tensor:
    """Channels lie next to each other; the other strides are free."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _device_of(t: Tensor) -> AbstractContextManager[None]:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


@torch.library.custom_op("mamba_forge::causal_conv_silu", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    y = x.new_empty(x.shape)
    grid, chunks, tile = _grid(x)
    x = _readable(x)
    with _device_of(x):
        _conv_kernel[grid](
            x, weight.contiguous(), bias, y, x.shape[1], x.shape[2], chunks, *x.stride()[:2],
            TAPS=weight.shape[-1], STEP=-1 if reverse else 1, **tile, num_warps=8,
        )  # fmt: skip
    return y


@_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mamba_forge::causal_conv_silu_backward", mutates_args=())
def _conv_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in its tensor's type."""
    _, length, channels = x.shape
    taps, step = weight.shape[-1], -1 if reverse else 1
    grid, chunks, tile = _grid(x)
    x, dy, kernel = _readable(x), _readable(dy), weight.contiguous()
    dpre, dx = x.new_empty(x.shape), x.new_empty(x.shape)
    sums = x.new_empty((grid[0], taps + 1, channels), dtype=torch.float32)
    with _device_of(x):
        _conv_backward_pre_kernel[grid](
            x, kernel, bias, dy, dpre, sums, length, channels, chunks, *x.stride()[:2], *dy.stride()[:2],
            TAPS=taps, STEP=step, **tile, num_warps=8,
        )  # fmt: skip
        _conv_backward_x_kernel[grid](
            dpre, kernel, dx, length, channels, chunks, TAPS=taps, STEP=step, **tile, num_warps=8
        )
    total = sums.sum(0)
    return dx, total[:taps].t().unsqueeze(1).to(weight.dtype, copy=True), total[taps].to(bias.dtype, copy=True)


@_conv_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    channels, _, taps = weight.shape
    return x.new_empty(x.shape), weight.new_empty((taps, channels)).t().unsqueeze(1), bias.new_empty(channels)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_conv_backward(dy, *ctx.saved_tensors, ctx.reverse), None


_conv.register_autograd(_backward, setup_context=_setup_context)


def causal_conv_silu_triton(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """Arguments as in `mamba.conv.causal_conv_silu`; float32, bfloat16 or float16, also mixed. Deterministic."""
    return _conv(x, weight, bias, reverse)
