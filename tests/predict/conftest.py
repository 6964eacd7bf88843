"""A small model that knows three classes by their brightness, and folders of such images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mamba.models.model import Architecture, MambaModel
from mamba.runs.checkpoint import save_checkpoint
from tests.conftest import make_small_config

CLASSES = ("dark", "grey", "bright")


def checkpoint(folder, classes=CLASSES, seed=0, **values):
    """A checkpoint folder of an untrained 8x8 model."""
    config = make_small_config(folder, **values)
    torch.manual_seed(seed)
    model = MambaModel(Architecture.from_config(config.model, len(classes), 8))
    description = {
        "classes": list(classes),
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "config": config.model_dump(mode="json"),
        "weights": "raw",
    }
    return save_checkpoint(folder / "checkpoints" / "best-00001", model, None, description, None).parent.parent


@pytest.fixture
def run(tmp_path):
    return checkpoint(tmp_path / "run")


def write_images(root, classes=CLASSES, count=4):
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (11, 14, 3)) + 60 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")
