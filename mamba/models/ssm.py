"""The mixer of a Mamba block: one selective scan of the sequence or several, and what a block is made of.

Every width is read from the tensors themselves, so a layer whose weights were made smaller runs as it is.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba.config.choices import Registry
from mamba.config.facts import MIXERS as KNOWN
from mamba.config.facts import MixerFacts
from mamba.models.embed import permute
from mamba.ops.conv import causal_conv1d, causal_conv_silu
from mamba.ops.mixer import mixer, serves
from mamba.ops.scan import bidirectional_scan, selective_scan
from mamba.ops.scan.inputs import ScanInputs


@dataclass(frozen=True)
class ScanPath:
    """One scan of a mixer over its sequence."""

    suffix: str = ""
    """Ending of its parameters' names: `conv1d_b`, `x_proj_b`, `A_b_log`, ...; of the first path none."""
    reverse: bool = False
    """From the last token to the first."""
    scale: int = 1
    """Tokens averaged into one before the scan; its output is repeated as often."""


@dataclass(frozen=True)
class Direction:
    """The order in which a block's mixer reads the sequence; its output is in the sequence's own order."""

    reverse: bool = False
    """From the last token to the first."""
    transposed: bool = False
    """In the order that the sequence would have if rows and columns of the image were exchanged."""


DIRECTIONS: dict[str, Direction] = {
    "forward": Direction(),
    "backward": Direction(reverse=True),
    "across": Direction(transposed=True),
    "across_backward": Direction(reverse=True, transposed=True),
}


@dataclass(frozen=True)
class Mixer:
    """How many scans a mixer makes of a sequence, and how they become one."""

    paths: tuple[ScanPath, ...]
    shared: bool = False
    """All paths read the same x and z, and their outputs are averaged. Otherwise each has its own rows of `in_proj`,
    and `out_proj` merges their outputs, laid side by side."""
    directions: tuple[str, ...] = ("forward",)
    """Keys of DIRECTIONS, which a stack's blocks take in turn."""

    def __post_init__(self) -> None:
        """Raises ValueError for what no block can be made of."""
        suffixes = [path.suffix for path in self.paths]
        if not suffixes or suffixes[0] or len(set(suffixes)) < len(suffixes):
            raise ValueError(
                f"a mixer's paths end in {suffixes}; valid: nothing for the first, and an ending of its own for each "
                "other, for the names of its parameters"
            )
        if bad := [s for s in suffixes[1:] if not re.fullmatch(r"_\w+", s)]:
            raise ValueError(f"a mixer's path ends in {bad[0]!r}; valid: _ and letters or digits")
        if scales := [path.scale for path in self.paths if type(path.scale) is not int or path.scale < 1]:
            raise ValueError(f"a mixer's path has scale {scales[0]!r}; valid: whole numbers from 1")
        if not self.directions or set(self.directions) - set(DIRECTIONS):
            raise ValueError(f"a mixer's directions are {self.directions}; valid: some of {', '.join(DIRECTIONS)}")

    @property
    def facts(self) -> MixerFacts:
        """What the config has to know."""
        if any(path.reverse for path in self.paths):
            return MixerFacts(1)
        back = (i + 1 for i, name in enumerate(self.directions) if DIRECTIONS[name].reverse)
        return MixerFacts(next(back, None))


MIXERS = Registry(
    "model.mixer",
    {
        "forward": Mixer((ScanPath(),)),
        "bidirectional": Mixer((ScanPath(), ScanPath("_b", reverse=True))),
        "bidirectional_shared": Mixer((ScanPath(), ScanPath("_b", reverse=True)), shared=True),
        "multiscale": Mixer((ScanPath(), ScanPath("_2", scale=2), ScanPath("_4", scale=4))),
        "alternating": Mixer((ScanPath(),), directions=("forward", "backward")),
        "cross": Mixer((ScanPath(),), directions=("forward", "backward", "across", "across_backward")),
    },
    facts=KNOWN,
    fact=lambda mixer: mixer.facts,
)
"""`model.mixer`: forward is Mamba's own; bidirectional_shared is Vision Mamba's (https://arxiv.org/abs/2401.09417);
alternating as in Mamba-ND (https://arxiv.org/abs/2402.05892); cross takes the four directions of VMamba's cross-scan
(https://arxiv.org/abs/2401.10166), one a block."""


