"""Mixers, class tokens, positions, orders and stems of every model: each against plain loops (plain_loops.py)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn

from mamba.config.schema import ModelConfig, RunConfig
from mamba.errors import ConfigError
from mamba.models.embed import STEMS, permute, rotary_tables, sequence_order, transposition
from mamba.models.heads import HEADS
from mamba.models.model import Architecture, MambaModel, count_parameters, named_model
from mamba.models.ssm import MIXERS as REGISTRY
from mamba.models.ssm import BlockShape, Mixer, ScanPath, SelectiveSSM
from mamba.runs.checkpoint import load_model, save_checkpoint
from mamba.train.optim import parameter_groups
from tests.models.plain_loops import ROPE, agree, images, small

MIXERS = tuple(REGISTRY.shipped)
"""Each has its slow twin in tests/models/plain_loops.py."""
CLASS_TOKENS = ("none", "start", "middle", "double")
POSITIONS = ("learned", "rope", "both", "none")

# --- what somebody adds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverses", [(True,), (False, True), (False, True, False), (False, False, True), (True, True)])
def test_a_path_that_reads_backwards_does_so_wherever_it_stands(monkeypatch, reverses):
    """It read forwards unless it was the second of two."""
    torch.manual_seed(0)
    paths = tuple(ScanPath(f"_{n}" if n else "", reverse) for n, reverse in enumerate(reverses))
    monkeypatch.setitem(REGISTRY, "toy", Mixer(paths))
    monkeypatch.setitem(REGISTRY, "straight", Mixer(tuple(replace(path, reverse=False) for path in paths)))
    toy = SelectiveSSM(6, BlockShape(4, 3, 2, 0, mixer="toy"))
    x = torch.randn(1, 9, 6)
    merged = toy.out_proj.weight.split(4, dim=1)
    for n, reverse in enumerate(reverses):
        with torch.no_grad():  # this path's columns alone
            for m, part in enumerate(merged):
                part.zero_() if m != n else part.copy_(torch.randn(6, 4))
        straight = SelectiveSSM(6, BlockShape(4, 3, 2, 0, mixer="straight"))
        straight.load_state_dict(toy.state_dict())
        want = straight(x.flip(1)).flip(1) if reverse else straight(x)
        torch.testing.assert_close(toy(x), want, msg=lambda m, n=n: f"path {n}: {m}")


@pytest.mark.parametrize("paths, depth, mixer", [((ScanPath(), ScanPath("_b")), 2, "toy"), ((), 1, "alternating")])
def test_a_class_token_that_no_scan_goes_back_to_is_refused(monkeypatch, paths, depth, mixer):
    """It trained, and knew nothing of the image: with a mixer that somebody added, or one block that alternates."""
    if paths:
        monkeypatch.setitem(REGISTRY, "toy", Mixer(paths))
    config = ModelConfig.model_construct(
        **{**ModelConfig().model_dump(), "d_model": 8, "depth": depth, "mixer": mixer, "class_token": "start"}
    )
    told = f"none of {depth} blocks of model.mixer" if mixer == "alternating" else f"with model.mixer '{mixer}' sees no"
    with pytest.raises(ConfigError, match=f"'start' .*{told}"):
        Architecture.from_config(config, 3, 8)
    with pytest.raises(ConfigError, match=f"'start' .*{told}"):
        RunConfig().with_values(
            {f"model.{k}": v for k, v in config if k in ("depth", "mixer", "class_token")}
        ).resolve()


# --- every choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers_equal_the_reference(mixer):
    agree(small(mixer=mixer, depth=5 if mixer in ("alternating", "cross") else 2), kind=mixer)


@pytest.mark.parametrize("mixer", MIXERS[1:])
def test_mixers_of_a_short_sequence(mixer):
    """Four tokens, then one: fewer than the convolution's taps, and than the largest scale."""
    agree(small(mixer=mixer, img_size=4), side=4, kind=mixer)
    agree(small(mixer=mixer, img_size=4, patch_size=4), side=4, kind=mixer, patch=4, stride=4)


