"""What leaves a model when masks take it whole, and what stays."""

from __future__ import annotations

import copy
import json

import torch

from mamba.models.model import Architecture, MambaModel
from pruning import apply_mask_mamba
from pruning.shrink import shrink
from tests.pruning.small_models import build, turns


def close(a, b):
    return float((a - b).detach().abs().max()) < 1e-9


def test_blocks_that_stay_keep_their_direction(images):
    """Without the second block every later one would take the next one's direction, if places in the stack counted."""
    model = build(*turns("cross", 4), class_token="middle")
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters() if "blocks.1" in name}
    masked = copy.deepcopy(model)
    apply_mask_mamba(masked, masks)
    smaller = shrink(model, masks).model
    assert [b.direction for b in smaller.architecture.blocks] == ["forward", "across", "across_backward"]
    assert close(masked(images), smaller(images))
    rebuilt = MambaModel(Architecture.from_dict(json.loads(json.dumps(smaller.architecture.to_dict())))).double().eval()
    rebuilt.load_state_dict(smaller.state_dict())
    assert torch.equal(rebuilt(images), smaller(images))


def test_something_always_stays(model, images):
    blocks = [(name, p) for name, p in model.named_parameters() if name.startswith("blocks.")]
    everything = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in blocks}
    result = shrink(model, everything)
    assert len(result.model.blocks) == 1
    masked = copy.deepcopy(model)
    apply_mask_mamba(masked, everything)
    assert close(result.model(images), masked(images))


def test_units_taken_by_single_weights_leave_too(model, images):
    """A unit that element masks happen to take whole is removed by shrink, its bias still counts until it is cut."""
    masks = {"blocks.0.ssm.out_proj.weight": torch.ones(10, 12, dtype=torch.bool)}
    masks["blocks.0.ssm.out_proj.weight"][4] = False
    masks["blocks.0.ssm.out_proj.weight"][5, 3] = False
    masked = copy.deepcopy(model)
    apply_mask_mamba(masked, masks)
    result = shrink(masked, masks)
    assert result.model.architecture.blocks[0].out_channels == 9
    assert result.model.blocks[0].ssm.out_index.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert close(result.model(images), masked(images))
    (left,) = result.masks.values()
    assert int((~left).sum()) == 1 and not left[4, 3]
