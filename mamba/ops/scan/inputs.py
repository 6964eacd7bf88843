"""The tensors of one scan, by their names: what the backends pass around inside."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """In the order of `mamba.ops.scan.selective_scan`, with its shapes."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None


NONE = (None,) * len(Problem._fields)  # in place of a second direction
