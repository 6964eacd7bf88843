"""RSST: values by hand, the ceiling is reached, norms shrink, and the cut comes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mamba.errors import ConfigError
from mamba.models.model import mamba_small
from mamba.runs import checkpoint as ckpt
from mamba.train.distributed import local_process
from mamba.train.trainer import fit
from pruning import compute_rsst_loss, refill_masks, rsst_schedule_exp
from pruning.components import blocks_of
from pruning.masks import unit_masks
from pruning.penalty import SCHEDULES, GrowingDecay, PenaltyHook, growing_lambda
from pruning.refill import prune_survivors
from pruning.rounds import hooks_for


def test_the_schedule_of_the_notes():
    assert rsst_schedule_exp(30, 160, 1e-4, 4) == pytest.approx(1.236e-7, rel=1e-3)
    assert rsst_schedule_exp(0, 160, 1e-4) == 0 and rsst_schedule_exp(160, 160, 1e-4) == 1e-4
    with pytest.raises(ConfigError, match="epoch 161 of 160"):
        rsst_schedule_exp(161, 160, 1e-4)


def test_the_penalty_by_hand(model):
    lasso, l1 = 0.0, 0.0
    for block in blocks_of(model):
        for unit in range(14):
            values = torch.cat(
                (block.mlp.fc1.weight[unit], block.mlp.fc1.bias[unit, None], block.mlp.fc2.weight[:, unit])
            )
            lasso, l1 = lasso + values.norm(), l1 + values.abs().sum()
    torch.testing.assert_close(compute_rsst_loss(model, 0.5, "mlp", "group"), 0.5 * lasso)
    torch.testing.assert_close(compute_rsst_loss(model, 2.0, "mlp", "l1"), 2.0 * l1)
    both = compute_rsst_loss(model, 1.0, "both")
    torch.testing.assert_close(both, compute_rsst_loss(model, 1.0, "ssm") + compute_rsst_loss(model, 1.0, "mlp"))


def test_the_penalties_of_the_notes_by_their_own_words(model):
    """The second is copied from them; of the first they give the value, below."""

    def rows(model, strength):
        loss = 0
        for name, module in model.named_modules():
            if name.endswith(("out_proj", "mlp.fc1", "mlp.fc2")):
                loss += strength * module.weight.norm(dim=1).sum()
        return loss

    model.zero_grad()
    rows(model, 1e-4).backward()
    theirs = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(compute_rsst_loss(model, 1e-4, "both", "rows"), rows(model, 1e-4), rtol=1e-12, atol=0)
    model.zero_grad()
    compute_rsst_loss(model, 1e-4, "both", "rows").backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() and len(ours) == 9
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-12, atol=1e-16)
    block = model.blocks[1]
    columns = [sum(b.ssm.out_proj.weight[:, i].abs().sum() for i in range(12)) for b in model.blocks]
    neurons = [sum(b.mlp.fc1.weight[i].abs().sum() for i in range(14)) for b in model.blocks]
    mean = (sum(columns) + sum(neurons)) / 6
    torch.testing.assert_close(compute_rsst_loss(model, 0.5, "both", "mean_l1"), 0.5 * mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(compute_rsst_loss(model, 1.0, "ssm", "mean_l1"), sum(columns) / 3, rtol=1e-12, atol=0)
    alone = sum(b.mlp.fc1.weight.norm(dim=1).sum() + b.mlp.fc2.weight.norm(dim=1).sum() for b in model.blocks)
    torch.testing.assert_close(compute_rsst_loss(model, 1.0, "mlp", "rows"), alone, rtol=1e-12, atol=0)
    with torch.no_grad():
        block.mlp.fc1.weight[2] = 0
    for norm in ("rows", "mean_l1"):
        model.zero_grad()
        compute_rsst_loss(model, 1.0, "both", norm).backward()
        assert block.mlp.fc1.weight.grad.isfinite().all() and float(block.mlp.fc1.weight.grad[2].abs().max()) == 0


def test_the_value_of_the_notes_at_the_scale_of_their_model():
    """0.479511 at strength 1e-4 for a new mamba_small; its linear maps are drawn as Xavier says (their threshold of
    15.18 over neurons is that of sums of 2 x 192 such weights)."""
    torch.manual_seed(0)
    model = mamba_small(depth=3)  # a mean over tensors does not grow with the depth
    with torch.no_grad():
        for block in blocks_of(model):
            for weight in (block.ssm.out_proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight):
                torch.nn.init.xavier_uniform_(weight)
        assert float(compute_rsst_loss(model, 1e-4, "both", "mean_l1")) == pytest.approx(0.479511, rel=2e-3)
        sums = [b.mlp.fc1.weight.abs().sum(1) + b.mlp.fc2.weight.abs().sum(0) for b in blocks_of(model)]
        assert float(torch.cat(sums).median()) == pytest.approx(15.178526, rel=2e-3)


def test_a_constant_strength():
    assert [rsst_schedule_exp(epoch, 5, 1e-4, 0.0) for epoch in (1, 3, 5)] == [1e-4] * 3


@pytest.mark.parametrize("norm", ["mean_l1", "rows"])
def test_the_penalties_of_the_notes_are_added_to_the_gradients(model, small_config, norm):
    (hook,) = hooks_for(small_config(penalty__kind=norm, penalty__strength=0.5, penalty__exponent=0.0))
    hook.attach(model, None, torch.optim.AdamW(model.parameters()), 0)
    hook.begin_epoch(0, 10)
    model.zero_grad()
    compute_rsst_loss(model, 0.5, "both", norm).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    hook.gradients()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 1 + wanted.get(name, torch.zeros_like(parameter)))
    assert hook.end_epoch(0)["prune/penalty_strength"] == 0.5


def test_the_penalty_has_a_finite_gradient_also_at_zero(model):
    with torch.no_grad():
        block = model.blocks[0]
        for tensor in (block.mlp.fc1.weight[2], block.mlp.fc1.bias[2:3], block.mlp.fc2.weight[:, 2]):
            tensor.zero_()
    compute_rsst_loss(model, 1.0).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.blocks[0].ssm.A_log.grad is None, "A_log is left alone"
    assert float(model.blocks[0].mlp.fc1.weight.grad[2].abs().max()) == 0


@pytest.mark.parametrize("words", [("attention", "group", "unknown target"), ("mlp", "l3", "unknown norm")])
def test_wrong_words(model, words):
    with pytest.raises(ConfigError, match=words[2]):
        compute_rsst_loss(model, 1.0, *words[:2])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lambda_grows_to_its_ceiling(schedule):
    values = [growing_lambda(e, 6, 0.3, schedule) for e in range(6)]
    assert values[-1] == pytest.approx(0.3) and values[0] > 0
    assert all(a < b for a, b in pairwise(values))
    if schedule.startswith("x"):
        assert values[1] / values[0] == pytest.approx(int(schedule[1]))
    with pytest.raises(ConfigError, match="unknown schedule 'fast'"):
        growing_lambda(0, 6, 0.3, "fast")


def start_of(small_fit, tmp_path):
    small_fit(optim__epochs=1)
    return ckpt.load_model(tmp_path / "run")[0], ckpt.find_checkpoint(tmp_path / "run")


def test_units_that_leave_shrink_and_are_cut(small_fit, small_config, small_data, tmp_path):
    model, start = start_of(small_fit, tmp_path)
    keep = [torch.arange(48) % 2 == 0] * 2
    stay = unit_masks(model, "mlp_hidden", keep)
    config = small_config(
        model__checkpoint=start, optim__epochs=6, optim__warmup_epochs=0, prune__method="rsst", model__drop_path=0.0
    )
    curves = {}
    for ceiling in (0.0, 2.0):
        folder = tmp_path / f"ceiling-{ceiling}"
        hook = GrowingDecay({}, stay, ceiling, "linear", 4.0, config.grow_epochs())
        values = []
        hook.end_epoch = lambda epoch, hook=hook, values=values: values.append(type(hook).end_epoch(hook, epoch)) or {}
        result = fit(config, local_process(), folder, small_data, [hook])
        curves[ceiling] = values
        assert result["tested"]["epoch"] > config.grow_epochs(), "tested on weights from before the cut"
        final, _ = ckpt.load_model(folder)
        for block, kept in zip(final.blocks, keep, strict=True):
            assert bool((block.mlp.fc1.weight[~kept] == 0).all() and (block.mlp.fc2.weight[:, ~kept] == 0).all())
            assert bool((block.mlp.fc1.bias[~kept] == 0).all() and (block.mlp.fc1.weight[kept] != 0).any())
    strong, none = curves[2.0], curves[0.0]
    assert [v["prune/lambda"] for v in strong] == pytest.approx([2 / 3, 4 / 3, 2.0, 0, 0, 0])
    assert strong[2]["prune/leaving_rms"] < 0.7 * none[2]["prune/leaving_rms"]
    assert strong[2]["prune/cut_percent"] == 0 and strong[3]["prune/cut_percent"] > 10
    assert strong[3]["prune/leaving_rms"] == 0


def test_the_penalty_shrinks_what_it_is_for(small_config, small_data, tmp_path):
    norms = {}
    for base in (0.0, 1e-2):
        hook = PenaltyHook(base, 1.0, "mlp", "group")
        config = small_config(optim__epochs=3, model__drop_path=0.0)
        fit(config, local_process(), tmp_path / str(base), small_data, [hook])
        model, _ = ckpt.load_model(ckpt.newest_checkpoint(tmp_path / str(base)), "raw")
        norms[base] = [compute_rsst_loss(model, 1.0, target).item() for target in ("mlp", "ssm")]
        assert hook.end_epoch(2)["prune/penalty_strength"] == pytest.approx(base)
    assert norms[1e-2][0] < 0.9 * norms[0.0][0]
    assert norms[1e-2][1] > 0.9 * norms[0.0][1]


def test_refill_and_growing_decay_agree_on_names(model):
    stay = refill_masks(model, {}, "both", 0.5)
    hook = GrowingDecay({}, stay, 1.0, "exp", 4.0, 2)
    assert set(hook.masks) == set(stay) and all(bool(m.all()) for m in hook.masks.values())


def test_shapes_of_growth_by_hand():
    assert growing_lambda(0, 2, 1.0, "exp") == pytest.approx((2.718281828**0.5 - 1) / 1.718281828)
    assert growing_lambda(0, 2, 1.0, "power", 3.0) == pytest.approx(0.125)


def test_what_trains_while_lambda_grows(model):
    """The survivors and the units that stay, as a whole; decayed are the survivors outside of those; never A_log."""
    survivors = prune_survivors(model, {}, "both", 0.5)
    stay = refill_masks(model, survivors, "both")
    hook = GrowingDecay(survivors, stay, 1.0, "linear", 4.0, 2)
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(hook.masks[name], survivors[name] | stay[name])
    hook.attach(model, None, torch.optim.AdamW(model.parameters()), 0)
    parameters = {id(p): n for n, p in model.named_parameters()}
    decayed = {parameters[id(p)]: going.bool() for p, going in hook.decayed}
    assert torch.equal(decayed[name], survivors[name] & ~stay[name])
    assert decayed and not any(n.endswith("A_log") for n in decayed)
