"""What pruning bought, to read: a table before and after, a table and a figure over rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mamba.runs.metrics import metric
from pruning.measure import TIMED, ratio
from pruning.rounds import accuracy_of

ROWS = (
    *("val/accuracy", "test/accuracy", "model/params", "model/nonzero", "model/sparsity", "model/macs"),
    *("bench/latency_ms", "bench/images_per_s", "bench/peak_memory_mib"),
)
"""Metrics of the table before and after."""


@dataclass(frozen=True)
class Trained:
    """A training under a penalty between what a plan was given and its cut."""

    kind: str
    """`penalty.kind`."""
    epochs: int
    accuracy: float | None = None
    """Validation accuracy of what was cut, the weights of its last epoch; None where nothing was validated."""

    @property
    def words(self) -> str:
        return f"{self.epochs} epoch{'s' * (self.epochs != 1)} under penalty.kind {self.kind}"

    @property
    def sentence(self) -> str:
        """For whoever reads the ratio as what the cut cost."""
        cut = "" if self.accuracy is None else f"; what was cut had {self.accuracy:.2f} % after that training"
        return (
            f"before: the model that was given, before {self.words}; a ratio is of that training and the cut "
            f"together{cut}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Any) -> Trained | None:
        """None where there was no such training."""
        return None if tree is None else cls(str(tree["kind"]), int(tree["epochs"]), tree.get("accuracy"))


def before_after_table(
    before: Mapping[str, float], after: Mapping[str, float], trained: Trained | None = None
) -> Table:
    """One metric a row: dense, pruned, ratio. What was not measured says so; a ratio of times has its range, or is
    within the noise. `trained`: between the two, said above the columns."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    names = ("before", "after", "ratio") if trained is None else (
        "before training\nand cut", "after\nboth", "ratio"
    )  # fmt: skip
    for name in names:
        table.add_column(name, justify="right")
    for key in ROWS:
        shown = metric(key)
        if key == "test/accuracy" and key not in before:  # nothing is chosen by it where something else can be
            continue
        if key not in before:
            table.add_row(shown.label, "not measured", "", "")
            continue
        times = ratio(before, after, key)
        words = "" if times is None else f"{times.value:.2f}{times.note}" if key in TIMED else f"{times.value:.3f}"
        table.add_row(shown.label, shown.text(before[key]), shown.text(after.get(key)), words)
    return table


def rounds_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One round a row."""
    table = Table(box=None, pad_edge=False)
    words = accuracy_of(rows[0])[1]
    names = ("round", "density", "parameters", "not zero", "MACs", f"{words} accuracy", "images/s", "latency")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["round"]),
            f"{row['density']:.4f}",
            f"{row['params']:,}",
            f"{row['nonzero']:,}",
            f"{row['macs']:,}",
            f"{accuracy_of(row)[0]:.2f} %",
            f"{row['images_per_s']:,.0f}" if row["images_per_s"] else "not measured",
            f"{row['latency_ms']:.2f} ms" if row["latency_ms"] else "not measured",
        )
    return table


def rounds_figure(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Accuracy against parameters and against measured throughput, a point a round; written as rounds.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, key, label in ((left, "params", "parameters"), (right, "images_per_s", "images per second")):
        known = [row for row in rows if row[key] is not None]
        axis.plot([row[key] for row in known], [accuracy_of(row)[0] for row in known], "o-", color="#2a6f97")
        for row in known:
            place = (row[key], accuracy_of(row)[0])
            axis.annotate(str(row["round"]), place, textcoords="offset points", xytext=(4, 4))
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    left.invert_xaxis()
    left.set_ylabel(f"{accuracy_of(rows[0])[1]} accuracy, %")
    path = folder / "rounds.png"
    figure.savefig(path, dpi=150)
    return path
