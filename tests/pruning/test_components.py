"""The table against the model: what is coupled is complete, what is refused is refused, and words are checked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mamba.errors import ConfigError
from mamba.models.model import mamba_tiny
from mamba.models.ssm import MIXERS, Mixer, ScanPath
from pruning import COMPONENTS, get_prunable_layers, is_mamba_model, prune_component, prune_mamba_unstructured
from pruning.components import GROUPS, blocks_of, parse_target, parts_of, tensors_of, units_of
from pruning.refill import MATRICES


def check_every_axis(model):
    """No width of a mixer or an MLP can change without the table knowing: d_model alone is in no group."""
    d_model = model.architecture.d_model
    for block in blocks_of(model):
        accounted = {}
        for group in GROUPS.values():
            for part, _, span in parts_of(block, group):
                accounted.setdefault((part.tensor, part.axis), []).append(span.stop - span.start)
        for name, tensor in tensors_of(block).items():
            if not name.startswith((f"{block.mixer_name}.", "mlp.")) or name == "mlp.fc2.bias":
                continue
            for axis, size in enumerate(tensor.shape):
                single = ".conv1d" in name and axis == 1
                if size == d_model and name.split(".")[1] in ("in_proj", "fc1", "out_proj", "fc2"):
                    continue
                assert single or sum(accounted[name, axis]) == size, (name, axis)


def check_units(model):
    """A group has equally many units in all of its parts."""
    for block in blocks_of(model):
        for group in GROUPS.values():
            sizes = {span.stop - span.start for _, _, span in parts_of(block, group)}
            assert len(sizes) <= 1 and units_of(block, group) == max(sizes, default=0)


def test_the_table_is_complete(uneven):
    check_every_axis(uneven)
    check_units(uneven)


def test_the_table_is_complete_for_every_kind_of_model(member):
    check_every_axis(member)
    check_units(member)


def test_a_mixer_that_is_added_late_is_cut_like_the_others(monkeypatch):
    """A suffix that no shipped mixer has was not seen: a cut ended in a size mismatch, or left the path out."""
    monkeypatch.setitem(MIXERS, "late", Mixer((ScanPath(), ScanPath("_c", reverse=True))))
    model = mamba_tiny(depth=2, d_model=16, d_state=4, mixer="late", img_size=8, num_classes=3)
    check_every_axis(model)
    check_units(model)
    assert any("x_proj_c" in name for name in get_prunable_layers(model)["linear_B_C"])
    x = torch.randn(2, 3, 8, 8)
    masked, smaller = (prune_component(model, "linear_out", 0.5, "channel", shrink=s).eval() for s in (False, True))
    torch.testing.assert_close(smaller(x), masked(x))
    assert smaller.blocks[0].shape.d_inner < model.blocks[0].shape.d_inner


def test_refill_rows_are_part_of_their_groups():
    for group, parts in MATRICES.items():
        assert {(p.tensor, p.axis, p.segment) for p in parts} <= {
            (p.tensor, p.axis, p.segment) for p in GROUPS[group].parts
        }


def test_every_kind_is_a_mamba_model_and_names_its_parameters(member):
    assert is_mamba_model(member)
    names = dict(member.named_parameters())
    for component, found in get_prunable_layers(member).items():
        assert found or component in ("mlp", "stem")
        assert set(found) <= set(names)


def test_is_mamba_model():
    assert is_mamba_model(mamba_tiny(depth=1, d_model=8))
    other = nn.Module()
    other.blocks = nn.ModuleList([nn.Linear(3, 3)])
    assert not is_mamba_model(other) and not is_mamba_model(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="Linear is not a Mamba model"):
        prune_mamba_unstructured(nn.Linear(2, 2), {"mlp": 0.5})


def test_prunable_layers_are_parameters_and_leave_out_what_is_refused(model):
    layers = get_prunable_layers(model)
    names = dict(model.named_parameters())
    assert set(layers) == {n for n, c in COMPONENTS.items() if c.refused is None}
    assert all(name in names for found in layers.values() for name in found)
    assert layers["mlp"][:2] == ["blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"]
    assert not any("A_log" in n or n.endswith(".D") for c, found in layers.items() if c != "block" for n in found)


@pytest.mark.parametrize(
    "target, words",
    [
        ("attention", ["unknown component 'attention'", "linear_out, mlp"]),
        ("A_log", ["decay rates of the recurrence", "linear_in:expand"]),
        ("D", ["skip gain"]),
        ("head", ["attention pooling's score", "residual stream"]),
        ("mlp:channel", ["cannot be cut by 'channel'", "element, neuron"]),
        ("mlp:", []),
        ("linear_out:state", ["element, channel, output"]),
    ],
)
def test_words_that_mean_nothing_are_refused(model, target, words):
    if not words:
        assert parse_target(target) == ("mlp", "element")
        return
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigError) as error:
        prune_component(model, *target.split(":")[:1], 0.5, *(target.split(":")[1:] or [None]))
    assert all(word in str(error.value) for word in words), error.value
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan"), True, "0.5"])
def test_rates_outside_of_the_interval_are_refused(model, rate):
    with pytest.raises(ConfigError, match=r"rate of 'mlp' must be in \[0, 1\)"):
        prune_component(model, "mlp", rate)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"scope": "globally"}, "unknown scope 'globally'; valid: global, layerwise"),
        ({"score": "l3"}, "unknown score 'l3'; valid: l1, l2"),
        ({"score": "taylor"}, "needs calibration batches"),
        ({"layers": [3]}, "no block 3; valid: 0 to 2"),
        ({"floor": 0}, "floor and multiple must be at least 1"),
    ],
)
def test_options_are_checked(model, options, words):
    with pytest.raises(ConfigError, match=words):
        prune_component(model, "mlp", 0.5, "neuron", **options)


def test_a_smaller_model_cannot_be_asked_for_by_elements(model):
    with pytest.raises(ConfigError, match="leaves no whole unit to remove; valid with shrink: neuron"):
        prune_component(model, "mlp", 0.5, "element", shrink=True)
