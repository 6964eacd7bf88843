"""One count of accuracy for training, the test and pruning; outputs that are not finite have none."""

from __future__ import annotations

import math

import pytest
import torch

from mamba.models.model import Architecture, MambaModel
from mamba.train.distributed import Process
from mamba.train.evaluate import evaluate
from pruning import measure


@pytest.fixture
def model(small_config):
    torch.manual_seed(0)
    return MambaModel(Architecture.from_config(small_config().model, 3, 8))


def test_pruning_and_training_count_alike(model, small_data):
    score = evaluate(model, small_data, small_data.test, Process(), batch_size=7)
    assert measure.accuracy(model, small_data, small_data.test) == score.accuracy
    assert 0 < score.accuracy < 100 and not model.training


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_have_no_accuracy(model, small_data, poison):
    """All of them, or of one image alone."""
    with torch.no_grad():
        model.head.bias[1] = poison
    assert all(math.isnan(v) for v in evaluate(model, small_data, small_data.test, Process()))
    assert math.isnan(measure.accuracy(model, small_data, small_data.test))


def test_one_bad_image_is_enough(model, small_data):
    class OneBad(torch.nn.Module):
        def forward(self, images):
            return model(images).index_fill(0, torch.tensor([3]), float("nan"))

    score = evaluate(OneBad(), small_data, small_data.test, Process(), batch_size=30, views=2)
    assert math.isnan(score.loss) and math.isnan(score.accuracy)
