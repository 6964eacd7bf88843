"""The confusion matrix and what follows from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mamba.runs.confusion import Confusion
from mamba.train.evaluate import ClassCounts

COUNTS = np.array([[3, 1, 0], [0, 2, 2], [0, 0, 0]])


def test_figures_by_hand():
    found = Confusion(COUNTS, ("a", "b", "c"))
    assert found.accuracy == pytest.approx(62.5) and found.images == 8 and found.top5 is None
    assert found.of_class(0) == (4, 75, 100) and found.of_class(1)[2] == pytest.approx(200 / 3)
    images, recall, precision = found.of_class(2)
    assert images == 0 and math.isnan(recall) and precision == 0
    assert found.mixed_up() == [("b", "c", 2), ("a", "b", 1)]
    assert found.to_dict()["confusion"] == ["3 1 0", "0 2 2", "0 0 0"]
    assert [row[0] for row in found.worst_first()] == ["b", "a", "c"]


@pytest.mark.parametrize("classes", [3, 40])
def test_counts_and_pictures(classes):
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.rand(200, classes, generator=generator), torch.randint(classes, (200,), generator=generator)
    counts = ClassCounts(tuple(f"Größe {i} 大" for i in range(classes)), torch.device("cpu"))
    for part in (slice(0, 130), slice(130, 200)):
        counts.add(rows[part], labels[part])
    found = counts.result()
    want = np.zeros((classes, classes), int)
    for row, label in zip(rows, labels, strict=True):
        want[int(label), int(row.argmax())] += 1
    assert (found.counts == want).all()
    five = [int(label) in row.topk(min(5, classes)).indices.tolist() for row, label in zip(rows, labels, strict=True)]
    assert found.top5 == (None if classes < 20 else 100 * sum(five) / 200)
    for picture in (found.picture(), found.class_picture()):
        assert picture.dtype == np.uint8 and picture.shape[2] == 3 and len(np.unique(picture)) > 2
