"""An exponential moving average of weights and buffers, as a second model."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

from torch import nn

from mamba.ops.update.average import Average

Model = TypeVar("Model", bound=nn.Module)


class ModelEma(Average, Generic[Model]):
    """`model` holds the average of `source`: evaluate it like any other. Weights and floating-point buffers are
    averaged, other buffers (counters) copied."""

    def __init__(self, source: Model, decay: float) -> None:
        self.model: Model = copy.deepcopy(source).eval().requires_grad_(False)
        pairs = list(zip(self.model.state_dict().values(), source.state_dict().values(), strict=True))
        averaged = [(mine, theirs) for mine, theirs in pairs if mine.is_floating_point()]
        super().__init__(averaged, [(a, b) for a, b in pairs if not a.is_floating_point()], decay)
