"""Masked is shrunk, for every component and granularity and in combination; counts are exact; nothing is aliased."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamba.errors import ConfigError
from mamba.models.model import MambaModel, count_parameters, mamba_small
from mamba.models.ssm import DIRECTIONS, MIXERS, BlockShape
from pruning import (
    COMPONENTS,
    apply_mask_mamba,
    check_sparsity_mamba,
    extract_mask_mamba,
    load_masks,
    prune_component,
    prune_mamba_structured,
    prune_mamba_unstructured,
    prune_multiple,
    save_masks,
    verify_selective_scan_compatibility,
)
from pruning.components import ELEMENT, GROUPS, blocks_of, covered, units_of
from pruning.cut import cut
from pruning.importance import SCORES, element_scores, unit_scores
from pruning.masks import combine
from pruning.shrink import shrink
from tests.pruning.small_models import FAMILY, build

STRUCTURED = [
    (name, granularity)
    for name, component in COMPONENTS.items()
    for granularity in component.granularities
    if granularity not in (ELEMENT, "rank") and name != "stem"  # patches have no inner channels
]


def batches(classes=3, seed=3):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 6, 3, 8, 8, dtype=torch.float64, generator=generator)
    return [(x, torch.randint(classes, (6,), generator=generator)) for x in images]


def close(a, b):
    return float((a - b).detach().abs().max()) < 1e-9  # float64: the 1e-5 with room


# --- exact counts ----------------------------------------------------------------------------------------------------


def test_half_of_the_neurons_of_mamba_small_leave_exactly_this_many_parameters():
    model = mamba_small()
    assert count_parameters(prune_mamba_structured(model, {"mlp": 0.5}, scope="global", score="l1")) == 12_940_234
    assert count_parameters(model) == 16_488_394


@pytest.mark.parametrize("name, granularity", [s for s in STRUCTURED if s[1] in COMPONENTS[s[0]].groups])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5])
def test_a_rate_takes_exactly_its_share_of_units(model, name, granularity, rate):
    smaller = prune_component(model, name, rate, granularity, shrink=True)
    if granularity == "depth":
        assert len(blocks_of(smaller)) == 3 - round(3 * rate)
        return
    group = GROUPS[COMPONENTS[name].groups[granularity]]
    before, after = (sum(units_of(b, group) for b in blocks_of(m)) for m in (model, smaller))
    assert before - after == round(rate * before)


@pytest.mark.parametrize("name", [n for n, c in COMPONENTS.items() if c.covers])
@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_a_rate_takes_exactly_its_share_of_elements(model, name, scope):
    pruned = prune_component(model, name, 0.37, scope=scope)
    values = [p[rows] for _, p, rows in covered(pruned, name)]
    sizes = [v.numel() for v in values]
    zeros = [int((v == 0).sum()) for v in values]
    if scope == "global":
        assert sum(zeros) == round(0.37 * sum(sizes))
    else:
        assert zeros == [round(0.37 * n) for n in sizes]
    assert check_sparsity_mamba(pruned)[name] == pytest.approx(100 * sum(zeros) / sum(sizes))
    untouched = {n for n, p in model.named_parameters()} - {n for n, _, _ in covered(model, name)}
    assert all(torch.equal(dict(model.named_parameters())[n], dict(pruned.named_parameters())[n]) for n in untouched)


def test_the_least_important_units_go():
    model = build()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight[3] *= 0.01
            block.mlp.fc1.bias[3] *= 0.01
            block.mlp.fc2.weight[:, 3] *= 0.01
    smaller = prune_component(model, "mlp", 3 / 42, "neuron", shrink=True)
    for block, old in zip(smaller.blocks, model.blocks, strict=True):
        stay = [i for i in range(14) if i != 3]
        assert torch.equal(block.mlp.fc1.weight, old.mlp.fc1.weight[stay])
        assert torch.equal(block.mlp.fc2.weight, old.mlp.fc2.weight[:, stay])


def test_the_earliest_taps_go(model):
    smaller = prune_component(model, "conv1d", 0.5, "width", shrink=True)
    assert torch.equal(smaller.blocks[0].ssm.conv1d.weight, model.blocks[0].ssm.conv1d.weight[..., 2:])


def test_single_layers_can_be_cut(model):
    smaller = prune_component(model, "mlp", 0.5, "neuron", shrink=True, layers=[1])
    assert [b.mlp_hidden for b in smaller.architecture.blocks] == [14, 7, 14]
    pruned = prune_component(model, "linear_out", 0.5, layers=[2])
    zeros = [int((b.ssm.out_proj.weight == 0).sum()) for b in pruned.blocks]
    assert zeros == [0, 0, 60]


def test_a_rate_beyond_the_floor_is_refused(model):
    with pytest.raises(ConfigError, match="takes 14 of 15 states and a floor of 1 in each layer leaves 12"):
        prune_component(model, "linear_B_C", 0.9, "state")
    with pytest.raises(ConfigError, match="floor of 9"):
        prune_component(model, "mlp", 0.5, "neuron", floor=9)


# --- masked is shrunk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, granularity", STRUCTURED)
@pytest.mark.parametrize("score", ["l1", "wanda"])
def test_masked_and_shrunk_compute_the_same(model, images, name, granularity, score):
    calibration = batches()
    masked = prune_component(model, name, 0.5, granularity, score=score, calibration=calibration)
    smaller = prune_component(model, name, 0.5, granularity, shrink=True, score=score, calibration=calibration)
    assert close(masked(images), smaller(images))
    verify_selective_scan_compatibility(smaller)
    if granularity not in ("low_rank", "shared", "separable"):
        assert not close(masked(images), model(images)), "nothing was cut"
        assert count_parameters(smaller) < count_parameters(model)


def can_be_cut(model, name, granularity):
    """Whether a model has what a cut is of: a Vim has no MLP and is of low rank already, the others have no rank."""
    shape = model.architecture.blocks[0]
    if granularity in ("rank", "low_rank"):
        return (granularity == "rank") == (shape.dt_rank is not None)
    if name == "stem":
        return bool(model.architecture.stem_channels)
    return name != "mlp" or shape.mlp_hidden > 0


@pytest.mark.parametrize("name, granularity", [*STRUCTURED, ("linear_delta", "rank"), ("stem", "channel")])
def test_masked_and_shrunk_compute_the_same_for_every_kind_of_model(member, images, name, granularity):
    if not can_be_cut(member, name, granularity):
        with pytest.raises(ConfigError, match="has a neuron|low rank already|has a rank|no inner channels"):
            prune_component(member, name, 0.5, granularity)
        return
    masked = prune_component(member, name, 0.5, granularity)
    smaller = prune_component(member, name, 0.5, granularity, shrink=True)
    assert close(masked(images), smaller(images))
    verify_selective_scan_compatibility(smaller)
    rebuilt = MambaModel(smaller.architecture).double().eval()
    rebuilt.load_state_dict(smaller.state_dict())
    assert close(rebuilt(images), smaller(images))
    if granularity not in ("low_rank", "shared", "separable"):
        assert not close(masked(images), member(images)), "nothing was cut"
        assert count_parameters(smaller) < count_parameters(member)
        assert extract_mask_mamba(member) == {}
        found = shrink(masked, extract_mask_mamba(masked)).model
        assert found.architecture == smaller.architecture and close(found(images), smaller(images))


def test_components_that_a_model_does_not_have(images):
    vim = FAMILY["vim"]()
    for cut_it in (prune_component, prune_mamba_unstructured):
        arguments = ("mlp", 0.5) if cut_it is prune_component else ({"mlp": 0.5},)
        with pytest.raises(ConfigError, match="no block to be cut has a weight of component 'mlp'"):
            cut_it(vim, *arguments)


ALL = {
    "mlp:neuron": 0.6,
    "linear_out:output": 0.5,
    "linear_gate:channel": 0.3,
    "linear_B_C:state": 0.4,
    "conv1d:separable": 0.5,
    "linear_delta:low_rank": 0.4,
    "block": 0.34,
    "linear_gate:element": 0.5,
}


def test_all_at_once_and_in_any_order(model, images):
    masked, smaller = cut(model, ALL), cut(model, ALL, shrink=True)
    assert close(masked.model(images), smaller.model(images))
    again = prune_multiple(model, dict(reversed(ALL.items())), shrink=True)
    assert again.architecture == smaller.model.architecture
    shape = smaller.model.architecture.blocks[0]
    assert shape.separable_conv and shape.dt_rank and shape.out_channels and len(smaller.model.blocks) == 2
    later = shrink(masked.model, masked.masks)  # masks first, smaller at leisure
    assert close(later.model(images), smaller.model(images))


def test_a_shrunk_model_can_be_cut_again(uneven, images):
    first = prune_multiple(uneven, {"mlp:neuron": 0.4, "linear_in:expand": 0.3, "linear_out:output": 0.3}, shrink=True)
    assert close(first(images), prune_multiple(uneven, {"mlp:neuron": 0.4, "linear_in:expand": 0.3,
                                                        "linear_out:output": 0.3})(images))  # fmt: skip
    second = cut(first, {"linear_delta:rank": 0.4, "linear_out:output": 0.5, "linear_B_C:state": 0.2})
    assert close(second.model(images), shrink(second.model, second.masks).model(images))


def shape_of(learned_dt_bias, dt_rank, **widths):
    """A learned bias belongs to a low rank."""
    return BlockShape(learned_dt_bias=learned_dt_bias and dt_rank is not None, dt_rank=dt_rank, **widths)


shapes = st.builds(
    shape_of,
    d_inner=st.integers(2, 9),
    d_state=st.integers(1, 5),
    d_conv=st.integers(1, 4),
    mlp_hidden=st.integers(2, 9) | st.just(0),
    out_channels=st.none() | st.integers(2, 6),
    dt_rank=st.none() | st.integers(1, 4),
    shared_bc=st.booleans(),
    separable_conv=st.booleans(),
    mixer=st.sampled_from(list(MIXERS)),
    direction=st.sampled_from(list(DIRECTIONS)),
    learned_dt_bias=st.booleans(),
)
choices = st.fixed_dictionaries(
    {
        "names": st.sampled_from(["mamba", "vim"]),
        "norm": st.sampled_from(["layer", "rms"]),
        "class_token": st.sampled_from(["none", "start", "middle", "double"]),
        "pos_embed": st.sampled_from(["learned", "rope", "both", "none"]),
        "head": st.sampled_from(["auto", "mean", "attention"]),
        "scan_order": st.sampled_from(["raster", "snake", "column"]),
    }
)
stems = st.sampled_from([("patch", ()), ("conv", (3, 5)), ("conv", (4,)), ("cct", (4,))])
TARGETS = (
    *("mlp:neuron", "linear_out:channel", "linear_out:output", "linear_in:expand", "linear_B_C:state"),
    *("conv1d:width", "linear_delta:rank", "block:depth", "mlp:element", "linear_in:element", "conv1d:element"),
    "stem:channel",
)
targets = st.dictionaries(st.sampled_from(TARGETS), st.floats(0, 0.9), min_size=1, max_size=5)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(shapes, min_size=1, max_size=3),
    choices,
    stems,
    targets,
    st.sampled_from(tuple(SCORES)),
    st.sampled_from(["global", "layerwise"]),
)
def test_masked_is_shrunk_for_any_model_and_any_cut(images, shapes, choices, stem, rates, score, scope):
    model = build(*shapes, d_model=8, stem=stem[0], stem_channels=stem[1], **choices)
    if not stem[1]:
        rates = {k: v for k, v in rates.items() if k != "stem:channel"}
    if not any(b.dt_rank for b in shapes):
        rates = {k: v for k, v in rates.items() if k != "linear_delta:rank"}
    if not any(b.mlp_hidden for b in shapes):
        rates = {k: v for k, v in rates.items() if not k.startswith("mlp:")}
    before = copy.deepcopy(model.state_dict())
    try:
        masked = cut(model, rates, score=score, scope=scope, calibration=batches())
    except ConfigError:  # what is beyond the floor: test_select.py
        return
    smaller = cut(model, rates, shrink=True, score=score, scope=scope, calibration=batches())
    assert close(masked.model(images), smaller.model(images))
    verify_selective_scan_compatibility(smaller.model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the argument was changed"
    again = copy.deepcopy(masked.model)
    apply_mask_mamba(again, masked.masks)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in masked.model.state_dict().items())


# --- masks -----------------------------------------------------------------------------------------------------------


def test_masks_compose_and_travel(model, tmp_path):
    a = prune_mamba_unstructured(model, {"mlp": 0.5})
    b = prune_mamba_unstructured(model, {"mlp": 0.4, "conv1d": 0.5}, score="random", seed=1)
    both = combine(a, b)
    assert set(both) == set(a) | set(b)
    assert all(torch.equal(both[n], a.get(n, torch.tensor(True)) & b.get(n, torch.tensor(True))) for n in both)
    before = os.umask(0o022)
    try:
        save_masks(tmp_path / "masks.safetensors", both)
    finally:
        os.umask(before)
    assert (tmp_path / "masks.safetensors").stat().st_mode & 0o777 == 0o644
    back = load_masks(tmp_path / "masks.safetensors")
    assert set(back) == set(both) and all(torch.equal(back[n], both[n]) for n in both)


@pytest.mark.parametrize("name, granularity", [(n, g) for n, c in COMPONENTS.items() for g in (ELEMENT, *c.groups)
                                               if g in c.granularities and g != "rank" and n != "stem"])  # fmt: skip
def test_masks_are_read_off_a_pruned_model(model, images, name, granularity):
    pruned = cut(model, {f"{name}:{granularity}": 0.5})
    found = extract_mask_mamba(pruned.model)
    restored = copy.deepcopy(model)
    apply_mask_mamba(restored, found)
    assert close(restored(images), pruned.model(images))
    assert extract_mask_mamba(model) == {}
    assert close(shrink(restored, found).model(images), pruned.model(images))
    if granularity != ELEMENT:
        assert shrink(restored, found).model.architecture == shrink(pruned.model, pruned.masks).model.architecture


def test_masks_that_do_not_fit_change_nothing(model):
    before = copy.deepcopy(model.state_dict())
    good = prune_mamba_unstructured(model, {"mlp": 0.5})
    for bad, words in (
        ({"blocks.9.mlp.fc1.weight": torch.ones(2, dtype=torch.bool)}, "no parameter"),
        ({"blocks.0.mlp.fc1.weight": torch.ones(2, dtype=torch.bool)}, "valid: torch.bool of shape"),
        ({"blocks.0.mlp.fc1.bias": torch.ones(14)}, "torch.float32 of shape"),
    ):
        with pytest.raises(ConfigError, match=words):
            apply_mask_mamba(model, {**good, **bad})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_by_hand(model):
    p = dict(model.named_parameters())
    name = "blocks.1.mlp.fc1.weight"
    assert torch.equal(element_scores(model, "l1")[name], p[name].detach().abs().float())
    l2 = unit_scores(model, "mlp_hidden", element_scores(model, "l2"), "l2")[1]
    mlp = model.blocks[1].mlp
    expected = torch.cat((mlp.fc1.weight, mlp.fc1.bias[:, None], mlp.fc2.weight.T), 1).norm(dim=1)
    torch.testing.assert_close(l2, expected.detach(), rtol=1e-6, atol=0)
    calibration = batches()
    loss = sum(torch.nn.functional.cross_entropy(model(x).float(), y) for x, y in calibration)
    gradient = torch.autograd.grad(loss, p[name])[0]
    torch.testing.assert_close(
        element_scores(model, "taylor", calibration)[name], (p[name] * gradient).detach().abs().float()
    )
    assert all(q.grad is None for q in model.parameters())


def test_wanda_weighs_by_the_inputs_a_weight_meets(model):
    calibration = batches()
    seen = []
    handle = model.blocks[2].ssm.x_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    for x, _ in calibration:
        model(x)
    handle.remove()
    rms = torch.cat(seen).square().mean(0).sqrt()
    weight = model.blocks[2].ssm.x_proj.weight
    found = element_scores(model, "wanda", calibration)["blocks.2.ssm.x_proj.weight"]
    torch.testing.assert_close(found, (weight.abs() * rms).detach().float(), rtol=1e-5, atol=1e-7)
    conv = element_scores(model, "wanda", calibration)["blocks.2.ssm.conv1d.weight"]
    assert conv.shape == (12, 1, 4) and bool((conv > 0).all())


def test_random_scores_are_random_and_reproducible(model):
    a, b, c = (prune_mamba_unstructured(model, {"mlp": 0.5}, score="random", seed=s) for s in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a) and not all(torch.equal(a[n], c[n]) for n in a)


# --- the checker checks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", ["D", "A_log", "delta_bias"])
def test_incompatible_widths_are_named(model, tensor):
    verify_selective_scan_compatibility(model)
    ssm = model.blocks[1].ssm
    whole = getattr(ssm, tensor)
    cut_short = whole.detach()[:-1].clone()
    setattr(ssm, tensor, torch.nn.Parameter(cut_short) if tensor != "delta_bias" else cut_short)
    with pytest.raises(ConfigError, match=r"block 1: .*(channels and d_inner is|has \d+ rows)"):
        verify_selective_scan_compatibility(model)


def test_low_rank_is_the_best_of_its_rank_and_saves_what_it_says(model):
    smaller = prune_component(model, "linear_delta", 0.4, "low_rank", shrink=True)
    ssm = smaller.blocks[0].ssm
    full = model.blocks[0].ssm.x_proj.weight[10:]
    assert ssm.dt_proj.weight.shape == (12, 4)  # 6 ranks cost what 12 x 12 costs, round(0.4 x 6) = 2 go
    product = ssm.dt_proj.weight @ ssm.x_proj.weight[10:]
    singular = torch.linalg.svdvals(full)
    torch.testing.assert_close((full - product).norm(), singular[4:].norm())
    with pytest.raises(ConfigError, match="of low rank already"):
        prune_component(smaller, "linear_delta", 0.4, "low_rank")


def test_what_is_not_there_cannot_be_cut(model):
    with pytest.raises(ConfigError, match="no block to be cut has a rank"):
        prune_component(model, "linear_delta", 0.3, "rank")


def test_sharing_takes_half_or_nothing(model):
    with pytest.raises(ConfigError, match="exactly half"):
        prune_component(model, "linear_B_C", 0.3, "shared")
    smaller = prune_component(model, "linear_B_C", 0.5, "shared", shrink=True)
    assert count_parameters(model) - count_parameters(smaller) == 3 * 5 * 12


@pytest.mark.parametrize(
    "rates",
    [
        {"conv1d:width": 0.5, "conv1d:separable": 0.5},
        {"conv1d:element": 0.5, "conv1d:separable": 0.5},
        {"linear_B_C:element": 0.5, "linear_B_C:shared": 0.5},
        {"linear_delta:element": 0.5, "linear_delta:low_rank": 0.4},
        {"linear_B_C:element": 0.5, "linear_delta:low_rank": 0.4},
    ],
)
def test_a_replacement_beside_a_cut_of_the_same_tensor_is_refused(model, rates):
    for smaller in (False, True):
        with pytest.raises(ConfigError, match="the second rewrites it; cut one, then the other"):
            prune_multiple(model, rates, shrink=smaller)


def test_new_tensors_of_a_replacement_are_masked_with_their_channels(model):
    result = cut(model, {"linear_in:expand": 0.4, "conv1d:separable": 0.5, "linear_delta:low_rank": 0.4})
    for i, block in enumerate(result.model.blocks):
        gone = ~result.masks[f"blocks.{i}.ssm.D"]
        pointwise = result.masks[f"blocks.{i}.ssm.pointwise.weight"]
        assert bool(gone.any()) and not pointwise[gone].any() and not pointwise[:, gone].any()
        rows = block.ssm.x_proj.weight[10:][gone]
        assert bool((rows == 0).all()), "the rewritten rows of a masked channel are not zero"


def test_masks_that_were_there_before_stay(model, images):
    first = cut(model, {"mlp:element": 0.5, "linear_out:element": 0.6})
    second = cut(first.model, {"mlp:neuron": 0.4, "linear_in:expand": 0.3}, shrink=True, masks=first.masks)
    masked = cut(first.model, {"mlp:neuron": 0.4, "linear_in:expand": 0.3}, masks=first.masks)
    assert close(second.model(images), masked.model(images))
    for name, p in second.model.named_parameters():
        if name.endswith(("fc1.weight", "fc2.weight", "out_proj.weight")):
            assert torch.equal(second.masks[name], p != 0), "zeros that no mask holds"


def test_state_of_a_rewritten_tensor_is_not_made_up(model):
    from mamba.train.ema import ModelEma
    from pruning.shrink import shrink_ema

    for target in ("linear_delta:low_rank", "conv1d:separable", "linear_B_C:shared"):
        result = cut(model, {target: 0.5}, shrink=True)
        with pytest.raises(ConfigError, match="was rewritten by a replacement"):
            shrink_ema(ModelEma(model, 0.9), result)


def test_an_average_is_zero_where_masks_are_left(model):
    from mamba.train.ema import ModelEma
    from pruning.shrink import shrink_ema

    result = cut(model, {"mlp:neuron": 0.3, "linear_gate:element": 0.5}, shrink=True)
    ema = shrink_ema(ModelEma(model, 0.9), result)  # the average knows of no mask
    for name, keep in result.masks.items():
        assert bool((dict(ema.model.named_parameters())[name][~keep] == 0).all())


def test_rounding_keeps_the_floor_and_does_not_undo_a_cut(model):
    rounded = prune_mamba_structured(model, {"mlp": 0.3}, floor=9, multiple=4)
    widths = [b.mlp_hidden for b in rounded.architecture.blocks]
    assert min(widths) >= 9 and all(w % 4 == 0 or w == 14 for w in widths)
    with pytest.raises(ConfigError, match="rounding to multiple 8 keeps all states"):
        prune_mamba_structured(model, {"linear_B_C": 0.4}, multiple=8)
    taps = prune_mamba_structured(model, {"conv1d": 0.5}, multiple=8)
    assert {b.d_conv for b in taps.architecture.blocks} == {2}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"layers": []}, "layers is empty"),
        ({"scop": "global"}, "unknown option 'scop'; valid: scope, score"),
        ({"multiple": 0}, "floor and multiple must be at least 1"),
    ],
)
def test_options_that_mean_nothing(model, options, words):
    with pytest.raises(ConfigError, match=words):
        prune_component(model, "mlp", 0.5, **options)


@pytest.mark.parametrize("target, rate", [("linear_delta:low_rank", 0.95), ("conv1d:separable", 0.9)])
def test_replacements_that_would_leave_nothing_are_refused(model, target, rate):
    with pytest.raises(ConfigError, match=r"leaves (no rank|none of 4 taps)"):
        prune_multiple(model, {target: rate})


def test_layers_limit_replacements_too(model):
    smaller = prune_component(model, "linear_delta", 0.5, "low_rank", shrink=True, layers=[2])
    assert [b.dt_rank for b in smaller.architecture.blocks] == [None, None, 3]
