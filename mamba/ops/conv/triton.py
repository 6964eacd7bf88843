"""The causal depthwise convolution with SiLU as Triton kernels, and as an operator that torch.compile sees whole.

    pre_l = bias + sum_k w_k x_(l - taps + 1 + k),   y = pre sigmoid(pre)

and, reversed, x_(l + taps - 1 - k): STEP is the way in which a later tap's token lies, 1 or -1.

The compiler's own version of this (shifted slices of a padded copy) took 13 ms of a 73 ms training step of mamba_small
at batch 1024 on an H200, five times what its bytes cost: docs/LOG.md. Here a program holds a tile of tokens x channels
and reads the shifted rows from the cache. Backward recomputes `pre`; it writes d(pre) once, because with it dx is
another short convolution, backwards in time. Sums over tokens are written per program and added by torch in a fixed
order: the same inputs give the same bits. A program does the same tile of several batch entries, which share the loads
of the weights and, in backward, the sums. Tile and warps are the fastest of those tried (docs/LOG.md).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba.ops.triton_math import device_of, sigmoid

COLUMNS = 64  # channels of a tile: a 128-byte row in 16 bits
MOST_ROWS = 16  # tokens of a tile
MOST_ENTRIES = 8  # batch entries of a program
ENOUGH_PROGRAMS = 192  # more than a large GPU has multiprocessors
WARPS = 2


@triton.jit
def _tile(chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr):
    """This program's first batch entry, token numbers (ROWS, 1) and channel numbers (1, COLUMNS)."""
    first = (tl.program_id(0) // chunks).to(tl.int64) * ENTRIES
    rows = (tl.program_id(0) % chunks) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return first, rows, columns


@triton.jit
def _taps(weight, columns, D, TAPS: tl.constexpr):
    """The weights (1, COLUMNS) of each tap. Each is a load of its own for every channel: once for all entries."""
    taps = ()
    for k in tl.static_range(TAPS):
        taps = taps + (tl.load(weight + columns * TAPS + k, mask=columns < D, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _load(pointer, batch, rows, columns, L, D, stride_b, stride_l):
    """Rows outside the sequence are zero."""
    inside = (rows >= 0) & (rows < L) & (columns < D)
    return tl.load(pointer + batch * stride_b + rows * stride_l + columns, mask=inside, other=0.0)


@triton.jit
def _shifted(x, batch, rows, columns, L, D, stride_b, stride_l, TAPS: tl.constexpr, STEP: tl.constexpr):
    """The tile of x that each tap meets."""
    tiles = ()
    for k in tl.static_range(TAPS):
        tiles = tiles + (_load(x, batch, rows - STEP * (TAPS - 1 - k), columns, L, D, stride_b, stride_l),)
    return tiles


@triton.jit
def _convolve(tiles, taps, out, TAPS: tl.constexpr):
    """out and the taps' products."""
    for k in tl.static_range(TAPS):
        out += taps[k] * tiles[k].to(tl.float32)
    return out


@triton.jit
def _conv_kernel(
    x, weight, bias, y, batches, L, D, chunks, stride_b, stride_l,
    TAPS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    first, rows, columns = _tile(chunks, ROWS, COLUMNS, ENTRIES)
    taps = _taps(weight, columns, D, TAPS)
    shift = tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)
    for entry in range(ENTRIES):
        batch = first + entry
        length = tl.where(batch < batches, L, 0)
        tiles = _shifted(x, batch, rows, columns, length, D, stride_b, stride_l, TAPS, STEP)
        pre = _convolve(tiles, taps, shift, TAPS)
        tl.store(y + (batch * L + rows) * D + columns, pre * sigmoid(pre), mask=(rows < length) & (columns < D))


@triton.jit
def _conv_backward_pre_kernel(
    x, weight, bias, dy, dpre, sums, batches, L, D, chunks, stride_b, stride_l, dy_stride_b, dy_stride_l,
    TAPS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """d(pre), and the sums over this program's tiles for the gradients of the taps and of the bias.

    sums: (programs, TAPS + 1, D), the bias last. A sum over rows is an exchange between warps, so entries are added
    first, each thread its own.
    """
    first, rows, columns = _tile(chunks, ROWS, COLUMNS, ENTRIES)
    taps = _taps(weight, columns, D, TAPS)
    shift = tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)
    shares = ()
    for _ in tl.static_range(TAPS + 1):
        shares = shares + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    for entry in range(ENTRIES):
        batch = first + entry
        length = tl.where(batch < batches, L, 0)
        tiles = _shifted(x, batch, rows, columns, length, D, stride_b, stride_l, TAPS, STEP)
        grad = _load(dy, batch, rows, columns, length, D, dy_stride_b, dy_stride_l)
        pre = _convolve(tiles, taps, shift, TAPS)
        s = sigmoid(pre)
        d = grad.to(tl.float32) * s * (1 + pre * (1 - s))
        tl.store(dpre + (batch * L + rows) * D + columns, d, mask=(rows < length) & (columns < D))
        added = ()
        for k in tl.static_range(TAPS):
            added = added + (shares[k] + d * tiles[k].to(tl.float32),)
        shares = added + (shares[TAPS] + d,)
    out = sums + tl.program_id(0).to(tl.int64) * (TAPS + 1) * D
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    for k in tl.static_range(TAPS + 1):
        tl.store(out + k * D + column, tl.sum(shares[k], axis=0), mask=column < D)


@triton.jit
def _conv_backward_x_kernel(
    dpre, weight, dx, batches, L, D, chunks,
    TAPS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    first, rows, columns = _tile(chunks, ROWS, COLUMNS, ENTRIES)
    taps = _taps(weight, columns, D, TAPS)
    none = tl.zeros((ROWS, COLUMNS), tl.float32)
    for entry in range(ENTRIES):
        batch = first + entry
        length = tl.where(batch < batches, L, 0)
        tiles = _shifted(dpre, batch, rows, columns, length, D, L * D, D, TAPS, -STEP)
        out = _convolve(tiles, taps, none, TAPS)
        tl.store(dx + (batch * L + rows) * D + columns, out, mask=(rows < length) & (columns < D))


def _launch(x: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The grid, tiles a sequence, and the constants of the kernels."""
    batch, length, channels = x.shape
    rows = min(MOST_ROWS, max(4, triton.next_power_of_2(length)))
    chunks, columns = triton.cdiv(length, rows), triton.cdiv(channels, COLUMNS)
    entries = 1
    while 2 * entries <= min(MOST_ENTRIES, batch) and batch * chunks * columns >= 2 * entries * ENOUGH_PROGRAMS:
        entries *= 2
    constants = {"ROWS": rows, "COLUMNS": COLUMNS, "ENTRIES": entries, "num_warps": WARPS}
    return (triton.cdiv(batch, entries) * chunks, columns), chunks, constants


def _readable(t: Tensor) -> Tensor:
    """Channels lie next to each other; the other strides are free."""
    return t if t.stride(-1) == 1 else t.contiguous()


@torch.library.custom_op("mamba_forge::causal_conv_silu", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    y = x.new_empty(x.shape)
    grid, chunks, constants = _launch(x)
    x = _readable(x)
    with device_of(x):
        _conv_kernel[grid](
            x, weight.contiguous(), bias.contiguous(), y, *x.shape, chunks, *x.stride()[:2],
            TAPS=weight.shape[-1], STEP=-1 if reverse else 1, **constants,
        )  # fmt: skip
    return y


@_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mamba_forge::causal_conv_silu_backward", mutates_args=())
def _conv_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in its tensor's type."""
    taps, step = weight.shape[-1], -1 if reverse else 1
    grid, chunks, constants = _launch(x)
    x, dy, kernel, shift = _readable(x), _readable(dy), weight.contiguous(), bias.contiguous()
    dpre, dx = x.new_empty(x.shape), x.new_empty(x.shape)
    sums = x.new_empty((grid[0], taps + 1, x.shape[2]), dtype=torch.float32)
    with device_of(x):
        _conv_backward_pre_kernel[grid](
            x, kernel, shift, dy, dpre, sums, *x.shape, chunks, *x.stride()[:2], *dy.stride()[:2],
            TAPS=taps, STEP=step, **constants,
        )  # fmt: skip
        _conv_backward_x_kernel[grid](dpre, kernel, dx, *x.shape, chunks, TAPS=taps, STEP=step, **constants)
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
    """Arguments as in `mamba.ops.conv.causal_conv_silu`; float32, bfloat16 or float16, also mixed. Deterministic."""
    return _conv(x, weight, bias, reverse)
