"""Muon against torch's, part by part, and what a recorded step needs of it: skipped steps, masks, missing gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from mamba.ops.update.muon import MatrixUpdate, Muon, orthogonalise


def matrices(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("shape", [(5, 8, 8), (3, 16, 40), (3, 40, 16), (2, 1, 7)])
def test_singular_values_come_near_one(shape):
    out = orthogonalise(matrices(shape)[0])
    values = torch.linalg.svdvals(out)
    assert out.shape == shape and float(values.min()) > 0.3 and float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(matrices(shape)[0], full_matrices=False)
    assert float((out * (left @ right)).sum() / (out.norm() * (left @ right).norm())) > 0.95


def test_five_steps_are_torchs_on_one_matrix_at_a_time():
    """Fused rows are separate matrices of torch's; rates and decay as its match_rms_adamw. bfloat16, as torch."""
    whole, plain = matrices((24, 8), (12, 12))
    split = [p.clone().requires_grad_() for p in (whole[:8], whole[8:12], whole[12:], plain)]
    ours = [p.clone().requires_grad_() for p in (whole, plain)]
    momenta = [torch.zeros_like(p) for p in ours]
    update = MatrixUpdate(ours, momenta, [[8, 4, 12], [12]], [1.0, 0.5], [0.1, 0.1], momentum=0.9)
    update.dtype = torch.bfloat16
    kind = {"weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    theirs = [torch.optim.Muon([p], lr=1.0, **kind) for p in split]
    for step in range(5):
        a, b = matrices((24, 8), (12, 12), seed=step + 1)
        ours[0].grad, ours[1].grad = 2 * a, 2 * b
        for p, g, optimizer, scale in zip(split, (a[:8], a[8:12], a[12:], b), theirs, (1, 1, 1, 0.5), strict=True):
            p.grad = g.clone()
            optimizer.param_groups[0]["lr"] = scale * 0.2 / (step + 1)
            optimizer.step()
        update.apply(torch.tensor(0.2 / (step + 1)), torch.tensor(0.5), torch.tensor(True))
    torch.testing.assert_close(ours[0], torch.cat(split[:3]), rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(ours[1], split[3], rtol=1e-3, atol=2e-3)
    assert (ours[0] - whole).abs().mean() > 0.03
    torch.testing.assert_close(momenta[1], theirs[3].state[split[3]]["momentum_buffer"])


def make_optimizer(params, **values):
    groups = [
        {"params": params[:2], "muon": True, "lr_scale": 0.5, "weight_decay": 0.1},
        {"params": params[2:], "muon": False, "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    optimizer = Muon(groups, {params[0]: [4, 4]}, **values)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["lr_scale"]
    return optimizer


def test_a_step_that_is_not_finite_changes_nothing():
    params = [p.requires_grad_() for p in matrices((8, 6), (6, 8), (5,))]
    optimizer = make_optimizer(params)
    for step in range(3):
        for p in params:
            p.grad = torch.full_like(p, float("nan")) if step == 1 else torch.ones_like(p)
        before = copy.deepcopy([params, optimizer.state_dict()["state"]])
        optimizer.found_inf = torch.tensor(float(step == 1))
        optimizer.step()
        same = [torch.equal(a, b) for a, b in zip(before[0], params, strict=True)]
        assert same == [step == 1] * 3
        if step == 1:
            for i, values in optimizer.state_dict()["state"].items():
                assert all(torch.equal(v, before[1][i][k]) for k, v in values.items())
    assert all(float(values["step"]) == 2 for values in optimizer.state.values())


def test_masked_weights_and_missing_gradients_stay():
    params = [p.requires_grad_() for p in matrices((8, 6), (6, 8), (5,))]
    mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    params[0].data.mul_(mask)
    optimizer, before = make_optimizer(params), [p.detach().clone() for p in params]
    for _ in range(3):
        params[0].grad, params[2].grad = torch.randn(8, 6) * mask, torch.randn(5)
        optimizer.step()
    assert (params[0][~mask] == 0).all() and (params[0] != before[0])[mask].all()
    assert torch.equal(params[1], before[1])


def test_it_continues_from_its_state():
    """Saved and restored after two of five steps: the same weights."""
    runs = []
    for stop in (None, 2):
        params = [p.requires_grad_() for p in matrices((8, 6), (6, 8), (5,))]
        optimizer = make_optimizer(params)
        for step in range(5):
            if step == stop:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = make_optimizer(params)
                optimizer.load_state_dict(state)
            for p, g in zip(params, matrices((8, 6), (6, 8), (5,), seed=step), strict=True):
                p.grad = g
            optimizer.step()
        runs.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_rest_is_adamws():
    params, other = ([p.requires_grad_() for p in matrices((8, 6), (6, 8), (5,))] for _ in range(2))
    optimizer = make_optimizer(params, betas=(0.8, 0.9))
    adamw = torch.optim.AdamW([other[2]], lr=0.01, betas=(0.8, 0.9), weight_decay=0.0, fused=True)
    for step in range(3):
        for p, q, g in zip(params, other, matrices((8, 6), (6, 8), (5,), seed=step), strict=True):
            p.grad, q.grad = g, g.clone()
        optimizer.step()
        adamw.step()
    assert torch.equal(params[2], other[2]) and len(optimizer.param_groups) == 2
