"""The causal depthwise convolution with SiLU again, with one kernel for backward that writes where it is told.

    pre_l = bias + sum_k w_k x_(l - taps + 1 + k),   y = pre sigmoid(pre)

and, reversed, x_(l + taps - 1 - k): the same with tokens counted from the end.

A program owns some channels, a few in each thread, and a run of TOKENS tokens, all of them in the registers of the
thread: what the taps meet is a matter of naming, and the sums over tokens for the gradients of the taps and of the bias
need no other thread. It reads taps - 1 tokens before its own, and in backward as many after: dx_l takes d(pre) of later
tokens, which are computed again instead of going through memory. All loads come first, so that one waits for none
before it. Sums are written per program and added by torch in a fixed order: the same inputs give the same bits. A
program does the same tokens of several batch entries, which share the loads of the weights and the sums.

`mamba.ops.conv.triton` is the one that has been measured: its backward has two kernels, with d(pre) in memory between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba.ops.triton_math import device_of, sigmoid

COLUMNS = 128  # channels of a program
WARPS = 2
TOKENS = 16  # of a program
MOST_ENTRIES = 8  # batch entries of a program
ENOUGH_PROGRAMS = 1024  # several for each scheduler of a large GPU


@triton.jit
def _place(runs, D, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr, TOKENS: tl.constexpr):
    """This program's first batch entry, first token in the order of the scan, and channels (COLUMNS,)."""
    entry = (tl.program_id(0) // runs).to(tl.int64) * ENTRIES
    return entry, (tl.program_id(0) % runs) * TOKENS, tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _weights(weight, bias, columns, D, TAPS: tl.constexpr):
    """The taps' weights, in their order, and the bias; float32, (COLUMNS,) each."""
    taps = ()
    for k in tl.static_range(TAPS):
        taps = taps + (tl.load(weight + columns * TAPS + k, mask=columns < D, other=0.0).to(tl.float32),)
    return taps, tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def _row(token, L, stride_l, REVERSE: tl.constexpr):
    """Where a token lies in its sequence, counted in the order of the scan."""
    return ((L - 1 - token) if REVERSE else token) * stride_l


@triton.jit
def _tokens(pointer, first, count: tl.constexpr, L, length, columns, D, stride_l, REVERSE: tl.constexpr):
    """`count` tokens from `first` on, (COLUMNS,) each; zero outside the sequence, and all of them if length is 0."""
    found = ()
    for i in tl.static_range(count):
        token = first + i
        inside = columns < tl.where((token >= 0) & (token < length), D, 0)
        found = found + (tl.load(pointer + _row(token, L, stride_l, REVERSE) + columns, mask=inside, other=0.0),)
    return found


@triton.jit
def _before_silu(tokens, at: tl.constexpr, taps, shift, TAPS: tl.constexpr):
    """`pre` of the token that the last tap meets at `at + TAPS - 1`."""
    pre = shift
    for k in tl.static_range(TAPS):
        pre += taps[k] * tokens[at + k].to(tl.float32)
    return pre


@triton.jit
def _conv_kernel(
    x, weight, bias, y, batches, L, D, runs, stride_b, stride_l,
    TAPS: tl.constexpr, REVERSE: tl.constexpr, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    entry, first, columns = _place(runs, D, COLUMNS, ENTRIES, TOKENS)
    taps, shift = _weights(weight, bias, columns, D, TAPS)
    for e in range(ENTRIES):
        batch = entry + e
        length = tl.where(batch < batches, L, 0)
        before = first - (TAPS - 1)
        xs = _tokens(x + batch * stride_b, before, TOKENS + TAPS - 1, L, length, columns, D, stride_l, REVERSE)
        for i in tl.static_range(TOKENS):
            pre = _before_silu(xs, i, taps, shift, TAPS)
            to = y + batch * L * D + _row(first + i, L, D, REVERSE) + columns
            tl.store(to, pre * sigmoid(pre), mask=columns < tl.where(first + i < length, D, 0))


@triton.jit
def _conv_backward_kernel(
    x, weight, bias, dy, dx, sums, batches, L, D, runs, stride_b, stride_l, dy_stride_b, dy_stride_l,
    dx_stride_b, dx_stride_l,
    TAPS: tl.constexpr, REVERSE: tl.constexpr, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """dx, and this program's share of the gradients of the taps and of the bias: sums (programs, TAPS + 1, D), the
    bias last."""
    entry, first, columns = _place(runs, D, COLUMNS, ENTRIES, TOKENS)
    taps, shift = _weights(weight, bias, columns, D, TAPS)
    shares = ()
    for _ in tl.static_range(TAPS + 1):
        shares = shares + (tl.zeros((COLUMNS,), tl.float32),)
    for e in range(ENTRIES):
        batch = entry + e
        length = tl.where(batch < batches, L, 0)
        before = first - (TAPS - 1)
        xs = _tokens(x + batch * stride_b, before, TOKENS + 2 * (TAPS - 1), L, length, columns, D, stride_l, REVERSE)
        grads = _tokens(dy + batch * dy_stride_b, first, TOKENS + TAPS - 1, L, length, columns, D, dy_stride_l, REVERSE)
        ds = ()  # d(pre) of the tokens so far
        for i in tl.static_range(TOKENS + TAPS - 1):
            pre = _before_silu(xs, i, taps, shift, TAPS)
            s = sigmoid(pre)
            d = grads[i].to(tl.float32) * s * (1.0 + pre * (1.0 - s))
            ds = ds + (d,)
            if i < TOKENS:
                added = ()
                for k in tl.static_range(TAPS):
                    added = added + (shares[k] + d * xs[i + k].to(tl.float32),)
                shares = added + (shares[TAPS] + d,)
            if i >= TAPS - 1:
                out = taps[TAPS - 1] * ds[i - (TAPS - 1)]
                for k in tl.static_range(TAPS - 1):
                    out += taps[k] * ds[i - k]
                token = first + i - (TAPS - 1)
                to = dx + batch * dx_stride_b + _row(token, L, dx_stride_l, REVERSE) + columns
                tl.store(to, out, mask=columns < tl.where(token < length, D, 0))
    at = sums + tl.program_id(0).to(tl.int64) * (TAPS + 1) * D
    for k in tl.static_range(TAPS + 1):
        tl.store(at + k * D + columns, shares[k], mask=columns < D)


def _launch(x: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The grid, runs of tokens in a sequence, and the constants of the kernels."""
    batch, length, channels = x.shape
    tokens = min(TOKENS, triton.next_power_of_2(length))
    runs, columns = triton.cdiv(length, tokens), triton.cdiv(channels, COLUMNS)
    entries = 1
    while 2 * entries <= min(MOST_ENTRIES, batch) and batch * runs * columns >= 2 * entries * ENOUGH_PROGRAMS:
        entries *= 2
    constants = {"COLUMNS": COLUMNS, "ENTRIES": entries, "TOKENS": tokens, "num_warps": WARPS}
    return (triton.cdiv(batch, entries) * runs, columns), runs, constants


def _readable(t: Tensor) -> Tensor:
    """Channels lie next to each other; the other strides are free."""
    return t if t.stride(-1) == 1 else t.contiguous()


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """Arguments as in `mamba.ops.conv.causal_conv_silu`; float32, bfloat16 or float16, also mixed."""
    y = x.new_empty(x.shape)
    grid, runs, constants = _launch(x)
    x = _readable(x)
    with device_of(x):
        _conv_kernel[grid](
            x, weight.contiguous(), bias.contiguous(), y, *x.shape, runs, *x.stride()[:2],
            TAPS=weight.shape[-1], REVERSE=reverse, **constants,
        )  # fmt: skip
    return y


def launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool, dx: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient of x into dx, whose channels lie next to each other; returns those of weight and bias."""
    taps = weight.shape[-1]
    grid, runs, constants = _launch(x)
    x, dy = _readable(x), _readable(dy)
    sums = x.new_empty((grid[0], taps + 1, x.shape[2]), dtype=torch.float32)
    with device_of(x):
        _conv_backward_kernel[grid](
            x, weight.contiguous(), bias.contiguous(), dy, dx, sums, *x.shape, runs,
            *x.stride()[:2], *dy.stride()[:2], *dx.stride()[:2], TAPS=taps, REVERSE=reverse, **constants,
        )  # fmt: skip
    total = sums.sum(0)
    return total[:taps].t().unsqueeze(1).to(weight.dtype, copy=True), total[taps].to(bias.dtype, copy=True)
