"""The block's MLP with GELU inside the matrix products, as Triton kernels and as an operator that torch.compile sees
whole.

    h = x up' + up_bias,   a = gelu(h),   y = a down' + down_bias

The hidden layer is several times as wide as the residual stream, so what a GPU waits for is the memory that h and a
take, not the products. Forward writes a only: GELU is the end of the first product. Backward makes h again in the same
tile in which it makes d(a) = dy down, and writes d(h) only; otherwise h, a and d(a) would each be read or written once
more. The other products are torch's. Sums over tokens for the gradient of `up_bias` are written per tile and added by
torch in a fixed order: the same inputs give the same bits.

GELU is the exact one, x Phi(x), with Phi by Abramowitz and Stegun's formula 7.1.26 (its error is below 1.5e-7) in place
of erf; h is not rounded to 16 bits between the product and GELU, as it is where they are two operations.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba.ops.triton_math import LOG2E, device_of, reciprocal

FORWARD = {"TOKENS": 128, "HIDDEN": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}
BACKWARD = {"TOKENS": 128, "HIDDEN": 64, "DEPTH": 64, "num_warps": 8, "num_stages": 3}
"""Tokens and hidden units of a tile, and how many of the products' terms are read at once."""


@triton.jit
def _normal(h):
    """Phi(h), and e^(-h^2 / 2)."""
    bell = tl.exp2(h * h * (-0.5 * LOG2E))
    t = reciprocal(1.0 + 0.23164189 * tl.abs(h))  # 0.3275911 / sqrt(2)
    p = tl.fma(t, 1.061405429, -1.453152027)
    p = tl.fma(t, p, 1.421413741)
    p = tl.fma(t, p, -0.284496736)
    p = tl.fma(t, p, 0.254829592)
    tail = 0.5 * t * p * bell
    return tl.where(h < 0, tail, 1.0 - tail), bell


@triton.jit
def _place(N, TOKENS: tl.constexpr, HIDDEN: tl.constexpr):
    """This program's tokens and hidden units. Programs of the same tokens are neighbours: they share what they read."""
    blocks = tl.cdiv(N, HIDDEN)
    tile = tl.program_id(0) // blocks
    tokens = tile.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    return tile, tokens, (tl.program_id(0) % blocks) * HIDDEN + tl.arange(0, HIDDEN)


@triton.jit
def _block(pointer, rows, columns, stride, height, width):
    """A block of a matrix whose columns lie next to each other; zero outside."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _up_kernel(
    x, up, up_bias, a, M, N, K,
    TOKENS: tl.constexpr, HIDDEN: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a (M, N) = gelu(x up' + up_bias); x (M, K), up (N, K)."""
    _, tokens, units = _place(N, TOKENS, HIDDEN)
    h = tl.zeros((TOKENS, HIDDEN), tl.float32)
    for first in range(0, K, DEPTH):
        k = first + tl.arange(0, DEPTH)
        h = tl.dot(_block(x, tokens, k, K, M, K), _block(up, units, k, K, N, K).T, h, input_precision=PRECISION)
    h += tl.load(up_bias + units, mask=units < N, other=0.0).to(tl.float32)[None, :]
    below, _ = _normal(h)
    inside = (tokens < M)[:, None] & (units < N)[None, :]
    tl.store(a + tokens[:, None] * N + units[None, :], (h * below).to(a.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_backward_kernel(
    dy, x, up, up_bias, down, dh, sums, M, N, K,
    TOKENS: tl.constexpr, HIDDEN: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dh (M, N) = (dy down) gelu'(x up' + up_bias), and its sums over each tile's tokens, (tiles, N) float32.

    dy (M, K), down (K, N), the others as above.
    """
    tile, tokens, units = _place(N, TOKENS, HIDDEN)
    h = tl.zeros((TOKENS, HIDDEN), tl.float32)
    d = tl.zeros((TOKENS, HIDDEN), tl.float32)
    for first in range(0, K, DEPTH):
        k = first + tl.arange(0, DEPTH)
        h = tl.dot(_block(x, tokens, k, K, M, K), _block(up, units, k, K, N, K).T, h, input_precision=PRECISION)
        d = tl.dot(_block(dy, tokens, k, K, M, K), _block(down, k, units, N, K, N), d, input_precision=PRECISION)
    h += tl.load(up_bias + units, mask=units < N, other=0.0).to(tl.float32)[None, :]
    below, bell = _normal(h)
    d *= below + h * bell * 0.3989422804  # tokens beyond the last have dy = 0
    inside = (tokens < M)[:, None] & (units < N)[None, :]
    tl.store(dh + tokens[:, None] * N + units[None, :], d.to(dh.dtype.element_ty), mask=inside)
    tl.store(sums + tile.to(tl.int64) * N + units, tl.sum(d, 0), mask=units < N)


def _grid(tokens: int, hidden: int, options: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(tokens, options["TOKENS"]) * triton.cdiv(hidden, options["HIDDEN"]),)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"  # of 16 bits the products are exact


@torch.library.custom_op("mamba_forge::mlp", mutates_args=())
def _mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> tuple[Tensor, Tensor]:
    """y (tokens, channels) and a (tokens, hidden); x and both weights of one type."""
    x, up, up_bias = x.contiguous(), up.contiguous(), up_bias.contiguous()
    (tokens, channels), hidden = x.shape, up.shape[0]
    a = x.new_empty((tokens, hidden))
    with device_of(x):
        _up_kernel[_grid(tokens, hidden, FORWARD)](
            x, up, up_bias, a, tokens, hidden, channels, PRECISION=_precision(x), **FORWARD
        )
    return torch.addmm(down_bias.to(a.dtype), a, down.t()), a


@_mlp.register_fake
def _(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], down.shape[0])), x.new_empty((x.shape[0], up.shape[0]))


@torch.library.custom_op("mamba_forge::mlp_backward", mutates_args=())
def _mlp_backward(
    dy: Tensor, x: Tensor, a: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, up, up_bias, down and down_bias, each in its tensor's type."""
    dy, x, up, up_bias, down = (t.contiguous() for t in (dy, x, up, up_bias, down))
    (tokens, channels), hidden = x.shape, up.shape[0]
    dh = x.new_empty((tokens, hidden))
    sums = x.new_empty((triton.cdiv(tokens, BACKWARD["TOKENS"]), hidden), dtype=torch.float32)
    with device_of(x):
        _hidden_backward_kernel[_grid(tokens, hidden, BACKWARD)](
            dy, x, up, up_bias, down, dh, sums, tokens, hidden, channels, PRECISION=_precision(x), **BACKWARD
        )
    d_down_bias = dy.sum(0, dtype=torch.float32).to(down_bias.dtype)
    return dh @ up, dh.t() @ x, sums.sum(0).to(up_bias.dtype), dy.t() @ a, d_down_bias


@_mlp_backward.register_fake
def _(
    dy: Tensor, x: Tensor, a: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (x, up, up_bias, down, down_bias))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weights = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], *weights)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _mlp_backward(dy, *ctx.saved_tensors)


_mlp.register_autograd(_backward, setup_context=_setup_context)


def mlp_triton(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """Arguments as in `mamba.ops.mlp.mlp`, x and the weights of one type, float32, bfloat16 or float16.
    Deterministic."""
    y, _ = _mlp(x.flatten(0, -2), up, up_bias, down, down_bias)
    return y.unflatten(0, x.shape[:-1])