@pytest.mark.parametrize("class_token", CLASS_TOKENS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_class_tokens_and_positions_equal_the_reference(class_token, positions):
    model = small(class_token=class_token, pos_embed=positions, mixer="bidirectional")
    tolerance = ROPE if positions in ("rope", "both") else 1e-9
    agree(model, tolerance=tolerance, kind="bidirectional", class_token=class_token, positions=positions)


@pytest.mark.parametrize("order", ["raster", "snake", "column"])
def test_scan_orders_equal_the_reference(order):
    model = small(scan_order=order, class_token="middle", pos_embed="both", mixer="bidirectional")
    options = {"class_token": "middle", "positions": "both", "order": order}
    agree(model, tolerance=ROPE, kind="bidirectional", **options)


@pytest.mark.parametrize("order", ["raster", "snake", "column"])
@pytest.mark.parametrize("class_token", ["none", "middle", "double"])
def test_directions_in_every_order_equal_the_reference(order, class_token):
    """Across: the same order of the transposed image; class tokens stay where they are."""
    model = small(mixer="cross", depth=4, scan_order=order, class_token=class_token)
    assert [b.direction for b in model.architecture.blocks] == ["forward", "backward", "across", "across_backward"]
    agree(model, kind="cross", class_token=class_token, order=order)


def test_a_transposition_by_hand():
    raster, snake = sequence_order("raster", 3, []), sequence_order("snake", 3, [])
    assert transposition(raster, 3, []) == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    # snake: 0 1 2 5 4 3 6 7 8, of the transposed image 0 3 6 7 4 1 2 5 8
    assert [snake[place] for place in transposition(snake, 3, [])] == [0, 3, 6, 7, 4, 1, 2, 5, 8]
    assert transposition(sequence_order("raster", 2, [2]), 2, [2]) == [0, 3, 2, 1, 4]


def test_a_permutation_and_its_gradients():
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    inverse = order.argsort()
    assert torch.equal(permute(x, order, inverse), x[:, order])
    assert torch.autograd.gradcheck(lambda x: permute(x, order, inverse), x)
    assert torch.equal(permute(permute(x, order, inverse), inverse, order), x)


def test_layers_are_shuffled_in_training_only():
    """The probability rises from 0 to its last block's; the mixer reads another order, and its outputs go back."""
    torch.manual_seed(0)
    model = small(depth=3, layer_shuffle=1.0)
    assert [float(block.shuffle.rate) for block in model.stack] == pytest.approx([0, 0.5, 1])
    x = torch.randn(1, 25, 8, dtype=torch.float64)
    plain = [block(x) for block in model.stack]
    model.train()
    changed = [[not torch.equal(block(x), y) for _ in range(200)] for block, y in zip(model.stack, plain, strict=True)]
    assert not any(changed[0]) and 60 < sum(changed[1]) < 140 and all(changed[2])
    orders = [model.stack[2].shuffle.draw(x) for _ in range(3)]
    assert all(sorted(order.tolist()) == list(range(25)) for order, _ in orders)
    assert all(torch.equal(order[inverse], torch.arange(25)) for order, inverse in orders)
    # one order by hand: what the mixer reads at place t came from order[t], and goes back there
    block, (order, inverse) = model.stack[2], orders[0]
    block.shuffle.draw = lambda _: (order, inverse)
    read = block.norm1(x)[:, order]
    expected = x + torch.empty_like(x).index_copy(1, order, block.token_mixer(read))
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x), expected)