@dataclass(frozen=True)
class BlockShape:
    """What one block is made of: its mixer, and the widths that pruning may make different from its neighbours'.

    All paths of a mixer have the same widths.
    """

    d_inner: int
    d_state: int
    d_conv: int
    mlp_hidden: int
    """0: the block has no MLP."""
    out_channels: int | None = None
    """Residual channels that the mixer writes to; None: all of them."""
    dt_rank: int | None = None
    """Rank of the time step's projection; None: full, one row of `x_proj` a channel."""
    shared_bc: bool = False
    """One projection serves as B and as C."""
    separable_conv: bool = False
    """A pointwise convolution follows the depthwise one."""
    mixer: str = "forward"
    """A key of MIXERS."""
    learned_dt_bias: bool = False
    """The low-rank time step as mamba-ssm lays it out: `dt_proj` has a bias, and its rows are `x_proj`'s first."""
    direction: str = "forward"
    """A key of DIRECTIONS. It stays a block's own where others are removed."""

    @property
    def ways(self) -> int:
        """Pairs of x and z that `in_proj` makes."""
        mixer = MIXERS[self.mixer]
        return 1 if mixer.shared else len(mixer.paths)


class CausalConv1d(nn.Conv1d):
    """Causal depthwise convolution, (batch, length, channels) -> the same; with SiLU (fused, on a GPU) if asked, and
    from the last token to the first."""

    def __init__(self, channels: int, taps: int, silu: bool, reverse: bool = False) -> None:
        super().__init__(channels, channels, taps, groups=channels, padding=taps - 1)
        self.silu, self.reverse = silu, reverse

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return (causal_conv_silu if self.silu else causal_conv1d)(x, self.weight, self.bias, self.reverse)


