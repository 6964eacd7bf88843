"""Pruned models in training: what is cut stays cut, masked and shrunk train alike, and folders rebuild them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from mamba.config.schema import OptimConfig
from mamba.runs import checkpoint as ckpt
from mamba.train.distributed import local_process
from mamba.train.ema import ModelEma
from mamba.train.optim import make_optimizer
from mamba.train.trainer import Trainer, fit
from pruning import MaskHook, load_masks, prune_mamba_unstructured
from pruning.cut import cut
from pruning.masks import FILE
from pruning.rounds import expand, hooks_for
from pruning.shrink import shrink, shrink_ema, shrink_optimizer
from tests.pruning.small_models import build

CUTS = {"mlp:neuron": 0.5, "linear_in:expand": 0.4, "linear_B_C:state": 0.3, "linear_out:output": 0.4,
        "conv1d:width": 0.5, "block": 0.34, "linear_gate:element": 0.5}  # fmt: skip


def data(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(steps)
    ]


class Loop:
    """The trainer's step, with nothing else: backward, hooks, the optimizer with decay, average."""

    def __init__(self, model, masks, optimizer="adamw"):
        self.model = model.train()
        self.ema = ModelEma(model, 0.9)
        config = OptimConfig(optimizer=optimizer, lr=1e-2, weight_decay=0.1, layer_decay=0.8)
        self.optimizer = make_optimizer(model, config)
        self.hook = MaskHook(masks)
        self.hook.attach(model, self.ema, self.optimizer, 0)

    def run(self, batches):
        for images, labels in batches:
            F.cross_entropy(self.model(images), labels).backward()
            self.hook.gradients()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.ema.update()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_cut_weights_stay_zero_everywhere(model, optimizer):
    loop = Loop(model, prune_mamba_unstructured(model, {"mlp": 0.6, "linear_gate": 0.5}), optimizer)
    loop.run(data(5))
    parameters, averaged = dict(model.named_parameters()), dict(loop.ema.model.named_parameters())
    for name, keep in loop.hook.masks.items():
        state = loop.optimizer.state[parameters[name]]
        moments = [values for values in state.values() if values.shape == keep.shape]
        assert len(moments) == (2 if optimizer == "adamw" else 1)
        for values in (parameters[name], averaged[name], *moments):
            assert bool((values[~keep] == 0).all()) and bool((values[keep] != 0).any())


def test_without_the_hook_cut_weights_come_back(model):
    """What the test above would miss if nothing ever moved them."""
    masks = prune_mamba_unstructured(model, {"mlp": 0.6})
    loop = Loop(model, masks)
    loop.hook.pairs = []
    loop.run(data(2))
    assert any(bool((dict(model.named_parameters())[n][~keep] != 0).any()) for n, keep in masks.items())


@pytest.mark.parametrize("before, after", [(0, 4), (4, 0), (3, 3)])
def test_masked_and_shrunk_train_alike_and_the_optimizer_shrinks_along(model, images, before, after):
    """Mask, train, shrink model, moments and average, train on: as if the masks had stayed."""
    masks = cut(model, CUTS).masks
    long = Loop(copy.deepcopy(model), masks)
    short = Loop(copy.deepcopy(model), masks)
    for loop in (long, short):
        loop.run(data(before))
    result = shrink(short.model, masks)
    ema, optimizer = shrink_ema(short.ema, result), shrink_optimizer(short.optimizer, short.model, result)
    assert {g["name"] for g in optimizer.param_groups} < {g["name"] for g in short.optimizer.param_groups}
    short.model, short.ema, short.optimizer = result.model.train(), ema, optimizer
    short.hook = MaskHook(result.masks)
    short.hook.attach(result.model, ema, optimizer, 0)
    for loop in (long, short):
        loop.run(data(after, seed=1))
    for a, b in ((long.model, short.model), (long.ema.model, short.ema.model)):
        assert float((a.eval()(images) - b.eval()(images)).detach().abs().max()) < 1e-7
    assert float(long.ema.updates) == float(short.ema.updates) == before + after


def test_muon_shrinks_along(model, images):
    """Momenta are sliced with their weights, matrices are those of the smaller model, and it trains on."""
    masks = cut(model, CUTS).masks
    loop = Loop(copy.deepcopy(model), masks, "muon")
    loop.run(data(3))
    result = shrink(loop.model, masks)
    optimizer = shrink_optimizer(loop.optimizer, loop.model, result)
    larger, smaller = dict(loop.model.named_parameters()), dict(result.model.named_parameters())
    for name, p in smaller.items():
        old = loop.optimizer.state[larger[result.slices.entries[name][0]]]
        assert set(optimizer.state[p]) == set(old) and float(optimizer.state[p]["step"]) == 3
        if "momentum_buffer" in old:
            assert torch.equal(optimizer.state[p]["momentum_buffer"], result.slices.take(name, old["momentum_buffer"]))
    parts = {name: optimizer.parts.get(p) for name, p in smaller.items()}
    assert all(sum(rows) == len(smaller[name]) for name, rows in parts.items() if rows)
    assert len(parts["blocks.0.ssm.in_proj.weight"]) == 2
    before = copy.deepcopy(result.model.state_dict())
    loop.model, loop.ema, loop.optimizer = result.model.train(), shrink_ema(loop.ema, result), optimizer
    loop.hook = MaskHook(result.masks)
    loop.hook.attach(result.model, loop.ema, optimizer, 0)
    loop.run(data(2, seed=1))
    after = result.model.state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in smaller)
    assert all(bool(t.isfinite().all()) for t in after.values())


