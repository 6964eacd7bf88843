"""The three stages, and the small model that takes over the best of a large one."""

from __future__ import annotations

import pytest
import torch

from mamba.errors import ConfigError
from mamba.models.model import count_parameters, mamba_small
from pruning import (
    PLANS,
    apply_plan,
    build_mamba_lite,
    check_sparsity_mamba,
    prune_multiple,
    transfer_pruned_weights,
)
from pruning.importance import element_scores, unit_scores
from pruning.lite import describe
from tests.pruning.small_models import PLAIN, build, turns


def test_the_lite_model_of_mamba_small():
    model = mamba_small()
    lite = build_mamba_lite(model)
    assert describe(lite.architecture) == "16 blocks, d_inner 192, d_state 8, d_conv 2, mlp_hidden 384"
    per_block = 3 * 192 * 192 + 192 * 3 + (192 + 16) * 192 + 192 * 8 + 192 + (2 * 384 * 192 + 384 + 192) + 4 * 192
    fixed = 3 * 16 * 192 + 192 + 64 * 192 + 2 * 192 + 192 * 10 + 10
    assert count_parameters(lite) == 16 * per_block + fixed
    taken = transfer_pruned_weights(model, lite)
    assert len(taken) == 16 and torch.equal(lite.head.weight, model.head.weight)


def test_the_most_important_parts_are_taken_over():
    model = build(*[PLAIN] * 4)
    lite = build_mamba_lite(model, expand=0.8, d_conv=2, d_state=3, mlp_ratio=0.7, depth=2)
    taken = transfer_pruned_weights(model, lite)
    scores = element_scores(model)
    blocks = torch.cat(unit_scores(model, "block", scores))
    assert taken == sorted(blocks.topk(2).indices.tolist())
    neurons = unit_scores(model, "mlp_hidden", scores)[taken[1]].topk(7).indices.sort().values
    assert torch.equal(lite.blocks[1].mlp.fc2.weight, model.blocks[taken[1]].mlp.fc2.weight[:, neurons])
    assert torch.equal(lite.pos_embed, model.pos_embed)


def test_blocks_that_are_taken_over_keep_their_direction(images):
    model = build(*turns("cross", 4))
    with torch.no_grad():
        for i in (0, 2):
            for parameter in model.blocks[i].parameters():
                parameter.mul_(0.1)
    lite = build_mamba_lite(model, expand=1.2, d_conv=4, d_state=5, mlp_ratio=1.4, depth=2)
    assert [b.direction for b in lite.architecture.blocks] == ["forward", "backward"]
    assert transfer_pruned_weights(model, lite) == [1, 3]
    assert [b.direction for b in lite.architecture.blocks] == ["backward", "across_backward"]
    cut = prune_multiple(model, {"block": 0.5}, shrink=True)
    assert cut.architecture == lite.architecture and torch.equal(lite(images), cut(images))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"depth": 4}, "depth 4 .* valid: 1 to 3"),
        ({"d_state": 6}, "d_state 6"),
        ({"expand": 2.0}, "d_inner 20"),
        ({"mlp_ratio": 0.01}, "mlp_hidden 0"),
    ],
)
def test_a_larger_lite_model_is_refused(model, values, words):
    with pytest.raises(ConfigError, match=words):
        build_mamba_lite(model, **{"expand": 1.0, "d_state": 2, "depth": 2, "mlp_ratio": 1.0, **values})


def test_a_model_that_lost_more_than_widths_is_refused(model):
    for target in ("linear_delta:low_rank", "linear_B_C:shared", "linear_out:output"):
        other = prune_multiple(model, {target: 0.5}, shrink=True)
        with pytest.raises(ConfigError, match="was cut already"):
            build_mamba_lite(other, expand=0.5, d_state=2, depth=2, mlp_ratio=0.5)


@pytest.mark.parametrize("depth, kept", [(24, 16), (12, 8), (4, 3), (1, 1)])
def test_the_third_stage_keeps_two_thirds_of_any_depth(depth, kept):
    model = mamba_small(depth=depth, d_model=16)
    assert len(build_mamba_lite(model).stack) == kept
    result = apply_plan(model, "stage3")
    assert (result.record.total("block:depth").before, len(result.model.stack)) == (depth, kept)


def test_the_second_stage_has_both_forms():
    model = mamba_small(depth=2, d_model=16)
    by_input, by_output = (apply_plan(model, name).model.architecture.blocks[0] for name in ("stage2", "stage2_output"))
    assert (by_input.d_inner, by_input.out_channels) == (16, None)
    assert (by_output.d_inner, by_output.out_channels) == (24, 8)


def test_stages():
    model = mamba_small(depth=16, d_model=16)
    for name in PLANS:
        torch.manual_seed(0)
        result = apply_plan(model, name)
        assert result.model(torch.randn(2, 3, 32, 32)).isfinite().all()
        sparsity = check_sparsity_mamba(result.model)
        if name == "stage1":
            assert [round(sparsity[n]) for n in ("linear_out", "mlp", "linear_gate")] == [70, 70, 70]
            assert count_parameters(result.model) == count_parameters(model)
        if name == "stage2":
            shapes = set(result.model.architecture.blocks)
            assert len(shapes) == 1 and all(s.d_inner % 8 == 0 and s.mlp_hidden % 8 == 0 for s in shapes)
            assert set(result.masks) == {f"blocks.{i}.ssm.in_proj.weight" for i in range(16)}
            (shape,) = shapes  # of 32 channels half; of 64 neurons 45 go and 19 are rounded to 16
            assert (shape.d_inner, shape.mlp_hidden, shape.d_state) == (16, 16, 16)
    with pytest.raises(ConfigError, match="unknown plan 'stage4'; valid: stage1, stage2, stage2_output, stage3"):
        apply_plan(model, "stage4")


def test_every_kind_of_model_has_a_lite_one(member, images):
    lite = build_mamba_lite(member, expand=0.5, d_conv=2, d_state=3, mlp_ratio=0.5, depth=2)
    assert lite.architecture.names == member.architecture.names
    assert {b.mixer for b in lite.architecture.blocks} == {member.architecture.blocks[0].mixer}
    taken = transfer_pruned_weights(member, lite)
    assert len(taken) == 2 and lite.eval()(images).isfinite().all()


@pytest.mark.parametrize("plan", ["stage1", "stage2"])
def test_plans_leave_out_what_a_model_does_not_have(member, images, plan):
    result = apply_plan(member, plan)
    assert result.model.eval()(images).isfinite().all()
    before, after = member.architecture.blocks[0], result.model.architecture.blocks[0]
    assert (after.mlp_hidden < before.mlp_hidden) == (plan == "stage2" and before.mlp_hidden > 0)