def test_dropout_is_after_the_positions_and_in_the_mlp():
    model = small(dropout=0.4, depth=1)
    block, x = model.stack[0], torch.ones(64, 25, 8, dtype=torch.float64)
    assert torch.equal(block(x), block(x)) and torch.equal(model(images()), model(images()))
    torch.manual_seed(0)
    model.train()
    one = images(10, 1).expand(400, -1, -1, -1)
    tokens, plain = model._tokens(one), small(dropout=0.4, depth=1)._tokens(one)
    gone = tokens == 0
    assert abs(float(gone.double().mean()) - 0.4) < 0.01
    torch.testing.assert_close(tokens[~gone], plain[~gone] / 0.6)
    # with fc1 giving ones and fc2 their mean: 32 hidden units of 0.8413 / 0.6 each, kept with 0.6, then outputs alike
    with torch.no_grad():
        block.mlp.fc1.weight.zero_(), block.mlp.fc1.bias.fill_(1.0)
        block.mlp.fc2.weight.fill_(1 / 32), block.mlp.fc2.bias.zero_()
    out = block.mlp(x)
    assert abs(float((out == 0).double().mean()) - 0.4) < 0.03
    whole = out[out != 0] * 0.6
    assert float(whole.std()) > 0.05 and abs(float(whole.mean()) - 0.8413) < 0.02


def test_rotary_positions_stretch_to_a_finer_grid():
    """Every other row and column of a grid of twice the patches turns as the coarse one's do."""
    coarse, fine = (rotary_tables(n, 8, [], 4)[0] for n in (4, 8))
    torch.testing.assert_close(coarse, rotary_tables(4, 8, [])[0])
    torch.testing.assert_close(fine.view(8, 8, 4)[::2, ::2].reshape(16, 4), coarse)
    model = small(pos_embed="rope", img_size=16, rope_grid=4)
    assert model.architecture.grid == 8 and torch.equal(model.cos, fine)


def test_scan_orders_by_hand():
    assert sequence_order("snake", 3, []) == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    assert sequence_order("column", 3, []) == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert sequence_order("column", 2, [2]) == [0, 3, 2, 1, 4]  # the class token at 2 stays


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("class_token", ["middle", "double"])
def test_vim_equals_the_reference(mixer, class_token):
    model = small(name="vim_tiny", d_model=16, mixer=mixer, class_token=class_token)
    agree(model, vim=True, kind=mixer, class_token=class_token)


def test_vim_with_overlapping_patches_equals_the_reference():
    model = small(name="vim_tiny", d_model=16, patch_size=4, stride=2)
    assert model.architecture.grid == 4
    agree(model, vim=True, kind="bidirectional_shared", class_token="middle", patch=4, stride=2)


STEM_SHAPES = [("conv", stride, n) for stride in (2, 4, 8) for n in (1, 2, 3) if 2**n >= stride]
STEM_SHAPES += [("cct", 2, 1), ("cct", 4, 2), ("cct", 8, 3)]


