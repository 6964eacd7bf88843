"""Repair of cut models: exact where what went was redundant, better everywhere, and masks hold."""

from __future__ import annotations

import pytest
import torch

from mamba.errors import ConfigError
from pruning.cut import cut
from pruning.masks import unit_masks
from pruning.plans import apply_plan
from pruning.repair import _fit, _look, repair
from pruning.shrink import shrink
from tests.pruning.small_models import PLAIN, build


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(32, 3, 8, 8, dtype=torch.float64, generator=generator), torch.zeros(32)) for _ in range(2)]


def redundant_model():
    """The second half of each block's neurons computes what the first half does."""
    model, half = build(), PLAIN.mlp_hidden // 2
    with torch.no_grad():
        for block in model.stack:
            block.mlp.fc1.weight[half:] = block.mlp.fc1.weight[:half]
            block.mlp.fc1.bias[half:] = block.mlp.fc1.bias[:half]
    return model


def stream_behind_the_blocks(model, images):
    return _look(model, images, {"stream": model.stack[-1]})["stream"]


def test_redundant_neurons_cost_nothing_after_repair(batches, images):
    model = redundant_model()
    keep = torch.arange(PLAIN.mlp_hidden) < PLAIN.mlp_hidden // 2
    smaller = shrink(model, unit_masks(model, "mlp_hidden", [keep] * 3))
    want = model(images)
    assert (smaller.model(images) - want).norm() > 0.1 * want.norm()
    repair(model, smaller, batches, ridge=1e-10)
    torch.testing.assert_close(smaller.model(images), want, rtol=1e-4, atol=1e-4)


def test_a_cut_that_takes_nothing_is_left_as_it_was(model, batches, images):
    result = shrink(model, {})
    repair(model, result, batches)
    torch.testing.assert_close(result.model(images), model(images), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rates", [{"linear_out": 0.5}, {"linear_B_C": 0.4}, {"block": 0.34}], ids=str)
def test_every_kind_of_model_comes_closer_to_the_dense_one(member, rates, batches):
    x = torch.cat([images for images, _ in batches])
    want = stream_behind_the_blocks(member, x)
    plain = cut(member, rates, shrink=True)
    repaired = cut(member, rates, shrink=True, repair=True, calibration=batches)
    error, before = ((stream_behind_the_blocks(c.model, x) - want).norm() for c in (repaired, plain))
    assert error < 0.95 * before
    assert not member.training


def test_masked_weights_stay_zero_and_the_others_improve(model, batches):
    x = batches[0][0]
    before = {name: p.clone() for name, p in model.named_parameters()}
    rates = {"linear_out:element": 0.6, "mlp:element": 0.6}
    plain, repaired = cut(model, rates), cut(model, rates, repair=True, calibration=batches)
    parameters = dict(repaired.model.named_parameters())
    assert len(repaired.masks) == 9 and all(not parameters[name][~keep].any() for name, keep in repaired.masks.items())
    assert (repaired.model(x) - model(x)).norm() < 0.9 * (plain.model(x) - model(x)).norm()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fit_is_the_least_squares_solution(bias, masked):
    torch.manual_seed(0)
    layer = torch.nn.Linear(7, 20, bias=bias).double().requires_grad_(False)
    inputs, wanted = torch.randn(200, 7).double(), torch.randn(200, 20).double()
    keep = torch.rand(20, 7) > 0.4 if masked else None
    given = torch.cat((inputs, torch.ones(200, 1)), 1).double() if bias else inputs
    _fit(layer, given.T @ given, given.T @ wanted, keep, 1e-12)
    for row in range(20):
        used = torch.ones(7, dtype=torch.bool) if keep is None else keep[row]
        columns = torch.cat((used, torch.ones(1, dtype=torch.bool))) if bias else used
        want = torch.linalg.lstsq(given[:, columns], wanted[:, row]).solution
        got = torch.cat((layer.weight[row, used], layer.bias[row, None])) if bias else layer.weight[row, used]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert not layer.weight[row, ~used].any()


def test_repair_without_images_or_of_a_rebuilt_model_is_refused(model, batches):
    with pytest.raises(ConfigError, match="repair needs calibration"):
        cut(model, {"mlp": 0.5}, shrink=True, repair=True)
    with pytest.raises(ConfigError, match=r"cut\.repair does not go with plan 'stage3'"):
        apply_plan(model, "stage3", calibration=batches, repair=True)
