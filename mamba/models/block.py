"""A Mamba block: norm and mixer, norm and MLP, each added to the residual stream, with stochastic depth.

Every width is read from the tensors themselves, so a block whose weights were made smaller runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba.models.embed import permute, rotate
from mamba.models.ssm import BlockShape, SelectiveSSM
from mamba.ops.mlp import mlp


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


class TokenShuffle(nn.Module):
    """What lies in between sees the tokens in random order, with probability `rate`, in training (ShuffleMamba,
    https://arxiv.org/abs/2408.17081). The order is drawn anew each time, for the whole batch, on the device, so that
    drawing it can be recorded."""

    rate: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.active = rate > 0
        self.register_buffer("rate", torch.tensor(rate), persistent=False)  # a tensor as in `DropPath`

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """An order of the tokens of x, (batch, tokens, channels), and its inverse: two (tokens,) tensors."""
        if not self.training or not self.active:
            return None
        tokens = x.shape[1]
        noise = torch.rand(tokens + 1, device=x.device)
        places = torch.arange(tokens, device=x.device)
        order = torch.where(noise[-1] < self.rate, noise[:-1].argsort(), places)
        return order, order.argsort()

    def extra_repr(self) -> str:
        return f"rate={float(self.rate):.3f}"


def drop(x: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout (https://jmlr.org/papers/v15/srivastava14a.html); at rate 0 no operation at all."""
    return F.dropout(x, rate) if rate and training else x


class Mlp(nn.Module):
    """Linear, GELU, linear, with dropout after each. (..., d_model) -> (..., d_model)."""

    def __init__(self, d_model: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, hidden)
        self.fc2 = nn.Linear(hidden, d_model)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.fc1, self.fc2)
        if not self.dropout and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
            return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        hidden = drop(F.gelu(self.fc1(x)), self.dropout, self.training)
        return drop(self.fc2(hidden), self.dropout, self.training)


NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": nn.LayerNorm, "rms": partial(nn.RMSNorm, eps=1e-5)}
BLOCK_NAMES = {"mamba": ("ssm", "norm1"), "vim": ("mixer", "norm")}
"""What a block's mixer and the norm before it are called: our names, and those of Vision Mamba's published weights."""


class MambaBlock(nn.Module):
    """x + drop(ssm(norm1 x)), then, if there is an MLP, x + drop(mlp(norm2 x)). (batch, length, d_model) -> the same.

    Args:
        d_model: width of the residual stream.
        shape: what it is made of.
        drop_path: rate of stochastic depth.
        shuffle: rate of `TokenShuffle`.
        dropout: rate in the MLP.
        norm: a key of NORMS.
        names: a key of BLOCK_NAMES: what the mixer and its norm are called in the state dict.
    """

    def __init__(
        self,
        d_model: int,
        shape: BlockShape,
        drop_path: float = 0.0,
        norm: str = "layer",
        names: str = "mamba",
        shuffle: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mixer_name, self.norm_name = BLOCK_NAMES[names]
        self.add_module(self.norm_name, NORMS[norm](d_model))
        self.add_module(self.mixer_name, SelectiveSSM(d_model, shape))
        self.norm2 = NORMS[norm](d_model) if shape.mlp_hidden else None
        self.mlp = Mlp(d_model, shape.mlp_hidden, dropout) if shape.mlp_hidden else None
        self.drop_path = DropPath(drop_path)
        self.shuffle = TokenShuffle(shuffle)

    @property
    def token_mixer(self) -> SelectiveSSM:
        return getattr(self, self.mixer_name)

    @property
    def shape(self) -> BlockShape:
        """The actual widths, read from the tensors."""
        shape = self.token_mixer.shape
        return shape if self.mlp is None else replace(shape, mlp_hidden=self.mlp.fc1.weight.shape[0])

    def segments(self) -> dict[str, dict[str, int]]:
        """The mixer's, with names that start at the block."""
        return {f"{self.mixer_name}.{name}": parts for name, parts in self.token_mixer.segments().items()}

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, transposition: Tensor | None = None
    ) -> Tensor:
        """`rotary`: cosines and sines (`mamba.models.embed.rotary_tables`) that turn what the mixer reads;
        `transposition`: what mixers that scan across the image need (`mamba.models.embed.transposition`)."""
        mixer, norm = self.token_mixer, getattr(self, self.norm_name)
        read = norm(x)
        if rotary is not None:
            read = rotate(read, *rotary)
        orders = self.shuffle.draw(read)
        if orders is None:
            mixed = mixer(read, transposition)
        else:
            order, inverse = orders
            mixed = permute(mixer(permute(read, order, inverse), transposition), inverse, order)
        mixed = self.drop_path(mixed)
        index = mixer.out_index
        x = x + mixed if index is None else x.index_add(-1, index, mixed.to(x.dtype))
        if self.mlp is None or self.norm2 is None:
            return x
        return x + self.drop_path(self.mlp(self.norm2(x)))
