"""The parts of a Mamba block: stochastic depth, the selective SSM mixer, the MLP, and the block itself.

Every width is read from the tensors themselves, so a layer whose weights were made smaller runs as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba.conv import causal_conv1d, causal_conv_silu
from mamba.scan import selective_scan


@dataclass(frozen=True)
class BlockShape:
    """The widths of one block, which pruning may make different from its neighbours'."""

    d_inner: int
    d_state: int
    d_conv: int
    mlp_hidden: int
    out_channels: int | None = None
    """Residual channels that the mixer writes to; None: all of them."""
    dt_rank: int | None = None
    """Rank of the time step's projection; None: full, one row of `x_proj` a channel."""
    shared_bc: bool = False
    """One projection serves as B and as C."""
    separable_conv: bool = False
    """A pointwise convolution follows the depthwise one."""


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


class CausalConv1d(nn.Conv1d):
    """Causal depthwise convolution, (batch, length, channels) -> the same; with SiLU (fused, on a GPU) if asked."""

    def __init__(self, channels: int, taps: int, silu: bool) -> None:
        super().__init__(channels, channels, taps, groups=channels, padding=taps - 1)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return (causal_conv_silu if self.silu else causal_conv1d)(x, self.weight, self.bias)


class SelectiveSSM(nn.Module):
    """The Mamba mixer (https://arxiv.org/abs/2312.00752, section 3.4) with a full-rank time step.

    (batch, length, d_model) -> (batch, length, d_model), or (batch, length, out_channels) where `out_index` says which
    channels those are. `in_proj` gives x (first d_inner rows) and the gate z; `x_proj` gives B, C and delta, in this
    order.

    Deviation from the paper: delta is projected by d_inner full rows instead of a low-rank pair, without a learned
    bias. softplus(0) = 0.69 would forget within two tokens, so the paper's start, delta log-uniform in
    [0.001, 0.1], is kept as the constant buffer `delta_bias`, one value a channel, added before the softplus.
    Pruning may bring the low-rank pair back (`dt_proj`), let one projection serve as B and C, or add a pointwise
    convolution (see `BlockShape`).
    """

    delta_bias: Tensor
    out_index: Tensor | None

    def __init__(self, d_model: int, shape: BlockShape) -> None:
        super().__init__()
        d_inner, d_state = shape.d_inner, shape.d_state
        self.shared_bc = shape.shared_bc
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = CausalConv1d(d_inner, shape.d_conv, silu=not shape.separable_conv)
        self.pointwise = nn.Linear(d_inner, d_inner, bias=False) if shape.separable_conv else None
        delta_rows = d_inner if shape.dt_rank is None else shape.dt_rank
        self.x_proj = nn.Linear(d_inner, (1 if shape.shared_bc else 2) * d_state + delta_rows, bias=False)
        self.dt_proj = None if shape.dt_rank is None else nn.Linear(shape.dt_rank, d_inner, bias=False)
        # S4D-real initialisation: A = -(1, 2, ..., N) in every channel
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model if shape.out_channels is None else shape.out_channels, bias=False)
        delta = torch.exp(torch.rand(d_inner) * math.log(0.1 / 0.001) + math.log(0.001))
        self.register_buffer("delta_bias", delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus
        index = None if shape.out_channels is None else torch.arange(shape.out_channels)
        self.register_buffer("out_index", index)

    def segments(self) -> dict[str, dict[str, int]]:
        """How the rows of a fused projection divide: parameter name -> part -> number of rows, in order."""
        d_inner, d_state = self.A_log.shape
        states = {"B": d_state} if self.shared_bc else {"B": d_state, "C": d_state}
        step = {"delta": d_inner} if self.dt_proj is None else {"dt": self.dt_proj.weight.shape[1]}
        return {"in_proj.weight": {"x": d_inner, "z": d_inner}, "x_proj.weight": states | step}

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self.conv1d(x)
        if self.pointwise is not None:
            x = F.silu(self.pointwise(x))
        B, *C, delta = self.x_proj(x).split(tuple(self.segments()["x_proj.weight"].values()), dim=-1)
        if self.dt_proj is not None:
            delta = self.dt_proj(delta)
        y = selective_scan(
            x.transpose(1, 2),
            delta.transpose(1, 2),
            -torch.exp(self.A_log.float()),
            B.transpose(1, 2),
            (C[0] if C else B).transpose(1, 2),
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
        ssm = self.ssm
        d_inner, d_state = ssm.A_log.shape
        return BlockShape(
            d_inner,
            d_state,
            ssm.conv1d.weight.shape[-1],
            self.mlp.fc1.weight.shape[0],
            out_channels=None if ssm.out_index is None else len(ssm.out_index),
            dt_rank=None if ssm.dt_proj is None else ssm.dt_proj.weight.shape[1],
            shared_bc=ssm.shared_bc,
            separable_conv=ssm.pointwise is not None,
        )

    def segments(self) -> dict[str, dict[str, int]]:
        """The mixer's, with names that start at the block."""
        return {f"ssm.{name}": rows for name, rows in self.ssm.segments().items()}

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.drop_path(self.ssm(self.norm1(x)))
        index = self.ssm.out_index
        x = x + mixed if index is None else x.index_add(-1, index, mixed.to(x.dtype))
        return x + self.drop_path(self.mlp(self.norm2(x)))
