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
from mamba.layers import BlockShape, MambaBlock
from pruning.components import Part, find

Replacement = Callable[[MambaBlock, float, bool], tuple[BlockShape, dict[str, Tensor]]]
"""(block, rate, new shape?) -> the block's shape and its state, from which it is built anew."""


@torch.no_grad()
def low_rank(block: MambaBlock, rate: float, new_shape: bool) -> tuple[BlockShape, dict[str, Tensor]]:
    """Delta's full projection as a product of two thin ones: its truncated SVD, the best in the Frobenius norm.

    A rank costs a row and a column, so n = d_inner / 2 ranks cost what the full matrix costs; the rate takes round(rate
    n) of them: rate 0.4 leaves a rank of 0.3 d_inner and 60 % of the parameters.
    """
    hit = find(block, Part("ssm.x_proj.weight", 0, "delta"))
    if hit is None:
        raise ConfigError("linear_delta:low_rank: the projection is of low rank already; cut it by linear_delta:rank")
    weight, span = hit
    full = weight[span].double()
    budget = max(1, int((full != 0).any(1).sum()) // 2)  # rows that are masked do not count
    rank = budget - round(rate * budget)
    if rank < 1:
        raise ConfigError(f"linear_delta:low_rank: rate {rate:g} leaves no rank of {budget}; lower it")
    u, s, vh = torch.linalg.svd(full, full_matrices=False)
    left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * vh[:rank]
    state = _state(block)
    if not new_shape:
        state["ssm.x_proj.weight"][span] = (left @ right).to(weight) * (full != 0).any(1, keepdim=True)
        return block.shape, state
    state["ssm.x_proj.weight"] = torch.cat((weight[: span.start], right.to(weight)))
    state["ssm.dt_proj.weight"] = left.to(weight)
    return replace(block.shape, dt_rank=rank), state


@torch.no_grad()
def shared(block: MambaBlock, rate: float, new_shape: bool) -> tuple[BlockShape, dict[str, Tensor]]:
    """B and C from one projection, the mean of both: half of their rows go, whatever the rate says."""
    if rate != 0.5:
        raise ConfigError(f"linear_B_C:shared takes exactly half of the rows; valid: 0.5, got {rate:g}")
    b, c = (find(block, Part("ssm.x_proj.weight", 0, name)) for name in "BC")
    if b is None or c is None:
        raise ConfigError("linear_B_C:shared: B and C are one projection already")
    weight = b[0]
    mean = (weight[b[1]] + weight[c[1]]) / 2
    state = _state(block)
    if not new_shape:
        state["ssm.x_proj.weight"][b[1]] = mean
        state["ssm.x_proj.weight"][c[1]] = mean
        return block.shape, state
    state["ssm.x_proj.weight"] = torch.cat((mean, weight[c[1].stop :]))
    return replace(block.shape, shared_bc=True), state


@torch.no_grad()
def separable(block: MambaBlock, rate: float, new_shape: bool) -> tuple[BlockShape, dict[str, Tensor]]:
    """A depthwise-separable convolution (https://arxiv.org/abs/1704.04861) in place of the depthwise one.

    An architecture change, not a saving: round(rate taps) of the earliest taps go, and a pointwise convolution that
    starts as the identity comes in, d_inner^2 parameters, for training to make something of.
    """
    if block.ssm.pointwise is not None:
        raise ConfigError("conv1d:separable: the convolution is separable already")
    state = _state(block)
    weight = state["ssm.conv1d.weight"]
    taps = weight.shape[-1]
    gone = round(rate * taps)
    if gone >= taps:
        raise ConfigError(f"conv1d:separable: rate {rate:g} leaves none of {taps} taps; lower it")
    weight[..., :gone] = 0
    state["ssm.pointwise.weight"] = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    if new_shape:
        state["ssm.conv1d.weight"] = weight[..., gone:]
    return replace(block.shape, separable_conv=True, d_conv=taps - gone * new_shape), state


REWRITES = {"low_rank": "ssm.x_proj.weight", "shared": "ssm.x_proj.weight", "separable": "ssm.conv1d.weight"}
"""The tensor that each rewrites."""
REPLACEMENTS: dict[str, Replacement] = {"low_rank": low_rank, "shared": shared, "separable": separable}


def _state(block: MambaBlock) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in block.state_dict().items()}
