"""Pruning a model that lives on a GPU."""

from __future__ import annotations

import pytest
import torch

from mamba.models.model import mamba_tiny
from pruning import PLANS, apply_plan, measure, prune_component, prune_multiple
from pruning.cut import cut
from pruning.shrink import shrink

RATES = {"mlp:neuron": 0.5, "linear_in:expand": 0.3, "linear_B_C:state": 0.4, "linear_out:output": 0.4,
         "conv1d:separable": 0.5, "linear_delta:low_rank": 0.4, "block": 0.25, "linear_gate:element": 0.5}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mamba_tiny(d_model=32, depth=16).cuda().eval()


@pytest.mark.gpu
def test_masked_is_shrunk_on_a_gpu(model):
    images = torch.randn(4, 3, 32, 32, device="cuda")
    with torch.no_grad():
        masked, smaller = prune_multiple(model, RATES), prune_multiple(model, RATES, shrink=True)
        torch.testing.assert_close(masked(images), smaller(images), rtol=0, atol=1e-5)
        here = cut(model, {"mlp:neuron": 0.5})
        torch.testing.assert_close(here.model(images), shrink(here.model, here.masks).model(images), rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_cuts_what_a_cpu_cuts(model):
    for target in ("mlp:neuron", "linear_gate:element", "block:depth"):
        name, granularity = target.split(":")
        here = prune_component(model, name, 0.3, granularity)
        there = prune_component(model.cpu(), name, 0.3, granularity)
        model.cuda()
        assert all(torch.equal(a.cpu(), b) for a, b in zip(here.parameters(), there.parameters(), strict=True))


@pytest.mark.gpu
def test_plans_and_measurements(model):
    for name in PLANS:
        smaller = apply_plan(model, name).model
        speed = measure.speed(smaller, 64, 0.05, torch.bfloat16)
        assert speed["bench/peak_memory_mib"] > 0 and speed["bench/images_per_s"] > 0
