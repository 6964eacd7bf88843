"""From an image to a sequence of patch tokens."""

from __future__ import annotations

from torch import Tensor, nn


class PatchEmbed(nn.Conv2d):
    """Non-overlapping patches through one linear map, in raster order (https://arxiv.org/abs/2010.11929).

    (batch, in_chans, side, side) -> (batch, (side / patch_size)^2, d_model).
    """

    def __init__(self, patch_size: int, in_chans: int, d_model: int) -> None:
        super().__init__(in_chans, d_model, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        # contiguous: every later tensor of the residual stream takes its memory order from this one
        return super().forward(images).flatten(2).transpose(1, 2).contiguous()
