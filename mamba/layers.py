"""The parts of a Mamba block: stochastic depth, the selective SSM mixer, the MLP, and the block itself.

Every width is read from the tensors themselves, so a layer whose weights were made smaller runs as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba.scan import selective_scan


@dataclass(frozen=True)
class BlockShape:
    """The widths of one block, which pruning may make different from its neighbours'."""

    d_inner: int
    d_state: int
    d_conv: int
    mlp_hidden: int


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for whole samples (https://arxiv.org/abs/1603.09382).

    In training each sample's branch is zeroed with probability `rate` and scaled by 1 / (1 - rate) otherwise, so the
    expectation is unchanged; in evaluation it is the identity. Input and output: (batch, ...).
    """

    keep: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.active = rate > 0
        # a tensor, so that blocks that differ in their rate share one compiled graph
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    @property
    def rate(self) -> float:
        return 1.0 - float(self.keep)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.active:
            return x
        mask = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device) < self.keep
        return x * (mask / self.keep).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise causal convolution of a channels-last sequence, as shifted multiply-adds.

    A few taps over a short sequence do not fill a convolution routine, and in this form a compiler can fuse them with
    what surrounds them. x: (batch, length, channels); weight: (channels, 1, taps), the last tap meets the current
    token; returns (batch, length, channels).
    """
    taps = weight.shape[-1]
    length = x.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    out = padded[:, :length] * weight[:, 0, 0]
    for k in range(1, taps):
        out = out + padded[:, k : k + length] * weight[:, 0, k]
    return out if bias is None else out + bias


class SelectiveSSM(nn.Module):
    """The Mamba mixer (https://arxiv.org/abs/2312.00752, section 3.4) with a full-rank time step.

    (batch, length, d_model) -> (batch, length, d_model). `in_proj` gives x (first d_inner rows) and the gate z;
    `x_proj` gives B, C and delta, in this order.

    Deviation from the paper: delta is projected by d_inner full rows instead of a low-rank pair, without a learned
    bias. softplus(0) = 0.69 would forget within two tokens, so the paper's start, delta log-uniform in
    [0.001, 0.1], is kept as the constant buffer `delta_bias`, one value a channel, added before the softplus.
    """

    delta_bias: Tensor

    def __init__(self, d_model: int, shape: BlockShape) -> None:
        super().__init__()
        d_inner, d_state = shape.d_inner, shape.d_state
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, shape.d_conv, groups=d_inner, padding=shape.d_conv - 1)
        self.x_proj = nn.Linear(d_inner, 2 * d_state + d_inner, bias=False)
        # S4D-real initialisation: A = -(1, 2, ..., N) in every channel
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        delta = torch.exp(torch.rand(d_inner) * math.log(0.1 / 0.001) + math.log(0.001))
        self.register_buffer("delta_bias", delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        d_inner, d_state = self.A_log.shape
        x, z = self.in_proj(x).split(d_inner, dim=-1)
        x = F.silu(causal_conv1d(x, self.conv1d.weight, self.conv1d.bias))
        B, C, delta = self.x_proj(x).split((d_state, d_state, d_inner), dim=-1)
        y = selective_scan(
            x.transpose(1, 2),
            delta.transpose(1, 2),
            -torch.exp(self.A_log.float()),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D.float(),
            z.transpose(1, 2),
            self.delta_bias,
            delta_softplus=True,
        )
        assert isinstance(y, Tensor)
        return self.out_proj(y.transpose(1, 2))


class Mlp(nn.Module):
    """Linear, GELU, linear. (..., d_model) -> (..., d_model)."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, hidden)
        self.fc2 = nn.Linear(hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class MambaBlock(nn.Module):
    """x + drop(ssm(norm1 x)), then x + drop(mlp(norm2 x)). (batch, length, d_model) -> the same."""

    def __init__(self, d_model: int, shape: BlockShape, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.ssm = SelectiveSSM(d_model, shape)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = Mlp(d_model, shape.mlp_hidden)
        self.drop_path = DropPath(drop_path)

    @property
    def shape(self) -> BlockShape:
        """The actual widths, read from the tensors."""
        d_inner, d_state = self.ssm.A_log.shape
        return BlockShape(d_inner, d_state, self.ssm.conv1d.weight.shape[-1], self.mlp.fc1.weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ssm(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