class StepProjection(nn.Linear):
    """The time step's second factor. Its bias, if any, is left to the scan, which adds it in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class SelectiveSSM(nn.Module):
    """The Mamba mixer (https://arxiv.org/abs/2312.00752, section 3.4), with one scan or several (MIXERS).

    (batch, length, d_model) -> (batch, length, d_model), or (batch, length, out_channels) where `out_index` says which
    channels those are. `in_proj` gives x (first d_inner rows) and the gate z, path after path where paths have their
    own; `x_proj` gives B, C and delta, in this order. Each path has its own convolution, `x_proj`, A and D.

    Deviations from the paper: delta is projected by d_inner full rows instead of a low-rank pair, without a learned
    bias. softplus(0) = 0.69 would forget within two tokens, so the paper's start, delta log-uniform in
    [0.001, 0.1], is kept as the constant buffer `delta_bias`, one value a channel, added before the softplus.
    `BlockShape` may bring the low-rank pair back (`dt_proj`), with or without its learned bias, let one projection
    serve as B and C, or add a pointwise convolution.

    The mixers of several paths are often drawn as whole mixers side by side, each with its own output projection, then
    a linear merge, and coarse ones as pooling in front of the mixer. Here `out_proj` is the merge: two linear maps in a
    row are one, with fewer parameters; and x and z are pooled instead of the input, since `in_proj` is linear too.
    """

    # the first path's; those of the others end in its suffix
    conv1d: CausalConv1d
    pointwise: nn.Linear | None
    x_proj: nn.Linear
    dt_proj: StepProjection | None
    A_log: nn.Parameter
    D: nn.Parameter
    delta_bias: Tensor
    out_index: Tensor | None

    def __init__(self, d_model: int, shape: BlockShape) -> None:
        super().__init__()
        d_inner, d_state = shape.d_inner, shape.d_state
        self.mixer, self.direction = shape.mixer, shape.direction
        self.paths, self.shared = MIXERS[shape.mixer].paths, MIXERS[shape.mixer].shared
        self.shared_bc = shape.shared_bc
        self.learned_dt_bias = shape.learned_dt_bias
        if shape.learned_dt_bias and shape.dt_rank is None:
            raise ValueError("a learned bias of the time step needs dt_rank: the full projection has none")
        delta_rows = d_inner if shape.dt_rank is None else shape.dt_rank
        rows = (1 if shape.shared_bc else 2) * d_state + delta_rows
        self.in_proj = nn.Linear(d_model, 2 * shape.ways * d_inner, bias=False)
        for path in self.paths:
            end = path.suffix
            self.add_module(f"conv1d{end}", CausalConv1d(d_inner, shape.d_conv, not shape.separable_conv, path.reverse))
            pointwise = nn.Linear(d_inner, d_inner, bias=False) if shape.separable_conv else None
            self.add_module(f"pointwise{end}", pointwise)
            self.add_module(f"x_proj{end}", nn.Linear(d_inner, rows, bias=False))
            low_rank = None if shape.dt_rank is None else StepProjection(shape.dt_rank, d_inner, shape.learned_dt_bias)
            self.add_module(f"dt_proj{end}", low_rank)
            # S4D-real initialisation: A = -(1, 2, ..., N) in every channel
            log_rates = torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1)
            self.register_parameter(f"A{end}_log", nn.Parameter(log_rates))
            self.register_parameter(f"D{end}", nn.Parameter(torch.ones(d_inner)))
        out_channels = d_model if shape.out_channels is None else shape.out_channels
        self.out_proj = nn.Linear(shape.ways * d_inner, out_channels, bias=False)
        for path in self.paths:
            delta = torch.exp(torch.rand(d_inner) * math.log(0.1 / 0.001) + math.log(0.001))
            start = delta + torch.log(-torch.expm1(-delta))  # the inverse of softplus
            if shape.learned_dt_bias:
                projection = getattr(self, f"dt_proj{path.suffix}")
                nn.init.uniform_(projection.weight, -(delta_rows**-0.5), delta_rows**-0.5)
                projection.bias = nn.Parameter(start)
            else:
                self.register_buffer(f"delta_bias{path.suffix}", start)
        self.register_buffer("out_index", None if shape.out_channels is None else torch.arange(shape.out_channels))

    @property
    def shape(self) -> BlockShape:
        """The actual widths, read from the tensors; of a block without an MLP."""
        d_inner, d_state = self.A_log.shape
        return BlockShape(
            d_inner,
            d_state,
            self.conv1d.weight.shape[-1],
            mlp_hidden=0,
            out_channels=None if self.out_index is None else len(self.out_index),
            dt_rank=None if self.dt_proj is None else self.dt_proj.weight.shape[1],
            shared_bc=self.shared_bc,
            separable_conv=self.pointwise is not None,
            mixer=self.mixer,
            learned_dt_bias=self.learned_dt_bias,
            direction=self.direction,
        )

    def segments(self) -> dict[str, dict[str, int]]:
        """How fused projections divide: parameter -> part -> its width, in order. The rows of `in_proj` and of each
        `x_proj`, and the columns of `out_proj`."""
        d_inner = self.A_log.shape[0]
        ends = [""] if self.shared else [path.suffix for path in self.paths]
        parts = {
            "in_proj.weight": {name + end: d_inner for end in ends for name in "xz"},
            "out_proj.weight": {f"y{end}": d_inner for end in ends},
        }
        return parts | {f"x_proj{path.suffix}.weight": self._projected() for path in self.paths}

    def _projected(self) -> dict[str, int]:
        """The parts of each `x_proj`."""
        d_inner, d_state = self.A_log.shape
        states = {"B": d_state} if self.shared_bc else {"B": d_state, "C": d_state}
        if self.dt_proj is None:
            return states | {"delta": d_inner}
        step = {"dt": self.dt_proj.weight.shape[1]}
        return step | states if self.learned_dt_bias else states | step

    def forward(self, x: Tensor, transposition: Tensor | None = None) -> Tensor:
        """`transposition`: places of the tokens in the order of a transposed image (`mamba.models.embed`), which some
        directions need."""
        direction = DIRECTIONS[self.direction]
        if direction.transposed and transposition is None:
            raise ValueError(f"a mixer that scans {self.direction} needs the transposition of its sequence")
        across = transposition if direction.transposed else None
        if across is not None:
            x = permute(x, across)
        y = self._scanned(x.flip(1)).flip(1) if direction.reverse else self._scanned(x)
        # back in order before out_proj, whose inputs meet the residual stream's tokens (pruning/repair.py)
        return self.out_proj(y if across is None else permute(y, across))

    def _scanned(self, x: Tensor) -> Tensor:
        """All paths' outputs, merged: (batch, length, columns of out_proj)."""
        length = x.shape[1]
        xz = self.in_proj(x)
        if self._is_plain() and serves(xz):
            taps, taps_bias, project = self.conv1d.weight, self.conv1d.bias, self.x_proj.weight.to(xz.dtype)
            assert taps_bias is not None
            A = -torch.exp(at_least_float32(self.A_log))
            D, delta_bias = at_least_float32(self.D), at_least_float32(self.delta_bias)
            return mixer(xz, taps, taps_bias, project, A, D, delta_bias)
        pieces = xz.chunk(len(self.segments()["in_proj.weight"]), dim=-1)
        pairs = [pieces] * len(self.paths) if self.shared else list(zip(pieces[::2], pieces[1::2], strict=True))
        inputs = [self._scan_inputs(path, x, z) for path, (x, z) in zip(self.paths, pairs, strict=True)]
        outputs: tuple[Tensor, ...]
        if [path.reverse for path in self.paths] == [False, True]:
            outputs = both_scans(*inputs)
        else:
            outputs = tuple(one_scan(one, path.reverse) for one, path in zip(inputs, self.paths, strict=True))
        ys = [upsample(y.transpose(1, 2), path.scale, length) for path, y in zip(self.paths, outputs, strict=True)]
        if self.shared:
            return sum(ys[1:], ys[0]) / len(ys)
        return ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)

    def _is_plain(self) -> bool:
        """Whether it is a mixer as `mamba.ops.mixer` computes it, and nobody watches the layers inside."""
        alone = [(path.reverse, path.scale) for path in self.paths] == [(False, 1)]
        inside = (self.conv1d, self.x_proj)
        return (
            alone
            and self.pointwise is None
            and self.dt_proj is None
            and not self.shared_bc
            and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in inside)
        )

    def _scan_inputs(self, path: ScanPath, x: Tensor, z: Tensor) -> ScanInputs:
        """The arguments of a path's scan, from its x and z: (batch, length, d_inner)."""
        end = path.suffix
        x, z = average(x, path.scale), average(z, path.scale)
        x = getattr(self, f"conv1d{end}")(x)
        pointwise, dt_proj = getattr(self, f"pointwise{end}"), getattr(self, f"dt_proj{end}")
        if pointwise is not None:
            x = F.silu(pointwise(x))
        widths = self._projected()
        parts = dict(zip(widths, getattr(self, f"x_proj{end}")(x).split(tuple(widths.values()), dim=-1), strict=True))
        delta = parts["delta"] if dt_proj is None else dt_proj(parts["dt"])
        bias = dt_proj.bias if self.learned_dt_bias else getattr(self, f"delta_bias{end}")
        return ScanInputs(
            x.transpose(1, 2),
            delta.transpose(1, 2),
            -torch.exp(at_least_float32(getattr(self, f"A{end}_log"))),
            parts["B"].transpose(1, 2),
            parts["B" if self.shared_bc else "C"].transpose(1, 2),
            at_least_float32(getattr(self, f"D{end}")),
            z.transpose(1, 2),
            at_least_float32(bias),
        )


