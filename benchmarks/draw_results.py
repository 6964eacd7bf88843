"""Draw the figures of docs/RESULTS.md from what is kept under docs/results: python benchmarks/draw_results.py"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
STAGE_A = {
    "optimizer-muon_lr-0.003": "Muon, lr 3e-3",
    "optimizer-muon_lr-0.001": "Muon, lr 1e-3",
    "augment-autoaugment_crop-pad": "AdamW, lighter augmentation",
    "lr-0.001": "AdamW, lr 1e-3",
}
CUTS = ["linear_out-0.5", "mlp-0.7", "mlp-0.9", "conv1d-0.5", "linear_B_C-0.5", "linear_out-0.3_mlp-0.7",
        "linear_out-0.5_mlp-0.7", "linear_out-0.7_mlp-0.7"]  # fmt: skip


def validation(path: Path) -> tuple[list[int], list[float]]:
    """Epochs and the better accuracy of raw and averaged weights, where a run validated."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    seen = [(r["epoch"], max(r["val/accuracy"], r["val/ema_accuracy"])) for r in rows if "val/accuracy" in r]
    return [epoch for epoch, _ in seen], [accuracy for _, accuracy in seen]


def tested(path: Path) -> tuple[int, float, float]:
    """Epochs of a run, its test accuracy and the standard error of that, in percent."""
    result = json.loads(path.read_text())
    share = result["metrics"]["test/accuracy"] / 100
    return result["epochs"], 100 * share, 100 * (share * (1 - share) / result["images"]["test"]) ** 0.5


def main() -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for name, label in STAGE_A.items():
        left.plot(*validation(DOCS / "results/2026-11-25-stage-a-h100x2" / f"{name}.jsonl"), label=label)
    left.set(title="stage A, 14 epochs", xlabel="epoch", ylabel="validation accuracy (%)", ylim=(40, 90))
    left.legend()
    middle.plot(*validation(DOCS / "results/2026-11-25-muon90-h100x2/metrics.jsonl"), label="validation (90 epochs)")
    runs = [tested(DOCS / f"results/2026-11-25-muon{epochs}-h100x2/result.json") for epochs in (90, 140, 300)]
    middle.errorbar(*zip(*runs, strict=True), fmt="o", capsize=3, label="test ± standard error")
    for epochs, accuracy, _ in runs:
        middle.annotate(f"{accuracy:.2f}", (epochs, accuracy), (-12, -16), textcoords="offset points")
    middle.axhline(96, color="grey", linestyle=":", label="96 %")
    middle.set(title="with Muon, one seed each", xlabel="epochs", ylabel="accuracy (%)", ylim=(80, 98), xlim=(0, 330))
    middle.legend(loc="lower right")
    with (DOCS / "results/2026-11-25-repair-h100.csv").open() as file:
        scores = {row["trial"]: float(row["val/accuracy"]) for row in csv.DictReader(file)}
    places = range(len(CUTS))
    right.barh([p + 0.2 for p in places], [scores[f"repair-False_{c}"] for c in CUTS], 0.4, label="cut")
    right.barh([p - 0.2 for p in places], [scores[f"repair-True_{c}"] for c in CUTS], 0.4, label="cut and repaired")
    right.axvline(94.24, color="grey", linestyle=":", label="dense")
    right.set(title="whole units removed, not trained on", xlabel="validation accuracy (%)", yticks=list(places))
    right.set_yticklabels([c.replace("-", " ").replace("_mlp", ", mlp") for c in CUTS])
    right.set_xlim(0, 100)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(DOCS / "images/results.png", dpi=110)


if __name__ == "__main__":
    main()
