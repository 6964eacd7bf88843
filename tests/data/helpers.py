"""Configs of data alone, and image folders of tiny pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mamba.config.schema import DataConfig, RunConfig


def config(**values) -> DataConfig:
    return RunConfig().with_values({f"data.{k}": v for k, v in values.items()}).resolve().data


def write_folder(root, splits=("train", "test"), classes=("ant", "bee", "cat"), count=6, size=(10, 12)):
    rng = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (*size, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root
