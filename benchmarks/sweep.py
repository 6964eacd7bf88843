"""What a sweep adds to the work of its trials: the component grid under Tune against the same cuts in a plain loop.

python benchmarks/sweep.py runs/quickstart/first

Prints both times, the sweep's start-up (to its first result), and its overhead per trial after that.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project, wherever this is run from

from benchmarks.trained import trained
from mamba.config.schema import RunConfig
from mamba.data.registry import load_data
from mamba.errors import ForgeError
from mamba.runs import checkpoint as ckpt
from mamba.runs.environment import environment
from mamba.train.distributed import own_device
from pruning import measure
from pruning.cut import cut
from ray_jobs.ablate import GRIDS
from ray_jobs.ablate import main as ablate
from ray_jobs.sweep.grid import expand
from ray_jobs.sweep.space import load_space


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a run's folder or a checkpoint's")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    try:
        figures = compare(args.checkpoint)
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for key, value in figures.items():
        print(f"{key:>32}  {value if isinstance(value, dict) else f'{value:.2f}'}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def rows(checkpoint: Path | str | None = None, epochs: int = 20) -> Iterator[dict[str, Any]]:
    """One row. Without a checkpoint: the quickstart model, trained here for so many epochs."""
    with trained(checkpoint, epochs) as path:
        found = compare(path)
    found.pop("environment")
    yield {"grid": "components", **{NAMES[key]: value for key, value in found.items()}}


NAMES = {
    "trials": "trials",
    "plain loop, s": "loop_s",
    "sweep, s": "sweep_s",
    "sweep, to its first result, s": "first_result_s",
    "sweep, first to last result, s": "results_s",
    "overhead per trial, s": "overhead_s",
}


def compare(checkpoint: Path) -> dict[str, object]:
    """Seconds of both, and what follows from them."""
    trials = expand(load_space(GRIDS["components"]), 0)
    device = own_device()
    model, description = ckpt.load_model(checkpoint, device=device)
    config = RunConfig.stored(description["config"], checkpoint)
    data = load_data(config.data, config.seed)
    assert data.val is not None
    measure.accuracy(model, data, data.val, config.eval.batch_size)  # the first call imports, and builds, what it needs
    began = time.perf_counter()
    for trial in trials:
        ((key, rate),) = trial.values.items()
        pruned = cut(model, {key.removeprefix("cut."): rate}).model
        measure.size(pruned)
        measure.accuracy(pruned, data, data.val, config.eval.batch_size)
    loop = time.perf_counter() - began

    with tempfile.TemporaryDirectory() as scratch:
        began_at, began = time.time(), time.perf_counter()
        ablate(["--grid", "components", "--checkpoint", str(checkpoint.absolute()), "--out", scratch])
        sweep = time.perf_counter() - began
        ended = sorted(p.stat().st_mtime for p in Path(scratch).glob("*/*/trial.json"))
    trials_s = ended[-1] - ended[0]
    return {
        "trials": float(len(ended)),
        "plain loop, s": loop,
        "sweep, s": sweep,
        "sweep, to its first result, s": ended[0] - began_at,
        "sweep, first to last result, s": trials_s,
        "overhead per trial, s": (trials_s - loop * (len(ended) - 1) / len(ended)) / (len(ended) - 1),
        "environment": environment(device),
    }


if __name__ == "__main__":
    sys.exit(main())
