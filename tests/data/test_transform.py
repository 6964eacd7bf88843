"""What is no image, or leaves a doubt about its numbers, is refused; grey and transparent images are as files are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mamba.data.decode import read_rgb
from mamba.data.transform import Transform, transform_of
from mamba.errors import DataError

TRANSFORM = Transform(4, "crop", (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((3, 8, 8), np.uint8), r"array of shape \(3, 8, 8\) is no image"),
        (torch.zeros(8, 8, 3), r"tensor of shape \(8, 8, 3\) is no image"),
        (np.full((8, 8, 3), 1.5), "values from 1.5 to 1.5; valid are 0 to 1"),
        (torch.full((3, 8, 8), -2.0), "valid are 0 to 1"),
        (np.full((8, 8, 3), np.nan), "valid are 0 to 1"),
        (np.full((8, 8), 300), "valid are 0 to 255"),
        (np.zeros((8, 8), bool), "bool numbers"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
        (7, "no image"),
        ([], "there are no images"),
        ("nothing.png", "is not a readable image"),
    ],
)
def test_what_is_no_image(image, words):
    with pytest.raises(DataError, match=words):
        TRANSFORM([image] if isinstance(image, int) else image)


def test_arrays_are_read_as_files_are(tmp_path):
    rng = np.random.default_rng(0)
    for channels in (1, 3, 4):
        array = rng.integers(0, 256, (6, 9, channels)).astype(np.uint8)
        Image.fromarray(array[..., 0] if channels == 1 else array).save(tmp_path / "x.png")
        assert read_rgb(tmp_path / "x.png").mode == "RGB"
        assert torch.equal(TRANSFORM(array), TRANSFORM(tmp_path / "x.png"))
        assert torch.equal(TRANSFORM(torch.from_numpy(array).permute(2, 0, 1)), TRANSFORM(tmp_path / "x.png"))


def test_a_description_without_statistics_has_no_transform():
    assert transform_of({"classes": ["a"]}, 8) is None
    assert transform_of({"mean": [0, 0, 0], "std": [1, 1, 1]}, 8) == Transform(8, "crop", (0.0,) * 3, (1.0,) * 3)
