"""Views of an image at test time: what they are, and that they fit what training shows."""

from __future__ import annotations

import pytest
import torch

from mamba.config.schema import RunConfig
from mamba.data.views import ONE, Views


def test_views_are_distinct_flips_and_shifts():
    images = torch.randn(2, 3, 16, 16)
    views = Views(10, flip=True, shift=2)(images)
    assert len(views) == 10 and torch.equal(views[0], images) and torch.equal(views[1], images.flip(-1))
    assert torch.equal(views[2][..., 2:], images[..., :-2])  # shifted right
    assert torch.equal(views[2][..., :2], images[..., 1:3].flip(-1))  # edges reflected
    assert len({v.numpy().tobytes() for v in views}) == 10
    assert [len(Views(n, True, 2)(images)) for n in (1, 2, 5)] == [1, 2, 5]
    assert torch.equal(ONE(images)[0], images) and len(ONE(images)) == 1


def test_without_mirroring_there_are_only_shifts():
    images = torch.randn(2, 3, 8, 8)
    views = Views(5, flip=False, shift=1)(images)
    assert len(views) == 5 and len({v.numpy().tobytes() for v in views}) == 5
    assert torch.equal(views[4][..., :-1, :], images[..., 1:, :])  # shifted up
    assert not any(torch.equal(v, images.flip(-1)) for v in views)


@pytest.mark.parametrize(
    "values, side, want",
    [
        ({"augment": "none"}, 32, Views(1, flip=False, shift=0)),
        ({"augment": "basic"}, 32, Views(10, flip=True, shift=2)),
        ({"augment": "basic"}, 8, Views(10, flip=True, shift=1)),
        ({"augment": "randaugment_inc", "crop": "resized", "crop_scale": 0.8}, 32, Views(10, flip=True, shift=1)),
        ({"augment": "basic", "crop": "resized", "crop_scale": 1.0}, 32, Views(2, flip=True, shift=0)),
    ],
)
def test_they_fit_what_training_shows(values, side, want):
    data = RunConfig().with_values({f"data.{key}": value for key, value in values.items()}).data
    views = Views.fitting(10, data, side)
    assert views == want and len(views(torch.randn(1, 3, side, side))) == want.count
