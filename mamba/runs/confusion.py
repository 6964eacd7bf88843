"""Which classes are taken for which: the confusion matrix, what follows from it, and how it is shown and stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FROM_CLASSES = 20
"""From so many classes on the accuracy among the five most probable is counted too."""
STORED = 200
"""Classes up to which result.json holds the matrix."""
MIXED_UP = 10
"""Pairs of classes that are named."""


@dataclass(frozen=True)
class Confusion:
    """Counts of images: (classes, classes), a row for each true class, a column for each predicted one."""

    counts: NDArray[np.int64]
    classes: tuple[str, ...]
    among_five: int | None = None
    """Images whose class is among the five most probable; None below `FROM_CLASSES` classes."""

    @property
    def images(self) -> int:
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * int(np.trace(self.counts)) / self.images

    @property
    def top5(self) -> float | None:
        """In percent; None below `FROM_CLASSES` classes."""
        return None if self.among_five is None else 100 * self.among_five / self.images

    def of_class(self, number: int) -> tuple[int, float, float]:
        """Images of a class, percent of them that are recognised (recall), percent of what is taken for it that is
        right (precision); NaN of nothing."""
        row, column, right = (
            int(v) for v in (self.counts[number].sum(), self.counts[:, number].sum(), self.hits[number])
        )
        return row, 100 * right / row if row else math.nan, 100 * right / column if column else math.nan

    @property
    def hits(self) -> NDArray[np.int64]:
        return np.diagonal(self.counts)

    def mixed_up(self, most: int = MIXED_UP) -> list[tuple[str, str, int]]:
        """The most frequent mistakes: true class, predicted class, images."""
        wrong = self.counts.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[i, j]]
        return [(self.classes[i], self.classes[j], int(wrong[i, j])) for i, j in pairs]

    def to_dict(self) -> dict[str, Any]:
        """JSON: `classes` (each: images, recall, precision), `mixed_up`, and the matrix, a line of counts for each true
        class, up to `STORED` classes."""
        classes = {}
        for number, name in enumerate(self.classes):
            images, recall, precision = self.of_class(number)
            classes[name] = {"images": images, "accuracy": recall, "precision": precision}
        tree: dict[str, Any] = {"classes": classes, "mixed_up": self.mixed_up()}
        if len(self.classes) <= STORED:
            tree["confusion"] = [" ".join(map(str, row)) for row in self.counts.tolist()]
        return tree

    def worst_first(self) -> list[tuple[str, int, float, float]]:
        """Name, images, recall and precision of each class: the one that is recognised worst first, then those without
        images."""
        rows = [(name, *self.of_class(number)) for number, name in enumerate(self.classes)]
        return sorted(rows, key=lambda row: (math.isnan(row[2]), row[2]))

    def picture(self) -> NDArray[np.uint8]:
        """(height, width, 3): each row's shares as grey levels, true classes downwards; with names and counts where
        there are few classes."""
        from PIL import Image, ImageDraw

        n = len(self.classes)
        shares = self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)
        levels = np.round(255 * (1 - shares)).astype(np.uint8)
        cell = 40 if n <= 25 else max(2, 1000 // n)
        body = Image.fromarray(levels).resize((n * cell, n * cell), Image.Resampling.NEAREST).convert("RGB")
        if n > 25:
            return np.asarray(body)
        margin = 110
        image = Image.new("RGB", (margin + n * cell, margin // 2 + n * cell), "white")
        image.paste(body, (margin, margin // 2))
        draw = ImageDraw.Draw(image)
        draw.text((4, 4), "true class (rows), predicted (columns)", fill="black")
        for i, name in enumerate(self.classes):
            draw.text((4, margin // 2 + i * cell + cell // 3), _short(name, 16), fill="black")
            draw.text((margin + i * cell + 2, margin // 2 - 14), _short(name, 6), fill="black")
            for j in range(n):
                ink = "white" if shares[i, j] > 0.5 else "black"
                at = (margin + j * cell + 4, margin // 2 + i * cell + cell // 3)
                draw.text(at, str(self.counts[i, j]), fill=ink)
        return np.asarray(image)

    def class_picture(self, most: int = 50) -> NDArray[np.uint8]:
        """(height, width, 3): the classes that are recognised worst, with bars."""
        from PIL import Image, ImageDraw

        rows = self.worst_first()[:most]
        image = Image.new("RGB", (520, 24 + 18 * len(rows)), "white")
        draw = ImageDraw.Draw(image)
        draw.text((4, 4), "accuracy of each class (images), the worst first", fill="black")
        for place, (name, images, recall, _) in enumerate(rows):
            top = 22 + 18 * place
            share = 0.0 if math.isnan(recall) else recall
            draw.rectangle((200, top, 200 + 3 * share, top + 14), fill="steelblue")
            words = "no images" if math.isnan(recall) else f"{recall:.1f} % ({images:,})"
            draw.text((4, top), _short(name, 30), fill="black")
            draw.text((204, top + 1), words, fill="black")
        return np.asarray(image)


def _short(name: str, most: int) -> str:
    return (name if len(name) <= most else name[: most - 1] + ".").encode("latin-1", "replace").decode("latin-1")