def test_every_kind_of_model_trains_alike_masked_and_shrunk(member, images):
    has_mlp = member.architecture.blocks[0].mlp_hidden > 0
    masks = cut(member, {what: rate for what, rate in CUTS.items() if has_mlp or what != "mlp:neuron"}).masks
    long, short = Loop(copy.deepcopy(member), masks), Loop(copy.deepcopy(member), masks)
    for loop in (long, short):
        loop.run(data(2))
    result = shrink(short.model, masks)
    short.ema, short.optimizer = (
        shrink_ema(short.ema, result),
        shrink_optimizer(short.optimizer, short.model, result),
    )
    short.model, short.hook = result.model.train(), MaskHook(result.masks)
    short.hook.attach(result.model, short.ema, short.optimizer, 0)
    for loop in (long, short):
        loop.run(data(2, seed=1))
    for a, b in ((long.model, short.model), (long.ema.model, short.ema.model)):
        assert float((a.eval()(images) - b.eval()(images)).detach().abs().max()) < 1e-7


def test_a_smaller_model_of_any_kind_fits_back_into_the_dense_one(member, images):
    """As rounds do it: weights at their places, zeros elsewhere, compute the same."""
    result = cut(member, {"linear_in:expand": 0.4, "linear_B_C:state": 0.3}, shrink=True)
    dense = expand(result.model, copy.deepcopy(member), result.slices)
    dense_state = dense.state_dict()
    # what is outside of the blocks and what belongs to no removed unit comes back as it was
    assert all(torch.equal(dense_state[n], t) for n, t in member.state_dict().items() if "patch_embed" in n)
    assert float((dense(images) - result.model(images)).detach().abs().max()) < 1e-9


def test_the_model_given_is_never_trained_over(model):
    kept = copy.deepcopy(model.state_dict())
    for rates, smaller in ((CUTS, True), ({"mlp": 0.5}, False), ({"linear_delta:low_rank": 0.5}, True)):
        other = cut(model, rates, shrink=smaller)
        Loop(other.model, other.masks).run(data(2))
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def dense_checkpoint(small_fit, tmp_path):
    small_fit(optim__epochs=1)
    return ckpt.load_model(tmp_path / "run")


def save(folder, result, description):
    extra = {FILE: result.masks} if result.masks else {}
    return ckpt.save_checkpoint(folder, result.model, None, {**description, "weights": "raw"}, None, extra)


RATES = {"mlp:neuron": 0.5, "linear_in:expand": 0.3, "linear_B_C:shared": 0.5, "linear_delta:low_rank": 0.5,
         "linear_out:output": 0.4, "conv1d:separable": 0.5, "linear_gate:element": 0.5}  # fmt: skip


def test_a_shrunk_model_trains_saves_and_is_rebuilt_from_its_folder(small_fit, small_config, small_data, tmp_path):
    model, description = dense_checkpoint(small_fit, tmp_path)
    result = cut(model, RATES, shrink=True)
    start = save(tmp_path / "pruned", result, description)
    config = small_config(model__checkpoint=start, optim__epochs=2)
    hooks = hooks_for(config)
    assert len(hooks) == 1
    outcome = fit(config, local_process(), tmp_path / "tuned", small_data, hooks)
    back, _ = ckpt.load_model(tmp_path / "tuned")
    assert back.architecture == result.model.architecture
    assert outcome["metrics"]["model/params"] == sum(p.numel() for p in result.model.parameters())
    masks = load_masks(ckpt.find_checkpoint(tmp_path / "tuned") / FILE)
    assert set(masks) == set(result.masks)
    for name, keep in masks.items():
        weight = dict(back.named_parameters())[name]
        assert bool((weight[~keep] == 0).all()) and bool((weight[keep] != 0).all())


def test_a_masked_run_resumes_bit_for_bit(small_fit, small_config, small_data, tmp_path):
    model, description = dense_checkpoint(small_fit, tmp_path)
    start = save(tmp_path / "masked", cut(model, {"mlp": 0.6, "linear_out": 0.5}), description)
    config = small_config(model__checkpoint=start, optim__epochs=3, checkpoint__keep=3)
    fit(config, local_process(), tmp_path / "whole", small_data, hooks_for(config))
    fit(config, local_process(), tmp_path / "parts", small_data, hooks_for(config))
    newest = ckpt.newest_checkpoint(tmp_path / "parts")
    newest.rename(tmp_path / "gone")
    (tmp_path / "parts" / "result.json").unlink()
    fit(config, local_process(), tmp_path / "parts", small_data, hooks_for(config))
    a, b = (ckpt.load_model(ckpt.newest_checkpoint(tmp_path / n), "raw")[0] for n in ("whole", "parts"))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_start_for_other_data_is_refused(small_config, small_data, tmp_path):
    start = ckpt.save_checkpoint(tmp_path / "other", build().float(), None, {}, None)
    assert ckpt.load_model(start)[0].architecture.num_classes == 3
    config = small_config(model__checkpoint=start)
    Trainer(config, local_process(), tmp_path / "fine", small_data).close()
    wrong = type(small_data)(small_data.train, None, small_data.test, ("a", "b"), small_data.mean, small_data.std)
    with pytest.raises(ckpt.CheckpointError, match="is for 3 classes at 8 pixels, and the data has 2 classes"):
        Trainer(config, local_process(), tmp_path / "run", wrong)


def test_a_pruned_model_compiles(model, images):
    smaller = cut(model, CUTS, shrink=True).model
    expected = smaller(images)
    for block in smaller.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    smaller.train()
    assert torch.allclose(smaller(images), expected)
    smaller(images).sum().backward()
