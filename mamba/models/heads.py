"""From the last block's tokens to the features that the classifier reads: pooling, after the last norm.

Each takes the residual stream, (batch, tokens, d_model), and the model's last norm, and returns (batch, d_model).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor, nn


class MeanPool(nn.Module):
    """The mean over all tokens."""

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x).mean(dim=1)


class ClassTokenPool(nn.Module):
    """The mean over the class tokens, which are all that is normed.

    Args:
        places: of the class tokens in the sequence.
    """

    def __init__(self, places: Collection[int]) -> None:
        super().__init__()
        self.places = tuple(places)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        features: list[Tensor] = [norm(x[:, place]) for place in self.places]
        return sum(features[1:], features[0]) / len(features)

    def extra_repr(self) -> str:
        return f"places={self.places}"


def class_tokens_or_mean(d_model: int, places: Collection[int]) -> nn.Module:
    """The class tokens where there are some, else all tokens."""
    return ClassTokenPool(places) if places else MeanPool()


HEADS: dict[str, Callable[[int, Collection[int]], nn.Module]] = {"auto": class_tokens_or_mean}
"""Called with d_model and the class tokens' places."""
