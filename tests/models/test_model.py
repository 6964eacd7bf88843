"""Models: exact parameter counts and names, the block's parts, and rebuilding from a description."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mamba.models.block import DropPath
from mamba.models.model import Architecture, MambaModel, count_parameters, mamba_base, mamba_small, mamba_tiny
from mamba.models.ssm import BlockShape
from mamba.ops.conv import causal_conv1d

TINY = Architecture(8, 2, 3, 5, 12, 0.0, (BlockShape(24, 4, 4, 48),) * 2)


def counted(make, **kwargs):
    with torch.device("meta"):
        return count_parameters(make(**kwargs))


@pytest.mark.parametrize("make, count", [(mamba_tiny, 4_974_218), (mamba_small, 16_488_394), (mamba_base, 86_420_362)])
def test_parameter_counts(make, count):
    assert counted(make, num_classes=10, img_size=32) == count


def test_large_images_use_patch_16():
    with torch.device("meta"):
        model = mamba_small(num_classes=1000, img_size=224, drop_path=0.1)
    assert model.pos_embed.shape == (1, 196, 192)
    assert model.patch_embed.weight.shape == (192, 3, 16, 16)


def test_parameter_names_and_row_order():
    names = {n.replace("blocks.1.", "blocks.N.") for n, _ in MambaModel(TINY).named_parameters() if "blocks.0" not in n}
    ssm = ["in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "A_log", "D", "out_proj.weight"]
    rest = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
    rest += [f"mlp.fc{i}.{p}" for i in (1, 2) for p in ("weight", "bias")]
    top = [
        "patch_embed.weight",
        "patch_embed.bias",
        "pos_embed",
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    ]
    assert names == {*top, *(f"blocks.N.ssm.{n}" for n in ssm), *(f"blocks.N.{n}" for n in rest)}


def plain_ssm(ssm, x):
    """The mixer of one sequence, written independently with loops: (length, d_model) -> the same."""
    d_inner, d_state = ssm.A_log.shape
    A = -ssm.A_log.exp()
    rows_x, rows_z = ssm.in_proj.weight[:d_inner], ssm.in_proj.weight[d_inner:]
    W_B, W_C, W_delta = (
        ssm.x_proj.weight[:d_state],
        ssm.x_proj.weight[d_state : 2 * d_state],
        ssm.x_proj.weight[2 * d_state :],
    )
    projected = [rows_x @ token for token in x]
    taps = ssm.conv1d.weight.shape[-1]
    state = torch.zeros(d_inner, d_state, dtype=x.dtype)
    out = []
    for t, token in enumerate(x):
        conv = ssm.conv1d.bias.clone()
        for k in range(taps):
            if t - taps + 1 + k >= 0:
                conv = conv + ssm.conv1d.weight[:, 0, k] * projected[t - taps + 1 + k]
        u = conv * torch.sigmoid(conv)
        delta = torch.log1p(torch.exp(W_delta @ u + ssm.delta_bias))
        state = torch.exp(delta[:, None] * A) * state + (delta * u)[:, None] * (W_B @ u)[None, :]
        y = state @ (W_C @ u) + ssm.D * u
        gate = rows_z @ token
        out.append(ssm.out_proj.weight @ (y * gate * torch.sigmoid(gate)))
    return torch.stack(out)


def test_mixer_equals_plain_loops():
    torch.manual_seed(0)
    ssm = MambaModel(TINY).blocks[0].ssm.double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(ssm(x), torch.stack([plain_ssm(ssm, s) for s in x]))


def test_mixer_is_causal_and_remembers():
    torch.manual_seed(0)
    ssm = MambaModel(TINY).blocks[0].ssm.double()
    x = torch.randn(1, 16, 12, dtype=torch.float64)
    base = ssm(x)
    later = x.clone()
    later[:, 9] += 1
    assert torch.equal(ssm(later)[:, :9], base[:, :9])
    first = x.clone()
    first[:, 0] += 1
    assert (ssm(first)[:, -1] - base[:, -1]).abs().max() > 1e-8


def test_every_parameter_gets_gradient():
    torch.manual_seed(0)
    model = MambaModel(TINY)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_initial_time_step_and_A():
    torch.manual_seed(0)
    with torch.no_grad():
        ssm = mamba_tiny().blocks[0].ssm
    start = torch.nn.functional.softplus(ssm.delta_bias)
    assert start.min() >= 0.001 and start.max() <= 0.1001
    logs = start.log()
    middle = (math.log(0.001) + math.log(0.1)) / 2
    assert abs(float(logs.mean()) - middle) < 0.3  # log-uniform
    torch.testing.assert_close(ssm.A_log.exp(), torch.arange(1.0, 17).repeat(256, 1))
    assert (ssm.D == 1).all()


def test_initial_weights():
    torch.manual_seed(0)
    model = mamba_tiny(d_model=64, depth=8)
    assert 0.015 < float(model.pos_embed.std()) < 0.025
    assert 0.015 < float(model.head.weight.std()) < 0.025 and (model.head.bias == 0).all()
    for layer in (model.blocks[3].ssm.out_proj, model.blocks[3].mlp.fc2):  # uniform, scaled for 16 residual branches
        bound = layer.in_features**-0.5 / 4
        assert 0.9 * bound < float(layer.weight.abs().max()) <= bound
    assert (model.blocks[3].mlp.fc1.bias == 0).all()


def test_the_scale_of_initial_weights_counts_the_branches_that_there_are():
    torch.manual_seed(0)
    layer = mamba_tiny(d_model=64, depth=16, mlp_ratio=0).blocks[3].ssm.out_proj  # 16 branches, none of an MLP
    bound = layer.in_features**-0.5 / 4
    assert 0.9 * bound < float(layer.weight.abs().max()) <= bound


def test_a_model_in_bf16_scans_with_float32_parameters(monkeypatch):
    seen = []

    def scan(problem, reverse):
        seen.append(problem)
        return problem.u

    monkeypatch.setattr("mamba.models.ssm.one_scan", scan)
    MambaModel(TINY).bfloat16()(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16))
    for problem in seen:
        assert {problem.A.dtype, problem.D.dtype, problem.delta_bias.dtype} == {torch.float32}
        assert {problem.u.dtype, problem.delta.dtype, problem.B.dtype} == {torch.bfloat16}
    assert len(seen) == 2


def test_causal_convolution_equals_conv1d():
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3).double()
    x = torch.randn(2, 10, 6, dtype=torch.float64)
    expected = conv(x.transpose(1, 2))[..., :10].transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(x, conv.weight, conv.bias), expected)


def test_drop_path_rate_and_scale():
    torch.manual_seed(0)
    drop = DropPath(0.3).train()
    out = drop(torch.ones(20_000, 2, 2))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (out.flatten(1).std(1) == 0).all()  # whole samples
    assert abs(float((out[:, 0, 0] == 0).float().mean()) - 0.3) < 0.01
    assert abs(float(out.mean()) - 1) < 0.02
    x = torch.randn(4, 3)
    assert torch.equal(drop.eval()(x), x)


def test_drop_path_rises_linearly():
    rates = [b.drop_path.rate for b in mamba_small(d_model=4, drop_path=0.1).blocks]
    assert rates == pytest.approx([0.1 * i / 23 for i in range(24)], abs=1e-6)


def test_drop_path_is_on_both_branches():
    torch.manual_seed(0)
    model = MambaModel(replace(TINY, drop_path=0.99, blocks=TINY.blocks))
    block = model.blocks[1].train()
    x = torch.randn(200, 4, 12)
    same = (block(x) == x).flatten(1).all(1).float().mean()
    assert same > 0.9  # 0.99 squared: both branches dropped


def test_uneven_blocks_are_rebuilt_from_their_description():
    torch.manual_seed(0)
    uneven = replace(TINY, blocks=(BlockShape(24, 4, 4, 48), BlockShape(7, 3, 2, 5), BlockShape(1, 1, 1, 1)))
    model = MambaModel(uneven).eval()
    again = MambaModel(Architecture.from_dict(model.architecture.to_dict())).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), again(x))
    assert model.architecture == uneven


def test_macs_count_the_matrix_products(monkeypatch):
    """Against torch's own counter; the scan is left out and added by hand, like the convolution, which it misses."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr("mamba.models.ssm.selective_scan", lambda u, *args, **options: u)
    model = MambaModel(TINY).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 8, 8))
    products = counter.get_total_flops() // 2
    by_hand = 2 * 16 * (24 * (3 * 4 + 2) + 24 * 4)
    assert model.architecture.macs() == products + by_hand


def test_wrong_arguments():
    with pytest.raises(ValueError, match="img_size 30 is not divisible by patch_size 4"):
        mamba_tiny(img_size=30, patch_size=4)
    with pytest.raises(ValueError, match="drop_path"):
        mamba_tiny(drop_path=1.0)


@pytest.mark.parametrize("shape", [(1, 3, 4, 16), (1, 3, 16, 4), (1, 3, 16, 16), (3, 8, 8), (1, 1, 8, 8)])
def test_images_of_another_shape(shape):
    """4x16 pixels make as many tokens as 8x8 do, and would get their positions."""
    with pytest.raises(ValueError, match="for a model of 8x8 pixels; valid: .batch, 3, 8, 8"):
        MambaModel(TINY)(torch.randn(shape))
