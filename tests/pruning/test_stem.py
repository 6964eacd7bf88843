"""Inner channels of a stem of convolutions: a component like others, cut in the stem alone."""

from __future__ import annotations

import pytest
import torch

from mamba.errors import ConfigError
from mamba.models.model import Architecture, MambaModel, named_model
from mamba.train.ema import ModelEma
from pruning import extract_mask_mamba, get_prunable_layers, prune_component
from pruning.cut import cut
from pruning.importance import SCORES
from pruning.shrink import shrink, shrink_ema, shrink_optimizer
from tests.pruning.small_models import PLAIN, build


def stemmed(stem="conv", channels=(6, 8), **choices):
    model = build(PLAIN, stem=stem, stem_channels=channels, **choices)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize("stem, channels", [("conv", (6, 8)), ("conv", (6,)), ("cct", (6,))])
def test_masked_and_smaller_stems_compute_the_same(images, stem, channels, score):
    model = stemmed(stem, channels)
    calibration = [(images, torch.tensor([0, 1, 2, 0]))]
    masked = cut(model, {"stem": 0.5, "mlp:neuron": 0.3}, score=score, calibration=calibration)
    smaller = cut(model, {"stem": 0.5, "mlp:neuron": 0.3}, shrink=True, score=score, calibration=calibration)
    left = smaller.model.architecture.stem_channels
    assert sum(left) == sum(channels) - round(0.5 * sum(channels)) and smaller.masks == {}
    torch.testing.assert_close(masked.model(images), smaller.model(images))
    assert (masked.model(images) - model(images)).abs().max() > 1e-6
    again = MambaModel(Architecture.from_dict(smaller.model.architecture.to_dict())).double().eval()
    again.load_state_dict(smaller.model.state_dict())
    assert torch.equal(again(images), smaller.model(images))
    assert smaller.model.architecture.macs() < model.architecture.macs()
    # the masks can be read off the zeros, and a trained mask's average and moments go along
    assert extract_mask_mamba(model) == {}
    found = shrink(masked.model, extract_mask_mamba(masked.model)).model
    assert found.architecture == smaller.model.architecture


def test_in_training_too_a_masked_channel_is_a_missing_one(images):
    """Batch norm takes statistics of what the masked convolution gives, which is nothing."""
    model = stemmed().train()
    masked, smaller = cut(model, {"stem": 0.4}).model, cut(model, {"stem": 0.4}, shrink=True).model
    torch.testing.assert_close(masked(images), smaller(images))


def test_average_and_moments_are_cut_alike(images):
    model = stemmed().train()
    ema = ModelEma(model, 0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model(images).square().sum().backward()
    optimizer.step()
    result = cut(model, {"stem:channel": 0.5}, shrink=True)
    smaller, average = shrink_optimizer(optimizer, model, result), shrink_ema(ema, result)
    own = dict(result.model.named_parameters())
    for name in ("conv1.weight", "norm1.bias", "conv2.weight", "norm2.weight", "conv3.weight"):
        assert smaller.state[own[f"patch_embed.{name}"]]["exp_avg"].shape == own[f"patch_embed.{name}"].shape
    assert average.model.patch_embed.norm1.running_var.shape == result.model.patch_embed.norm1.running_var.shape
    result.model(images).sum().backward()
    smaller.step()


def test_what_is_covered_and_what_is_refused(model):
    stem = stemmed()
    assert get_prunable_layers(stem)["stem"] == ["patch_embed.conv1.weight", "patch_embed.conv2.weight"]
    for other in (model, named_model("mamba_tiny", 3, 8, d_model=8, depth=1, stem="cct")):
        with pytest.raises(ConfigError, match="no inner channels: it is patches, or a single convolution"):
            prune_component(other, "stem", 0.5)
    with pytest.raises(ConfigError, match="layers are blocks"):
        prune_component(stem, "stem", 0.5, layers=[0])
    with pytest.raises(ConfigError, match="floor of 4"):
        prune_component(stem, "stem", 0.9, floor=4)