@pytest.mark.parametrize("stem, stride, layers", STEM_SHAPES)
def test_stems_of_convolutions_equal_the_reference(stem, stride, layers):
    model = small(stem=stem, stride=stride, stem_layers=layers, patch_size=None, img_size=16, depth=1)
    assert model.pos_embed.shape == (1, (16 // stride) ** 2, 8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    agree(model, side=16, kind="forward", stem=stem, stride=stride)
    tokens = model.patch_embed(images(16))
    assert tokens.is_contiguous()  # every later tensor takes its memory order from the tokens


def test_the_conv_stem_of_earlier_versions():
    """Names, shapes and strides of the three convolutions that there were before there was a choice."""
    stem = small(stem="conv", patch_size=None, img_size=12).train().patch_embed
    assert [(n, tuple(p.shape)) for n, p in stem.named_parameters() if n.startswith("conv")] == [
        ("conv1.weight", (64, 3, 3, 3)),
        ("conv2.weight", (128, 64, 3, 3)),
        ("conv3.weight", (8, 128, 3, 3)),
    ]
    assert [m.stride[0] for m in stem.modules() if isinstance(m, nn.Conv2d)] == [1, 2, 2]
    assert {n for n, _ in stem.named_children()} == {f"{kind}{i}" for kind in ("conv", "norm") for i in (1, 2, 3)}
    tokens = stem(images(12, 16))  # normed over the batch in training
    norm = stem.norm3
    torch.testing.assert_close(tokens.flatten(0, 1).mean(0), norm.bias.expand(8), rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens.flatten(0, 1).std(0, correction=0), norm.weight.abs(), rtol=1e-3, atol=0)
    old = small(stem="conv", patch_size=None, img_size=12).architecture.to_dict()
    for key in ("stem_channels", "head"):
        del old[key]
    assert Architecture.from_dict(old).stem_channels == (64, 128) and Architecture.from_dict(old).head == "auto"


@pytest.mark.parametrize("head", ["mean", "attention"])
@pytest.mark.parametrize("class_token", ["none", "double"])
def test_heads_equal_the_reference(head, class_token):
    agree(small(head=head, class_token=class_token), kind="forward", class_token=class_token, head=head)


def test_attention_pooling_as_in_compact_transformers():
    """256 tokens of 32 pixels; the classifier reads their weighted mean; one vector of parameters more."""
    model = named_model("mamba_tiny", 10, 32, d_model=8, depth=1, stem="cct", head="attention")
    assert model.architecture.num_tokens == 256
    assert model.pool.score.weight.shape == (1, 8) and model.pool.score.bias is None
    assert model.patch_embed.conv1.weight.shape == (8, 3, 3, 3) and len(list(model.patch_embed.parameters())) == 1
    plain = named_model("mamba_tiny", 10, 32, d_model=8, depth=1, stem="cct")
    assert count_parameters(model) - count_parameters(plain) == 8


def test_shapes_that_make_no_model():
    whole = small().architecture
    for stem, stride, channels in (("conv", 3, (4, 4)), ("conv", 4, ()), ("cct", 4, ()), ("patch", 2, (4,))):
        with pytest.raises(ValueError, match=f"{stem} stem of . |inner channels"):
            MambaModel(replace(whole, img_size=24, stem=stem, patch_size=stride, stride=stride, stem_channels=channels))
    with pytest.raises(ValueError, match="img_size 10 is not divisible by patch_size 4"):
        MambaModel(replace(whole, patch_size=4, stride=4))
    with pytest.raises(ValueError, match="patches of 4 every 5 pixels do not fill img_size 10"):
        MambaModel(replace(whole, patch_size=4, stride=5))
    with pytest.raises(ValueError, match="needs dt_rank"):
        MambaModel(replace(whole, blocks=(replace(whole.blocks[0], learned_dt_bias=True),)))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ["mamba_tiny", "vim_tiny"])
def test_every_parameter_gets_gradient(mixer, name):
    model = small(name=name, d_model=16, mixer=mixer, class_token="double", pos_embed="both", scan_order="snake")
    model(images()).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


def test_both_directions_see_the_whole_sequence():
    """The first token's output depends on the last token, and in one direction it does not."""
    for mixer, sees in (("forward", False), ("bidirectional", True), ("bidirectional_shared", True)):
        ssm = small(mixer=mixer).stack[0].token_mixer
        x = torch.randn(1, 12, 8, dtype=torch.float64)
        later = x.clone()
        later[:, -1] += 1
        assert bool((ssm(later)[:, 0] - ssm(x)[:, 0]).abs().max() > 1e-9) == sees


VARIANTS = (
    {},
    {"mixer": "bidirectional", "stem": "conv", "patch_size": None, "img_size": 8},
    {"mixer": "multiscale", "class_token": "double", "pos_embed": "both", "scan_order": "column"},
    {"stem": "cct", "patch_size": None, "stem_layers": 2, "img_size": 8, "head": "attention"},
    {"name": "vim_tiny", "pos_embed": "rope"},
    {"mixer": "cross", "depth": 4, "class_token": "middle", "layer_shuffle": 0.5},
    {"name": "vim_tiny", "patch_size": 4, "stride": 2, "class_token": "start", "scan_order": "snake"},
)


@pytest.mark.parametrize("options", VARIANTS)
def test_checkpoints_rebuild_the_model(options, tmp_path):
    model = small(**options).float()
    save_checkpoint(tmp_path / "here", model, None, {}, None)
    again, _ = load_model(tmp_path / "here")
    x = images(model.base.img_size).float()
    assert again.architecture == model.architecture and torch.equal(again(x), model(x))
    assert list(again.state_dict()) == list(model.state_dict())


def test_a_description_from_before_the_family_still_builds():
    block = {"d_inner": 24, "d_state": 4, "d_conv": 4, "mlp_hidden": 48, "out_channels": None, "dt_rank": None}
    old = {
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 3,
        "num_classes": 5,
        "d_model": 12,
        "drop_path": 0.0,
        "blocks": [block | {"shared_bc": False, "separable_conv": False}] * 2,
    }
    model = MambaModel(Architecture.from_dict(old))
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 5)
    assert "blocks.1.ssm.delta_bias" in model.state_dict() and "patch_embed.weight" in model.state_dict()


