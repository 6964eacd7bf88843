"""From an image to a sequence of tokens: patches or a convolutional stem, class tokens, positions, order."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Conv2d):
    """Patches through one linear map, in raster order (https://arxiv.org/abs/2010.11929).

    (batch, in_chans, side, side) -> (batch, grid^2, d_model), grid = (side - patch_size) / stride + 1. A stride below
    patch_size makes patches overlap.
    """

    def __init__(self, patch_size: int, in_chans: int, d_model: int, stride: int) -> None:
        super().__init__(in_chans, d_model, kernel_size=patch_size, stride=stride)

    def forward(self, images: Tensor) -> Tensor:
        # contiguous: every later tensor of the residual stream takes its memory order from this one
        return super().forward(images).flatten(2).transpose(1, 2).contiguous()


STEM_CHANNELS = (64, 128)


class ConvStem(nn.Module):
    """Three 3x3 convolutions, each with batch norm, GELU between them, of strides 1, 2 and 2 (a stem as in
    https://arxiv.org/abs/2106.14881).

    (batch, in_chans, side, side) -> (batch, (side / 4)^2, d_model), in raster order.
    """

    def __init__(self, in_chans: int, d_model: int) -> None:
        super().__init__()
        first, second = STEM_CHANNELS
        self.conv1 = nn.Conv2d(in_chans, first, 3, stride=1, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, d_model, 3, stride=2, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(d_model)

    def forward(self, images: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(images)))
        x = F.gelu(self.norm2(self.conv2(x)))
        return self.norm3(self.conv3(x)).flatten(2).transpose(1, 2).contiguous()


Stem = PatchEmbed | ConvStem
STEMS: dict[str, Callable[[int, int, int, int], Stem]] = {
    "patch": PatchEmbed,
    "conv": lambda patch_size, in_chans, d_model, stride: ConvStem(in_chans, d_model),
}
"""`model.stem`, called with patch_size, in_chans, d_model and stride."""


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


def rotary_tables(grid: int, d_model: int, class_places: Collection[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angle of each token and pair of channels: two (tokens, d_model / 2) tensors.

    2D rotary position embedding (https://arxiv.org/abs/2104.09864, per axis as in https://arxiv.org/abs/2303.11331):
    pair i of the first half of the pairs turns by row / 10000^(i / (d_model / 4)), of the second half by column. Class
    tokens, which have no place in the image, do not turn. The tables turn what each mixer reads and not the residual
    stream, so that angles do not add up over the depth, and a block that adds nothing can be left out.
    """
    quarter = d_model // 4
    rates = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    along = torch.arange(grid, dtype=torch.float64)[:, None] * rates
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
