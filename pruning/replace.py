"""Cuts that rewrite weights instead of removing some: a low-rank time step, B and C shared, a separable convolution.

Each takes a block and gives what it is rebuilt from, in two forms that compute the same: in the old shape (to measure
what the cut costs) and in the new one. No mask holds such a cut while a model trains in the old shape: train the new
one. Scope, floor and multiple do not concern them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mamba.errors import ConfigError
from mamba.models.block import MambaBlock
from mamba.models.ssm import BlockShape
from pruning.components import each, find_all

X_PROJ, CONV = each(("x_proj{}.weight", 0)), each(("conv1d{}.weight", 0))
Replacement = Callable[[MambaBlock, float, bool], tuple[BlockShape, dict[str, Tensor]]]
"""(block, rate, new shape?) -> the block's shape and its state, from which it is built anew."""


@torch.no_grad()
def low_rank(block: MambaBlock, rate: float, new_shape: bool) -> tuple[BlockShape, dict[str, Tensor]]:
    """Delta's full projection as a product of two thin ones: its truncated SVD, the best in the Frobenius norm.

    A rank costs a row and a column, so n = d_inner / 2 ranks cost what the full matrix costs; the rate takes round(rate
    n) of them: rate 0.4 leaves a rank of 0.3 d_inner and 60 % of the parameters.
    """
    found = find_all(block, each(("x_proj{}.weight", 0, "delta")))
    if not found:
        raise ConfigError("linear_delta:low_rank: the projection is of low rank already; cut it by linear_delta:rank")
    # rows that are masked do not count
    budget = max(1, max(int((weight[span] != 0).any(1).sum()) for _, weight, span in found) // 2)
    rank = budget - round(rate * budget)
    if rank < 1:
        raise ConfigError(f"linear_delta:low_rank: rate {rate:g} leaves no rank of {budget}; lower it")
    state = _state(block)
    for part, weight, span in found:
        full = weight[span].double()
        u, s, vh = torch.linalg.svd(full, full_matrices=False)
        left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * vh[:rank]
        if not new_shape:
            state[part.tensor][span] = (left @ right).to(weight) * (full != 0).any(1, keepdim=True)
            continue
        state[part.tensor] = torch.cat((weight[: span.start], right.to(weight)))
        state[part.tensor.replace("x_proj", "dt_proj")] = left.to(weight)
    return replace(block.shape, dt_rank=rank) if new_shape else block.shape, state


@torch.no_grad()
def shared(block: MambaBlock, rate: float, new_shape: bool) -> tuple[BlockShape, dict[str, Tensor]]:
    """B and C from one projection, the mean of both: half of their rows go, whatever the rate says."""
    if rate != 0.5:
        raise ConfigError(f"linear_B_C:shared takes exactly half of the rows; valid: 0.5, got {rate:g}")
    b_rows, c_rows = (find_all(block, each(("x_proj{}.weight", 0, name))) for name in "BC")
    if not c_rows:
        raise ConfigError("linear_B_C:shared: B and C are one projection already")
    state = _state(block)
    for (part, weight, b), (_, _, c) in zip(b_rows, c_rows, strict=True):
        mean = (weight[b] + weight[c]) / 2
        if new_shape:
            state[part.tensor] = torch.cat((weight[: b.start], mean, weight[c.stop :]))
        else:
            state[part.tensor][b] = state[part.tensor][c] = mean
    return replace(block.shape, shared_bc=True) if new_shape else block.shape, state


@torch.no_grad()
def separable(block: MambaBlock, rate: float, new_shape: bool) -> tuple[BlockShape, dict[str, Tensor]]:
    """A depthwise-separable convolution (https://arxiv.org/abs/1704.04861) in place of the depthwise one.

    An architecture change, not a saving: round(rate taps) of the earliest taps go, and a pointwise convolution that
    starts as the identity comes in, d_inner^2 parameters, for training to make something of.
    """
    if block.shape.separable_conv:
        raise ConfigError("conv1d:separable: the convolution is separable already")
    state = _state(block)
    taps = block.shape.d_conv
    gone = round(rate * taps)
    if gone >= taps:
        raise ConfigError(f"conv1d:separable: rate {rate:g} leaves none of {taps} taps; lower it")
    for part, weight, _ in find_all(block, CONV):
        state[part.tensor][..., :gone] = 0
        state[part.tensor.replace("conv1d", "pointwise")] = torch.eye(
            len(weight), dtype=weight.dtype, device=weight.device
        )
        if new_shape:
            state[part.tensor] = state[part.tensor][..., gone:]
    return replace(block.shape, separable_conv=True, d_conv=taps - gone * new_shape), state


REWRITES = {
    "low_rank": tuple(part.tensor for part in X_PROJ),
    "shared": tuple(part.tensor for part in X_PROJ),
    "separable": tuple(part.tensor for part in CONV),
}
"""The tensors that each rewrites, by their names in the table."""
REPLACEMENTS: dict[str, Replacement] = {"low_rank": low_rank, "shared": shared, "separable": separable}


def _state(block: MambaBlock) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in block.state_dict().items()}
