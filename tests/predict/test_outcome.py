"""Many images: lines in order, counts as evaluate has them, the surest mistakes first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mamba
from mamba.errors import DataError
from mamba.predict.files import find_images
from mamba.predict.outcome import predict_found
from mamba.train.distributed import Process
from mamba.train.evaluate import evaluate


def test_it_counts_as_training_does(run, images):
    model = mamba.load(run)
    found = find_images([images], model.classes)
    outcome = predict_found(model, found, batch_size=5, worst=4)
    data = found.data(model.transform, model.classes)
    assert outcome.confusion.accuracy == pytest.approx(evaluate(model.model, data, data.test, Process()).accuracy)
    single = [model.predict(line["image"]) for line in outcome.lines]
    assert [line["class_1"] for line in outcome.lines] == [p.label for p in single]
    assert [float(line["probability_1"]) for line in outcome.lines] == pytest.approx(
        [p.probability for p in single], abs=2e-6
    )
    wrong = sorted(
        (p.probability for p, x in zip(single, outcome.lines, strict=True) if not x["correct"]), reverse=True
    )
    assert [m.said.probability for m in outcome.mistakes] == pytest.approx(wrong[:4]) and len(wrong) > 4
    assert all(m.label == m.path.parent.name != m.said.label for m in outcome.mistakes)
    assert outcome.confusion.counts.sum(1).tolist() == [4, 4, 4]


def test_without_labels_there_is_no_accuracy(run, images):
    model = mamba.load(run)
    outcome = predict_found(model, find_images([images / "dark"], model.classes), k=2)
    assert outcome.confusion is None and not outcome.mistakes
    assert list(outcome.lines[0]) == ["image", "class_1", "probability_1", "class_2", "probability_2"]


def test_an_output_that_is_not_finite_is_no_prediction(run, images):
    model = mamba.load(run)
    with torch.no_grad():
        model.model.head.bias[0] = np.nan
    with pytest.raises(DataError, match=r"dark/0\.png is not finite"):
        predict_found(model, find_images([images / "dark"], model.classes))