@pytest.mark.parametrize("options", [{"mixer": m} for m in MIXERS] + list(VARIANTS))
def test_macs_count_the_matrix_products(options, monkeypatch):
    """Against torch's own counter; scans and depthwise convolutions, which it misses, are added by hand."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr("mamba.models.ssm.selective_scan", lambda u, *args, **more: u)
    monkeypatch.setattr("mamba.models.ssm.bidirectional_scan", lambda u, *args, **more: u)
    model = small(**options).float()
    a = model.architecture
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(a.img_size, 1).float())
    scales = {"multiscale": (1, 2, 4), "bidirectional": (1, 1), "bidirectional_shared": (1, 1)}
    steps = sum(math.ceil(a.num_tokens / scale) for scale in scales.get(a.blocks[0].mixer, (1,)))
    by_hand = len(a.blocks) * steps * a.blocks[0].d_inner * (3 * a.blocks[0].d_state + 2 + a.blocks[0].d_conv)
    by_hand += a.num_tokens * a.d_model * (a.head == "attention")  # the weighted mean
    assert a.macs() == counter.get_total_flops() // 2 + by_hand


@pytest.mark.parametrize("options", VARIANTS)
def test_compiles_without_a_graph_break(options):
    model = small(**{**options, "depth": 1}).float()
    x = images(model.base.img_size).float()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_directions_and_shuffles_compile_in_training():
    """Forwards and backwards: a permutation's own gradient too."""
    model = small(mixer="cross", depth=4, layer_shuffle=1.0, mlp_ratio=0).float().train()
    block, x = model.stack[3], torch.randn(2, 25, 8, requires_grad=True)
    order = torch.randperm(25)
    block.shuffle.draw = lambda _: (order, order.argsort())
    (expected,) = torch.autograd.grad(block(x, None, model.transposition).square().sum(), x)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(x, None, model.transposition).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_optimizer_groups_of_a_vim():
    model = small(name="vim_tiny", class_token="double", mixer="multiscale")
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, 0.05, 0.5)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    scale = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    assert len(scale) == len(names)
    assert not any("_log" in n or "cls_token" in n or "embed" in n or "norm" in n or "bias" in n for n in decayed)
    assert {"layers.0.mixer.x_proj_4.weight", "layers.1.mixer.dt_proj_2.weight", "head.weight"} <= decayed
    assert scale["cls_token_tail"] == scale["pos_embed"] == 0.25 and scale["layers.0.mixer.D_2"] == 0.5


def test_the_configs_choices_are_the_registries():
    for key, registry in (("stem", STEMS), ("head", HEADS), ("mixer", REGISTRY)):
        annotation = ModelConfig.model_fields[key].annotation
        choices = {c for part in (get_args(annotation) or ()) for c in (get_args(part) or (part,))} - {type(None)}
        assert choices == set(registry), key


@pytest.mark.parametrize("positions, stem", [("learned", "patch"), ("none", "patch"), ("none", "cct")])
def test_the_residual_stream_is_float32_under_autocast(positions, stem):
    model, seen = small(pos_embed=positions, stem=stem, head="attention").float(), []
    model.stack[0].register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images().float())
    assert [x.dtype for x in seen] == [torch.float32] * 2


def test_class_tokens_start_like_positions():
    torch.manual_seed(0)
    model = named_model("mamba_tiny", 10, 32, d_model=2000, depth=1, d_state=1, expand=0.01, class_token="double")
    for token in (model.cls_token_head, model.cls_token_tail):
        assert 0.015 < float(token.std()) < 0.025
