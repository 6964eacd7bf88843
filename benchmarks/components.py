"""What pruning a trained model costs and buys, without fine-tuning: every component and granularity at several rates,
and the plans, with validation accuracy, parameters, MACs and measured speed.

python benchmarks/components.py runs/quickstart/first
python benchmarks/components.py runs/v2/TRIAL --rates 0.3 0.5 0.7 0.9 --json components.json --csv components.csv

Accuracy is that of the validation split that the run kept: nothing is chosen on the test set.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project, wherever this is run from

from benchmarks.trained import trained
from mamba.config.schema import RunConfig
from mamba.data.registry import load_data
from mamba.errors import ConfigError, ForgeError
from mamba.runs import checkpoint as ckpt
from mamba.runs.environment import environment
from mamba.train.distributed import own_device
from mamba.train.precision import resolve_amp
from pruning import COMPONENTS, PLANS, apply_plan, measure
from pruning.components import ELEMENT
from pruning.cut import cut
from pruning.shrink import shrink

FIELDS = ("what", "rate", "val_accuracy", "params", "nonzero", "macs", "images_per_s", "latency_ms", "peak_memory_mib")
CUTTABLE = [n for n, c in COMPONENTS.items() if c.refused is None]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a run's folder or a checkpoint's")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--components", nargs="+", default=CUTTABLE)
    parser.add_argument("--score", default="l1")
    parser.add_argument("--batch-size", type=int, default=None, help="of the throughput; 1024 on a GPU, 128 on a CPU")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long each speed is timed")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--csv", type=Path, default=None)
    parser.add_argument("--figure", type=Path, default=None, help="accuracy against rate, a line a granularity")
    args = parser.parse_args()
    device = own_device()
    about = {"command": " ".join(["python", *sys.argv]), "date": str(date.today()), **environment(device)}
    print(json.dumps(about["hardware"]), json.dumps(about["versions"]))
    found: list[dict[str, Any]] = []
    try:
        print("  ".join(f"{key:>{20 if key == 'what' else 12}}" for key in FIELDS))
        for row in rows(args.checkpoint, args.rates, args.components, args.score, args.batch_size, args.seconds):
            found.append(row)
            print("  ".join(f"{row.get(key, '')!s:>{20 if key == 'what' else 12}}" for key in FIELDS), flush=True)
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, restval="")
            writer.writeheader()
            writer.writerows(found)
    if args.figure:
        draw(found, args.figure)
    return 0


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against rate: single weights on the left, whole units on the right."""
    from matplotlib.figure import Figure

    dense = rows[0]["val_accuracy"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    element, units = figure.subplots(1, 2, sharey=True)
    colours = list(COMPONENTS)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if ":" in row["what"]:
            lines.setdefault(row["what"], [(0.0, dense)]).append((row["rate"], row["val_accuracy"]))
    for what, points in lines.items():
        name, granularity = what.split(":")
        if granularity in ("shared", "separable") or what in (
            "linear_gate:channel",
            "conv1d:channel",
            "linear_in:expand",
        ):
            continue  # the same channels as linear_out:channel, or no rate to speak of
        axis, label = (element, name) if granularity == ELEMENT else (units, what)
        style = "o--" if granularity == "output" else "o-"
        axis.plot(*zip(*points, strict=True), style, label=label, markersize=4, color=f"C{colours.index(name)}")
    for axis, title in ((element, "single weights zeroed"), (units, "whole units removed")):
        axis.set_title(title)
        axis.set_xlabel("rate")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    element.set_ylabel("validation accuracy, %, no fine-tuning")
    figure.savefig(path, dpi=150)


def rows(
    checkpoint: Path | str | None = None,
    rates: Sequence[float] = (0.3, 0.5, 0.7, 0.9),
    components: Sequence[str] | None = None,
    score: str = "l1",
    batch_size: int | None = None,
    seconds: float = 0.5,
    epochs: int = 20,
    overrides: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """A row the dense model, a plan, a component at a rate. Without a checkpoint: of the quickstart model, trained here
    for so many epochs; overrides: of its config, for toys."""
    device = own_device()
    with trained(checkpoint, epochs, overrides) as path:
        model, description = ckpt.load_model(path, device=device)
        config = RunConfig.stored(description["config"], path)
        data = load_data(config.data, config.seed)
        if data.val is None:
            raise ConfigError("the run kept no validation split (data.val_fraction 0); there is nothing to measure on")
        amp, val = resolve_amp(config.optim.amp, device), data.val
        batch = batch_size or measure.usual_batch(device)

        def row(what: str, rate: float, pruned: Any, timed: bool) -> dict[str, Any]:
            size = measure.size(pruned)
            found = {
                "what": what,
                "rate": rate,
                "val_accuracy": round(measure.accuracy(pruned, data, val, config.eval.batch_size, amp), 2),
                **{key: int(size[f"model/{key}"]) for key in ("params", "nonzero", "macs")},
            }
            if timed:
                speed = measure.speed(pruned, batch, seconds, amp)
                found |= {key.removeprefix("bench/"): round(value, 4) for key, value in speed.items()}
            return found

        yield row("dense", 0.0, model, True)
        for name in PLANS:
            try:
                yield row(name, 0.0, apply_plan(model, name, score).model, True)
            except ConfigError as error:
                print(f"{name:>20}  refused: {error}")
        yield row("dense again", 0.0, model, True)
        for name in CUTTABLE if components is None else components:
            for granularity in COMPONENTS[name].granularities:
                for rate in rates:
                    what = f"{name}:{granularity}"
                    try:
                        masked = cut(model, {what: rate}, score=score)
                        element = granularity == ELEMENT
                        smaller = masked.model if element else shrink(masked.model, masked.masks).model
                        if granularity in COMPONENTS[name].replacements:
                            smaller = cut(model, {what: rate}, True, score=score).model
                    except ConfigError as error:
                        print(f"{what:>20}  {rate:>12}  refused: {error}")
                        continue
                    yield row(what, rate, smaller, False)


if __name__ == "__main__":
    sys.exit(main())
