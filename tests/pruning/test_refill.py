"""Refill against a slow version written from the paper's text, and the global pruning that feeds it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba.errors import ConfigError
from mamba.models.model import count_parameters
from pruning import apply_mask_mamba, compute_rsst_loss, refill_masks
from pruning.refill import REFILL_SCORES, prune_survivors, units_to_keep, weights_of
from pruning.shrink import shrink
from tests.pruning.small_models import FAMILY, build


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.data())
def test_the_number_of_units_is_the_papers(units, fan_in, fillback, data):
    remaining = data.draw(st.integers(0, units * fan_in))
    n = units_to_keep(remaining, units, fan_in, fillback)
    expected = remaining / fan_in + (units - remaining / fan_in) * fillback
    assert 1 <= n <= units
    assert n == max(1, math.floor(expected)) or abs(expected - round(expected)) < 1e-6


def slow_rows(block, group, values, ones):
    """Row by row: a channel's rows of in_proj (x, z) and its column of out_proj; a neuron's row and column."""
    get = lambda name, tensor: values.get(name, torch.full_like(tensor, ones))  # noqa: E731
    if group == "mlp":
        fc1, fc2 = get("mlp.fc1.weight", block.mlp.fc1.weight), get("mlp.fc2.weight", block.mlp.fc2.weight)
        return [torch.cat((fc1[i], fc2[:, i])) for i in range(len(fc1))]
    in_proj, out = get("ssm.in_proj.weight", block.ssm.in_proj.weight), block.ssm.out_proj.weight
    out = get("ssm.out_proj.weight", out)
    d = len(in_proj) // 2
    return [torch.cat((in_proj[i], in_proj[d + i], out[:, i])) for i in range(d)]


def slow_score(score, mask, weights):
    match score:
        case "remain":
            return float(mask.sum())
        case "magnitude":
            return float((weights.abs() * mask).sum())
        case "l1":
            return float(weights.abs().sum())
        case "l2":
            return float(weights.norm())


@pytest.mark.parametrize("score", REFILL_SCORES)
@pytest.mark.parametrize("fillback", [0.0, 0.25])
@pytest.mark.parametrize("target", ["ssm", "mlp"])
def test_whole_units_stay_by_the_score(score, fillback, target):
    model = build(seed=2)
    survivors = prune_survivors(model, {}, "both", 0.4)
    generator = torch.Generator().manual_seed(5)
    calibration = [(torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator), torch.tensor([0, 1, 2, 0]))]
    masks = refill_masks(model, survivors, target, fillback, score, calibration, seed=7)
    smaller = shrink(model, masks).model
    if score == "saliency":
        loss = torch.nn.functional.cross_entropy(model(calibration[0][0]).float(), calibration[0][1])
        parameters = dict(model.named_parameters())
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = dict(zip(parameters, found, strict=True))
    for i, (block, after) in enumerate(zip(model.blocks, smaller.blocks, strict=True)):
        own = {n.removeprefix(f"blocks.{i}."): m.double() for n, m in survivors.items() if n.startswith(f"blocks.{i}.")}
        weights = {n: p.detach() for n, p in block.named_parameters()}
        rows, values = slow_rows(block, target, own, 1.0), slow_rows(block, target, weights, 0.0)
        full = sum(float(r.sum()) for r in rows) / len(rows[0])
        n = math.floor(full + (len(rows) - full) * fillback)
        shape = after.shape
        assert (shape.d_inner if target == "ssm" else shape.mlp_hidden) == max(1, n)
        if score == "random":
            continue
        if score == "saliency":
            grads = {k: (gradients[f"blocks.{i}.{k}"] * w).abs() for k, w in weights.items()}
            points = [float(r.sum()) for r in slow_rows(block, target, grads, 0.0)]
        else:
            points = [slow_score(score, row, value) for row, value in zip(rows, values, strict=True)]
        name = f"blocks.{i}." + ("ssm.D" if target == "ssm" else "mlp.fc1.bias")
        kept = masks[name].tolist()
        lost = [p for p, k in zip(points, kept, strict=True) if not k]
        assert not lost or min(p for p, k in zip(points, kept, strict=True) if k) >= max(lost) - 1e-5


def test_units_that_stay_are_whole(model):
    """Weights that global pruning had given up come back in the units that stay: that is the refill."""
    survivors = prune_survivors(model, {}, "mlp", 0.5)
    masks = refill_masks(model, survivors, "mlp")
    fc1 = masks["blocks.0.mlp.fc1.weight"]
    assert set(fc1.sum(1).tolist()) == {0, fc1.shape[1]}
    assert bool((fc1 & ~survivors["blocks.0.mlp.fc1.weight"]).any())


def test_density_after_rounds(model):
    masks = {}
    total = sum(p.numel() for p in weights_of(model, "both").values())
    for k in range(1, 12):
        before = masks
        masks = prune_survivors(model, masks, "both", 0.7**k)
        alive = sum(int(m.sum()) for m in masks.values())
        assert alive == round(0.7**k * total) and alive / total == pytest.approx(0.7**k, abs=1e-3)
        assert all(not bool((masks[n] & ~m).any()) for n, m in before.items()), "a weight came back"
    with pytest.raises(ConfigError, match="more than what survives"):
        prune_survivors(model, masks, "both", 0.5)


def test_the_smallest_go(model):
    masks = prune_survivors(model, {}, "ssm", 0.6)
    weights = weights_of(model, "ssm")
    lost = max(float(weights[n].abs()[~m].max()) for n, m in masks.items() if (~m).any())
    assert lost <= min(float(weights[n].abs()[m].min()) for n, m in masks.items())
    assert not any("mlp" in n for n in masks)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"score": "best"}, "unknown refill score 'best'; valid: remain"),
        ({"fillback_rate": 1.1}, r"fillback_rate must be in \[0, 1\]"),
        ({"target": "all"}, "unknown target 'all'; valid: ssm, mlp, both"),
        ({"score": "saliency"}, "needs calibration"),
    ],
)
def test_bad_words_are_refused(model, options, words):
    with pytest.raises(ConfigError, match=words):
        refill_masks(model, {}, **options)


def test_every_kind_of_model_is_refilled(member, images):
    survivors = prune_survivors(member, {}, "both", keep=0.5)
    kept = sum(int(m.sum()) for m in survivors.values())
    assert kept == round(0.5 * sum(p.numel() for p in weights_of(member, "both").values()))
    masks = refill_masks(member, survivors, "both")
    masked = copy.deepcopy(member)
    apply_mask_mamba(masked, masks)
    smaller = shrink(member, masks).model
    assert count_parameters(smaller) < count_parameters(member)
    assert float((masked(images) - smaller(images)).detach().abs().max()) < 1e-9


def test_a_target_that_a_model_does_not_have():
    vim = FAMILY["vim"]()
    for call in (lambda: weights_of(vim, "mlp"), lambda: compute_rsst_loss(vim, 1.0, "mlp")):
        with pytest.raises(ConfigError, match="target 'mlp' is nothing that this model has; valid: ssm"):
            call()
    assert float(compute_rsst_loss(vim, 1.0, "both")) == float(compute_rsst_loss(vim, 1.0, "ssm")) > 0
