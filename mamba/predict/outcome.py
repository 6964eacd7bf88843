"""Many images at once: a line for each; where classes are known, how many are right and which mistakes are worst."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba.data.cache import Progress
from mamba.data.loader import eval_batches
from mamba.errors import DataError
from mamba.predict.files import Found
from mamba.predict.predictor import Prediction, Predictor
from mamba.runs.confusion import Confusion
from mamba.runs.files import write_csv
from mamba.train.evaluate import ClassCounts

WORST = 48
"""Mistakes that are kept."""


@dataclass(frozen=True)
class Mistake:
    """An image that is taken for another class."""

    path: Path
    label: str
    of_label: float
    """Probability that the model gives to its own class."""
    said: Prediction


@dataclass(frozen=True)
class Outcome:
    """What was predicted, in the order of the files."""

    lines: list[dict[str, Any]]
    """As predictions.csv has them: image, label and correct where known, class_1, probability_1, ..."""
    confusion: Confusion | None
    mistakes: list[Mistake]
    """The worst `WORST`: those that the model is surest of first."""


def predict_found(
    predictor: Predictor, found: Found, k: int = 5, batch_size: int = 64, worst: int = WORST, progress: bool = True
) -> Outcome:
    """Predict every image that was found; files are read as in training, ahead of the model.

    Raises:
        DataError: a file that cannot be read, or outputs that are not finite.
    """
    data = found.data(predictor.transform, predictor.classes)
    counts = ClassCounts(predictor.classes, predictor.device)
    lines: list[dict[str, Any]] = []
    mistakes: list[tuple[float, int, Mistake]] = []
    with Progress("predicting", len(found.files) if progress else 0) as shown:
        for images, labels in eval_batches(data, data.test, batch_size, 0, 1, predictor.device):
            rows = predictor.of_batch(images)
            if not bool(rows.isfinite().all()):
                bad = int((~rows.isfinite().all(-1)).nonzero()[0])
                raise DataError(f"the model's output for {found.files.path(len(lines) + bad)} is not finite")
            if found.labels is not None:
                counts.add(rows, labels)
            values, predictions = rows.cpu(), list(predictor.predictions(rows.cpu(), k))
            for i, (said, number) in enumerate(zip(predictions, labels.tolist(), strict=True)):
                path = found.files.path(len(lines))
                label = None if found.labels is None else predictor.classes[number]
                lines.append(_line(path, label, said))
                if label is not None and label != said.label:
                    mistake = Mistake(path, label, float(values[i, number]), said)
                    keep = heapq.heappushpop if len(mistakes) >= worst else heapq.heappush
                    keep(mistakes, (said.probability, -len(lines), mistake))
            if progress:
                shown.add(len(labels))
    ordered = [mistake for _, _, mistake in sorted(mistakes, key=lambda entry: entry[:2], reverse=True)]
    return Outcome(lines, None if found.labels is None else counts.result(), ordered)


def write_predictions(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write predictions.csv; raises FolderError where that cannot be."""
    write_csv(path, list(lines[0]), lines)


def _line(path: Path, label: str | None, said: Prediction) -> dict[str, Any]:
    known = {} if label is None else {"label": label, "correct": int(label == said.label)}
    ranked: dict[str, Any] = {}
    for place, (name, probability) in enumerate(said.top, 1):
        ranked |= {f"class_{place}": name, f"probability_{place}": f"{probability:.6f}"}
    return {"image": str(path).encode(errors="backslashreplace").decode(), **known, **ranked}