def one_scan(inputs: ScanInputs, reverse: bool = False) -> Tensor:
    """`reverse`: from the last token to the first; the output is in the order of the inputs all the same."""
    if reverse:
        inputs = inputs._replace(**{name: getattr(inputs, name).flip(-1) for name in ("u", "delta", "B", "C", "z")})
    y = selective_scan(*inputs, delta_softplus=True)
    assert isinstance(y, Tensor)
    return y.flip(-1) if reverse else y


def both_scans(forward: ScanInputs, backward: ScanInputs) -> tuple[Tensor, Tensor]:
    """Without repeating what both directions share (the gate, where the projections are shared)."""
    pairs: dict[str, Any] = {
        name: a if a is b else (a, b) for name, a, b in zip(ScanInputs._fields, forward, backward, strict=True)
    }
    return bidirectional_scan(**pairs, delta_softplus=True)


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def average(x: Tensor, scale: int) -> Tensor:
    """Averages of `scale` tokens each, the last one of what is left. (batch, length, channels) -> the same, shorter."""
    if scale == 1:
        return x
    count, rest = divmod(x.shape[1], scale)
    averages = x[:, : count * scale].unflatten(1, (count, scale)).mean(2)
    return torch.cat((averages, x[:, -rest:].mean(1, keepdim=True)), dim=1) if rest else averages


def upsample(x: Tensor, scale: int, length: int) -> Tensor:
    """The way back from `average` by nearest-neighbour interpolation: each token gets the value of the average that it
    went into. (batch, ceil(length / scale), channels) -> (batch, length, channels)."""
    return x if scale == 1 else x.repeat_interleave(scale, dim=1)[:, :length]
