"""Optimizer groups, the schedule, and the moving average."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch

from mamba.config.schema import OptimConfig, RunConfig
from mamba.errors import ConfigError
from mamba.models.model import mamba_tiny
from mamba.train.ema import ModelEma
from mamba.train.optim import OPTIMIZERS, make_optimizer, matrix_parts, parameter_groups
from mamba.train.schedule import SCHEDULES, learning_rate, set_learning_rate


@pytest.fixture(scope="module")
def model():
    return mamba_tiny(img_size=8, d_model=8, depth=3)


def test_every_parameter_is_in_exactly_one_group(model):
    groups = parameter_groups(model, 0.05, 0.65)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_layer_wise_rates_and_decay(model):
    names = {id(p): n for n, p in model.named_parameters()}
    scale, decay = {}, {}
    for group in parameter_groups(model, 0.05, 0.5):
        for p in group["params"]:
            scale[names[id(p)]], decay[names[id(p)]] = group["lr_scale"], group["weight_decay"]
    for name in names.values():
        top = name.split(".")[0]
        block = int(name.split(".")[1]) if top == "blocks" else None
        expected = 0.5**3 if top in ("patch_embed", "pos_embed") else 0.5 ** (2 - block) if block is not None else 1.0
        assert scale[name] == expected, name
    decayed = {n.split(".", 2)[2] if n.startswith("blocks") else n for n, d in decay.items() if d}
    matrices = {"ssm.in_proj.weight", "ssm.conv1d.weight", "ssm.x_proj.weight", "ssm.out_proj.weight"}
    assert decayed == matrices | {"mlp.fc1.weight", "mlp.fc2.weight", "head.weight"}


def test_the_config_names_every_optimizer_and_schedule():
    for key, registry in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        assert set(get_args(OptimConfig.model_fields[key].annotation)) == set(registry)


@pytest.mark.parametrize("mixer", ["forward", "bidirectional"])
def test_muon_takes_the_blocks_matrices_part_by_part(mixer):
    """in_proj as x and z of each path, x_proj as B, C and delta; A_log, convolutions, stem and head are AdamW's."""
    model = mamba_tiny(img_size=8, d_model=8, depth=2, mixer=mixer)
    names = {p: n.split(".", 2)[2] for n, p in model.named_parameters() if n.startswith("blocks.")}
    parts = {names[p]: rows for p, rows in matrix_parts(model).items()}
    ways = 1 if mixer == "forward" else 2
    want = {"ssm.in_proj.weight": [16] * 2 * ways, "ssm.out_proj.weight": [8], "ssm.x_proj.weight": [16, 16, 16]}
    want |= {"mlp.fc1.weight": [32], "mlp.fc2.weight": [8]}
    assert parts == want | ({"ssm.x_proj_b.weight": [16, 16, 16]} if ways == 2 else {})
    config = RunConfig().with_values({"optim.optimizer": "muon", "optim.layer_decay": 0.5}).optim
    optimizer = make_optimizer(model, config)
    grouped = [p for g in optimizer.param_groups for p in g["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    assert {p for g in optimizer.param_groups if g["muon"] for p in g["params"]} == set(matrix_parts(model))
    assert {g["name"]: g["lr_scale"] for g in optimizer.param_groups if g["muon"]} == {"block_00": 0.5, "block_01": 1.0}


def test_weight_decay_leaves_exempt_parameters_alone(model):
    """With zero gradients only decay moves anything."""
    config = RunConfig().optim
    optimizer = make_optimizer(model, config)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and not any(n.endswith(("A_log", ".D", "bias")) or "norm" in n or "embed" in n for n in moved)


def schedule(**values):
    config = RunConfig().with_values({f"optim.{k}": v for k, v in values.items()}).optim
    return [learning_rate(config, step, 10) for step in range(config.epochs * 10)]


def test_linear_warmup_then_cosine_to_the_minimum():
    rates = schedule(epochs=10, lr=1.0, min_lr=0.1, warmup_epochs=2, warmup="linear")
    assert rates[:20] == pytest.approx([(s + 1) / 20 for s in range(20)])
    assert rates[20] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert rates[20 + 79 // 2] == pytest.approx(0.55, abs=0.02)
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))


def test_exponential_warmup():
    rates = schedule(epochs=10, lr=2.0, warmup_epochs=1, warmup="exponential")
    expected = [2 * (1 - math.exp(-5 * p)) / (1 - math.exp(-5)) for p in [(s + 1) / 10 for s in range(10)]]
    assert rates[:10] == pytest.approx(expected)


def test_constant_then_decay():
    values = {"lr": 1.0, "min_lr": 0.1, "warmup_epochs": 2, "warmup": "linear", "schedule": "wsd", "decay_epochs": 3}
    short, long = schedule(epochs=10, **values), schedule(epochs=20, **values)
    assert short[19:70] == [1.0] * 51 and short[-1] == pytest.approx(0.1)
    assert short[70:] == pytest.approx([1 - 0.9 * (s + 1) / 30 for s in range(30)])
    assert long[:70] == short[:70] and long[-30:] == pytest.approx(short[-30:])
    with pytest.raises(ConfigError, match=r"optim.warmup_epochs 2 and optim.decay_epochs 3 .* than optim.epochs 4"):
        RunConfig().with_values({f"optim.{k}": v for k, v in {**values, "epochs": 4}.items()}).resolve()


@pytest.mark.parametrize("warmup", [0, 10])
def test_schedule_without_and_with_nothing_but_warmup(warmup):
    rates = schedule(epochs=10, lr=1.0, warmup_epochs=warmup)
    assert max(rates) == pytest.approx(1.0) and min(rates) > 0


def test_rates_of_groups_follow_their_scale(model):
    optimizer = make_optimizer(model, RunConfig().with_values({"optim.layer_decay": 0.5}).optim)
    set_learning_rate(optimizer, 0.8)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == pytest.approx(
        {"embed": 0.1, "block_00": 0.2, "block_01": 0.4, "block_02": 0.8, "head": 0.8}
    )


def test_average_warms_up_and_covers_buffers():
    net = torch.nn.BatchNorm1d(3)
    ema = ModelEma(net, decay=0.9)
    start = net.weight.detach().clone()
    with torch.no_grad():
        net.weight += 1
        net.running_mean += 2
        net.num_batches_tracked += 5
    ema.update()  # decay (1 + 0) / (10 + 0)
    torch.testing.assert_close(ema.model.weight, start + 0.9)
    torch.testing.assert_close(ema.model.running_mean, torch.full((3,), 1.8))
    assert ema.model.num_batches_tracked == 5
    assert float(ema.decay_now()) == pytest.approx(2 / 11)
    before = ema.model.weight.clone()
    ema.update(torch.tensor(False))
    assert torch.equal(ema.model.weight, before) and ema.updates == 1
    ema.updates.fill_(10_000)
    assert float(ema.decay_now()) == pytest.approx(0.9)


def test_average_does_not_share_memory_with_the_model():
    net = torch.nn.Linear(2, 2)
    ema = ModelEma(net, 0.9)
    own = {p.data_ptr() for p in ema.model.parameters()}
    assert not own & {p.data_ptr() for p in net.parameters()}
    assert not any(p.requires_grad for p in ema.model.parameters())
