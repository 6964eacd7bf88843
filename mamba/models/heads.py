"""From the last block's tokens to the features that the classifier reads: pooling, after the last norm.

Each takes the residual stream, (batch, tokens, d_model), and the model's last norm, and returns (batch, d_model).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from mamba.config.choices import Registry


class MeanPool(nn.Module):
    """The mean over all tokens, class tokens included."""

    def __init__(self, d_model: int, class_places: Collection[int]) -> None:
        super().__init__()

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x).mean(dim=1)

    @staticmethod
    def macs(tokens: int, d_model: int) -> int:
        return 0


class ClassTokenPool(MeanPool):
    """The mean over the class tokens, which are all that is normed; where there are none, over all tokens.

    Args:
        d_model: not needed.
        class_places: of the class tokens in the sequence.
    """

    def __init__(self, d_model: int, class_places: Collection[int]) -> None:
        super().__init__(d_model, class_places)
        self.places = tuple(class_places)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        if not self.places:
            return super().forward(x, norm)
        features: list[Tensor] = [norm(x[:, place]) for place in self.places]
        return sum(features[1:], features[0]) / len(features)


class AttentionPool(nn.Module):
    """A weighted mean over all tokens, whose weights are the softmax of a linear score: sequence pooling
    (https://arxiv.org/abs/2104.05704, section 3.2). The score has no bias, which the softmax would cancel."""

    def __init__(self, d_model: int, class_places: Collection[int]) -> None:
        super().__init__()
        self.score = nn.Linear(d_model, 1, bias=False)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        read = norm(x)
        weights = self.score(read).softmax(dim=1, dtype=torch.promote_types(read.dtype, torch.float32))
        return (weights * read).sum(dim=1).to(read.dtype)

    @staticmethod
    def macs(tokens: int, d_model: int) -> int:
        """The scores and the weighted mean."""
        return 2 * tokens * d_model


HEADS: Registry[type[MeanPool] | type[AttentionPool]] = Registry(
    "model.head", {"auto": ClassTokenPool, "mean": MeanPool, "attention": AttentionPool}
)
"""`model.head`. Each is made from d_model and the class tokens' places, and counts its multiply-accumulates of one
image (`macs`)."""
