"""From an image to a sequence of tokens: patches or a convolutional stem, class tokens, positions, order."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba.config.choices import Registry


class PatchEmbed(nn.Conv2d):
    """Patches through one linear map, in raster order (https://arxiv.org/abs/2010.11929).

    (batch, in_chans, side, side) -> (batch, grid^2, d_model), grid = (side - patch_size) / stride + 1. A stride below
    patch_size makes patches overlap.
    """

    def __init__(
        self, patch_size: int, in_chans: int, d_model: int, stride: int, channels: tuple[int, ...] = ()
    ) -> None:
        super().__init__(in_chans, d_model, kernel_size=patch_size, stride=stride)
        if channels:
            raise ValueError(f"patches have no inner channels, got {channels}")

    def forward(self, images: Tensor) -> Tensor:
        # contiguous: every later tensor of the residual stream takes its memory order from this one
        return super().forward(images).flatten(2).transpose(1, 2).contiguous()

    @staticmethod
    def macs(side: int, patch_size: int, in_chans: int, d_model: int, stride: int, channels: tuple[int, ...]) -> int:
        return ((side - patch_size) // stride + 1) ** 2 * d_model * in_chans * patch_size**2


class ConvStem(nn.Module):
    """3x3 convolutions, each with batch norm, GELU between them (a stem as in https://arxiv.org/abs/2106.14881). The
    last ones halve the side until `stride` is reached: of three, for a stride of 4, the second and the third.

    (batch, in_chans, side, side) -> (batch, (side / stride)^2, d_model), in raster order.

    Args:
        patch_size: equal to stride.
        channels: outputs of each convolution but the last.

    Raises:
        ValueError: a stride that so many convolutions do not reach.
    """

    def __init__(self, patch_size: int, in_chans: int, d_model: int, stride: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        strides = self.strides(stride, len(channels) + 1)
        if math.prod(strides) != stride or patch_size != stride:
            raise ValueError(
                f"a conv stem of {len(strides)} convolutions cannot have patch_size {patch_size} and stride {stride}: "
                f"both must be 2, 4 or 8, and at most {2 ** len(strides)}"
            )
        widths = (in_chans, *channels, d_model)
        for i, ((before, after), step) in enumerate(zip(pairwise(widths), strides, strict=True), 1):
            self.add_module(f"conv{i}", nn.Conv2d(before, after, 3, stride=step, padding=1, bias=False))
            self.add_module(f"norm{i}", nn.BatchNorm2d(after))
        self.layers = len(strides)

    @staticmethod
    def strides(stride: int, layers: int) -> tuple[int, ...]:
        """Of each convolution; their product is less than `stride` where that cannot be."""
        halvings = min(layers, stride.bit_length() - 1)
        return (1,) * (layers - halvings) + (2,) * halvings

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for i in range(1, self.layers + 1):
            x = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(F.gelu(x) if i > 1 else x))
        return x.flatten(2).transpose(1, 2).contiguous()

    @classmethod
    def macs(
        cls, side: int, patch_size: int, in_chans: int, d_model: int, stride: int, channels: tuple[int, ...]
    ) -> int:
        widths, total = (in_chans, *channels, d_model), 0
        for (before, after), step in zip(pairwise(widths), cls.strides(stride, len(channels) + 1), strict=True):
            side //= step
            total += 9 * before * after * side**2
        return total


class PoolStem(nn.Module):
    """The tokenizer of Compact Convolutional Transformers (https://arxiv.org/abs/2104.05704): 3x3 convolutions without
    bias, each followed by ReLU and a 3x3 max pooling that halves the side. No batch norm.

    (batch, in_chans, side, side) -> (batch, (side / stride)^2, d_model), in raster order; stride 2 for each layer.
    Weights start as there (Kaiming's normal).

    Args:
        patch_size: equal to stride.
        channels: outputs of each convolution but the last.

    Raises:
        ValueError: a stride that is not 2 for each layer.
    """

    def __init__(self, patch_size: int, in_chans: int, d_model: int, stride: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = len(channels) + 1
        if not patch_size == stride == 2**self.layers:
            raise ValueError(
                f"a cct stem of {self.layers} layers has patch_size and stride {2**self.layers}, got {patch_size} and "
                f"{stride}"
            )
        for i, (before, after) in enumerate(pairwise((in_chans, *channels, d_model)), 1):
            convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight)
            self.add_module(f"conv{i}", convolution)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for i in range(1, self.layers + 1):
            x = F.max_pool2d(F.relu(getattr(self, f"conv{i}")(x)), 3, stride=2, padding=1)
        return x.flatten(2).transpose(1, 2).contiguous()

    @staticmethod
    def macs(side: int, patch_size: int, in_chans: int, d_model: int, stride: int, channels: tuple[int, ...]) -> int:
        widths = (in_chans, *channels, d_model)
        return sum(9 * a * b * (side >> i) ** 2 for i, (a, b) in enumerate(pairwise(widths)))


Stem = PatchEmbed | ConvStem | PoolStem
STEMS: Registry[type[Stem]] = Registry("model.stem", {"patch": PatchEmbed, "conv": ConvStem, "cct": PoolStem})
"""`model.stem`. Each is made from patch_size, in_chans, d_model, stride and its inner channels, and counts the
multiply-accumulates of an image of some side from the same (`macs`)."""
INNER_CHANNELS: dict[str, tuple[int, ...]] = {"conv": (64, 128), "cct": (64, 64)}
"""Outputs of the first convolutions of a stem; the last one makes d_model."""


def inner_channels(stem: str, layers: int | None) -> tuple[int, ...]:
    """Of a stem of so many convolutions; None: as many as there are widths for, and one."""
    channels = INNER_CHANNELS.get(stem, ())
    return channels if layers is None else channels[: layers - 1]


def class_token_places(kind: str, patches: int) -> dict[str, int]:
    """Parameter name -> place in the sequence, ascending, of the class tokens of `model.class_token`."""
    return {
        "none": {},
        "start": {"cls_token": 0},
        "middle": {"cls_token": patches // 2},
        "double": {"cls_token_head": 0, "cls_token_tail": patches + 1},
    }[kind]


def sequence_order(scan_order: str, grid: int, class_places: Collection[int]) -> list[int]:
    """Which token of the raster sequence comes at each place of the scanned one; class tokens stay where they are.

    raster: row after row, left to right; snake: every other row from right to left, so that neighbours in the
    sequence are neighbours in the image; column: column after column, downwards.
    """
    rows = [list(range(r * grid, (r + 1) * grid)) for r in range(grid)]
    if scan_order == "snake":
        rows[1::2] = [row[::-1] for row in rows[1::2]]
    elif scan_order == "column":
        rows = [list(column) for column in zip(*rows, strict=True)]
    tokens = range(grid**2 + len(class_places))
    patch_places = [place for place in tokens if place not in class_places]
    patches = iter(patch for row in rows for patch in row)
    return [place if place in class_places else patch_places[next(patches)] for place in tokens]


def transposition(order: Sequence[int], grid: int, class_places: Collection[int]) -> list[int]:
    """For each place of the sequence of a transposed image, scanned in the same `order` (of `sequence_order`), the
    place where its token stands in the sequence. Class tokens stay. It is its own inverse."""
    patches = [place for place in range(len(order)) if place not in class_places]
    pixel = {place: divmod(i, grid) for i, place in enumerate(patches)}
    at = {pixel[token]: place for place, token in enumerate(order) if token in pixel}
    return [at[pixel[token][::-1]] if token in pixel else place for place, token in enumerate(order)]


class _Permutation(torch.autograd.Function):
    """A permutation's gradient is the inverse permutation: a gather, where autograd would scatter and add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor | None) -> Tensor:
        ctx.save_for_backward(order if inverse is None else inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(1, inverse), None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor | None = None) -> Tensor:
    """Tokens in another order. x: (batch, tokens, channels); order and its inverse, which None says it is itself:
    (tokens,)."""
    return _Permutation.apply(x, order, inverse)


def rotary_tables(
    grid: int, d_model: int, class_places: Collection[int], counted: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angle of each token and pair of channels: two (tokens, d_model / 2) tensors.

    Rows and columns count from 0 to `counted` over the image, `grid` steps of counted / grid: None, one each; a grid
    that was trained on, for a finer one (as in https://arxiv.org/abs/2303.11331).

    2D rotary position embedding (https://arxiv.org/abs/2104.09864, per axis as in https://arxiv.org/abs/2303.11331):
    pair i of the first half of the pairs turns by row / 10000^(i / (d_model / 4)), of the second half by column. Class
    tokens, which have no place in the image, do not turn. The tables turn what each mixer reads and not the residual
    stream, so that angles do not add up over the depth, and a block that adds nothing can be left out.
    """
    quarter = d_model // 4
    rates = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    along = torch.arange(grid, dtype=torch.float64)[:, None] * ((counted or grid) / grid) * rates
    by_row, by_column = along[:, None].expand(grid, grid, quarter), along[None].expand(grid, grid, quarter)
    angles = torch.zeros(grid**2 + len(class_places), 2 * quarter, dtype=torch.float64)
    patches = [place for place in range(len(angles)) if place not in class_places]
    angles[patches] = torch.cat((by_row, by_column), dim=-1).reshape(grid**2, 2 * quarter)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels. x: (batch, tokens, d_model); cos, sin: (tokens, d_model / 2)."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def resize_positions(pos_embed: Tensor, grid: int, class_token: str) -> Tensor:
    """Learned positions for another image size or stride: those of patches by bicubic interpolation over the image,
    those of class tokens as they are, at their places in the new sequence.

    Args:
        pos_embed: (1, patches + class tokens, d_model), patches in raster order, a square number of them.
        grid: patches along the new image's side.
        class_token: as in the config.

    Returns:
        (1, grid^2 + class tokens, d_model).

    Raises:
        ValueError: the patches are not a square number.
    """
    total, width = pos_embed.shape[1:]
    patches = total - len(class_token_places(class_token, 0))
    side = math.isqrt(max(0, patches))
    if side == 0 or side**2 != patches:
        raise ValueError(f"pos_embed has places for {patches} patches, which make no square")
    old = class_token_places(class_token, patches).values()
    image = pos_embed[:, [i for i in range(total) if i not in old]].reshape(1, side, side, width).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    result = image.permute(0, 2, 3, 1).reshape(1, grid**2, width)
    for place, new in zip(old, class_token_places(class_token, grid**2).values(), strict=True):
        result = torch.cat((result[:, :new], pos_embed[:, place, None], result[:, new:]), dim=1)
    return result
