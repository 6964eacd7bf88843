"""One count of accuracy for training, the test and pruning; outputs that are not finite have none."""

from __future__ import annotations

import math

import pytest
import torch

from mamba.data.views import ONE, Views
from mamba.models.model import Architecture, MambaModel
from mamba.train.distributed import Process
from mamba.train.evaluate import Score, best_views, evaluate, probabilities
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

    score = evaluate(OneBad(), small_data, small_data.test, Process(), batch_size=30, views=Views(2))
    assert math.isnan(score.loss) and math.isnan(score.accuracy)


def test_views_are_averaged_as_probabilities(model, small_data):
    images, model = torch.randn(4, 3, 8, 8), model.eval()
    several = Views(2)
    want = (model(images).softmax(-1) + model(images.flip(-1)).softmax(-1)) / 2
    torch.testing.assert_close(probabilities(model, images, several), want)


@pytest.mark.parametrize(
    "plain, several, always, used",
    [
        (Score(0.5, 90.0), Score(0.4, 91.0), False, True),
        (Score(0.5, 90.0), Score(0.4, 89.0), False, False),
        (Score(0.5, 90.0), Score(0.4, 90.0), False, True),  # as many right, and surer of it
        (Score(0.5, 90.0), Score(0.5, 90.0), False, False),
        (Score(0.5, 90.0), Score(float("nan"), float("nan")), False, False),
        (Score(0.5, 90.0), Score(0.4, 89.0), True, True),
    ],
)
def test_views_are_used_where_they_validate_better(plain, several, always, used):
    asked = Views(5, True, 1)
    views, said = best_views(asked, lambda v: several if v is asked else plain, always)
    assert views == (asked if used else ONE) and said["used"] is used
    assert said["val/accuracy"] == plain.accuracy and said["asked"]["count"] == 5


def test_without_validation_views_are_off_unless_asked_for():
    asked = Views(5, True, 1)
    assert best_views(asked, None, always=False)[0] == ONE
    views, said = best_views(asked, None, always=True)
    assert views == asked and "no validation split" in said["why"]
