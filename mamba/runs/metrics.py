"""What is measured, each metric once: its key, how people call it, its unit, how it is written, what is better.

Keys are those of TensorBoard, metrics.jsonl, result.json and results.csv. A metric of yours gets labels and an order
everywhere by one entry: `METRICS["val/f1"] = Metric("val/f1", "F1", "%", "{:.2f}", "up")`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One thing that is measured."""

    key: str
    label: str
    """As tables and figures call it, unit left out."""
    unit: str = ""
    format: str = "{:,.4g}"
    """Of the value, for `str.format`."""
    better: Literal["up", "down"] | None = None
    """Which way is better; None: neither."""
    hparams: bool = False
    """Whether it is a column of TensorBoard's HPARAMS tab."""

    @property
    def title(self) -> str:
        """Label and unit, for an axis or the head of a column."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def text(self, value: float | None) -> str:
        """The value with its unit; empty where there is none."""
        if value is None:
            return ""
        unit = f" {self.unit}" if self.unit else ""
        return "not finite" if not math.isfinite(value) else self.format.format(value) + unit

    def rank(self, value: float | None, better: Literal["up", "down"] | None = None) -> float:
        """What to sort by, ascending, so that the best comes first; a value that is missing or NaN comes last.

        `better` overrides the metric's own way (a sweep's objective says its own); without either, larger comes first.
        """
        if value is None or math.isnan(value):
            return math.inf
        return value if (better or self.better) == "down" else -value


SCORE = "val/best_accuracy"
"""The one figure for how good a run is: the validation accuracy of the weights that are kept."""

_ALL = (
    Metric("val/best_accuracy", "validation accuracy of the kept weights", "%", "{:.2f}", "up", hparams=True),
    Metric("val/accuracy", "validation accuracy", "%", "{:.2f}", "up", hparams=True),
    Metric("val/ema_accuracy", "validation accuracy of the average", "%", "{:.2f}", "up", hparams=True),
    Metric("val/loss", "validation loss", "", "{:.4f}", "down", hparams=True),
    Metric("val/drop", "accuracy lost by the cut", "points", "{:.2f}", "down"),
    Metric("val/images", "validation images", "", "{:,.0f}"),
    Metric("test/accuracy", "test accuracy", "%", "{:.2f}", "up", hparams=True),
    Metric("test/top5_accuracy", "test accuracy among the first five", "%", "{:.2f}", "up"),
    Metric("test/loss", "test loss", "", "{:.4f}", "down"),
    Metric("train/loss", "training loss", "", "{:.4f}", "down", hparams=True),
    Metric("train/lr", "learning rate", "", "{:.3g}"),
    Metric("train/lr_lowest", "lowest learning rate of any group", "", "{:.3g}"),
    Metric("train/images_per_s", "training speed", "images/s", "{:,.0f}", "up", hparams=True),
    Metric("train/epoch_s", "training time of an epoch", "s", "{:,.1f}", "down"),
    Metric("train/data_wait_percent", "time spent waiting for data", "%", "{:.1f}", "down"),
    Metric("train/skipped_steps", "skipped steps", "", "{:,.0f}", "down"),
    Metric("train/peak_memory_mib", "peak memory of training", "MiB", "{:,.0f}", "down"),
    Metric("model/params", "parameters", "", "{:,.0f}", "down", hparams=True),
    Metric("model/nonzero", "parameters that are not zero", "", "{:,.0f}", "down"),
    Metric("model/macs", "MACs per image, scan counted", "", "{:,.0f}", "down", hparams=True),
    Metric("model/sparsity", "zeros among prunable weights", "%", "{:.1f}"),
    Metric("bench/images_per_s", "throughput", "images/s", "{:,.0f}", "up"),
    Metric("bench/latency_ms", "latency, one image", "ms", "{:.3f}", "down"),
    Metric("bench/peak_memory_mib", "peak memory", "MiB", "{:,.0f}", "down"),
    Metric("prune/density", "weights of the target that survive", "", "{:.4f}"),
    Metric("prune/lambda", "decay of the units that leave"),
    Metric("prune/lambda_ceiling", "ceiling of that decay"),
    Metric("prune/leaving_rms", "root mean square of the leaving weights"),
    Metric("prune/cut_percent", "weights cut in training", "%", "{:.1f}"),
    Metric("prune/penalty_strength", "strength of the sparsity penalty"),
    Metric("prune/penalty_norm", "norm under the sparsity penalty"),
)

METRICS: dict[str, Metric] = {metric.key: metric for metric in _ALL}
"""Key -> metric, in the order in which tables show them."""


def metric(key: str) -> Metric:
    """The metric of a key; of one that is not listed (`lr/head`, `step/loss`, a hook's own), one that is called so."""
    return METRICS.get(key) or Metric(key, key)


def best_accuracy(metrics: Mapping[str, float | None]) -> float:
    """How good the weights are that a run keeps: the best validation accuracy of raw and averaged weights so far where
    it is known, else the better of both in these metrics. NaN where nothing was validated."""
    kept = metrics.get("val/best_accuracy")
    if kept is not None and not math.isnan(kept):
        return kept
    values = [metrics.get(key) for key in ("val/accuracy", "val/ema_accuracy")]
    known = [value for value in values if value is not None and not math.isnan(value)]
    return max(known, default=math.nan)


def number(value: object, digits: int = 4, units: bool = False) -> str:
    """Any value as tables, sentences and figures write it: whole and large numbers whole, others in so many significant
    digits, shares close to 1 in six (a decay of 0.9999 must not become 1).

    Args:
        value: what is no finite number is written as it is.
        digits: significant digits.
        units: short as an axis has it: 327k, 5.44M.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if 0.99 <= value < 1:
        return f"{value:.6g}"
    if units and abs(value) >= 1e3:
        scale, unit = next((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= s)
        return f"{value / scale:.{digits}g}{unit}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.{digits}g}"
