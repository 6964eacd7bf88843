"""Models to prune, and images for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mamba.models.model import MambaModel
from tests.pruning.small_models import FAMILY, PLAIN, build


@pytest.fixture
def model() -> MambaModel:
    return build()


@pytest.fixture
def uneven() -> MambaModel:
    """Every variant that pruning can leave behind, with widths that differ from block to block."""
    return build(
        replace(PLAIN, d_inner=9, mlp_hidden=5),
        replace(PLAIN, d_state=1, dt_rank=3, d_conv=2),
        replace(PLAIN, out_channels=4, shared_bc=True),
        replace(PLAIN, d_inner=7, separable_conv=True, d_conv=1),
    )


@pytest.fixture(params=FAMILY)
def member(request) -> MambaModel:
    """Each kind of model in turn."""
    return FAMILY[request.param]()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
