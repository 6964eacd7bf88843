"""Gradients averaged in one piece: what DDP would give, views of one tensor, missing ones left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mamba.parallel import FlatGradients
from mamba.worker import Worker


class Twin(Worker):
    """Two ranks of which the other one has three times this one's gradients."""

    def sum(self, values):
        return values.mul_(4)


def test_average_of_two_ranks():
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[1].weight.requires_grad_(False)
    flat = FlatGradients(list(model.parameters()), Twin(world_size=2))
    for _ in range(2):  # the views are used again
        model.zero_grad(set_to_none=True)
        model[0](torch.randn(4, 5)).sum().backward()
        own = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        flat.average()
        for name, p in model.named_parameters():
            if name in own:
                torch.testing.assert_close(p.grad, 2 * own[name])
                assert p.grad.untyped_storage().data_ptr() == flat.flat.untyped_storage().data_ptr()
                assert p.grad.stride() == p.stride()
            else:
                assert p.grad is None
    assert set(own) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("sizes", [(1,), (64, 65)])
def test_views_do_not_overlap(sizes):
    parameters = [nn.Parameter(torch.zeros(n)) for n in sizes]
    flat = FlatGradients(parameters, Worker())
    for i, view in enumerate(flat.views):
        view.fill_(i + 1)
    assert [float(v.sum()) for v in flat.views] == [n * (i + 1) for i, n in enumerate(sizes)]
