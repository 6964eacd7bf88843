"""Compare trials of any experiments and runs: a table in the terminal, and one CSV.

python ray_jobs/compare.py runs/ablation runs/v2 [--csv all.csv] [--by val/accuracy]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamba.errors import ConfigError, ForgeError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an error of the user's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="experiments or runs")
    parser.add_argument("--by", default="val/accuracy", help="metric to sort by, largest first")
    parser.add_argument("--csv", type=Path, default=None, help="write all values and metrics to this file")
    args = parser.parse_args(argv)
    from ray_jobs.report.table import show, write_results  # after the words: imports torch

    try:
        found = [row for folder in args.folders for row in trials_under(folder)]
        if not found:
            raise ConfigError(f"no result.json under {', '.join(map(str, args.folders))}: nothing finished there")
        if not any(args.by in row["metrics"] for row in found):
            known = sorted({key for row in found for key in row["metrics"]})
            raise ConfigError(f"--by {args.by}: no trial has it; valid: {', '.join(known)}")
        show(sorted(found, key=lambda row: -row["metrics"].get(args.by, float("-inf"))))
        if args.csv:
            write_results(args.csv, found)
            print(f"table: {args.csv}")
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def trials_under(folder: Path) -> list[dict[str, Any]]:
    """Every run or trial with a result, however deep, with the values by which it differs from the default config."""
    from mamba.config.schema import RunConfig
    from ray_jobs.sweep.results import TRIAL, read_trial

    defaults = RunConfig().flat()
    rows = []
    for own in sorted({path.parent for name in (TRIAL, "result.json") for path in folder.rglob(name)}):
        if ".ray" in own.parts:  # Tune's own
            continue
        path = own / "result.json"
        result = read_trial(own) or json.loads(path.read_text())
        values = result.get("values")
        config = path.parent / "config.yaml"
        if values is None and config.exists():
            flat = RunConfig.from_yaml(config).flat()
            values = {k: v for k, v in flat.items() if v != defaults.get(k) and k not in ("out", "name", "trial")}
        name = f"{folder.name}/{path.parent.relative_to(folder)}"
        row = {key: result.get(key, "") for key in ("status", "reason", "seconds", "metrics")}
        rows.append({"trial": name, **row, "values": values or {}})
    for path in sorted(folder.rglob("pruned.json")):  # what a plan left, before any training
        report = json.loads(path.read_text())
        name = f"{folder.name}/{path.parent.relative_to(folder)} ({report['plan']})"
        rows.append({"trial": name, "status": "pruned", "reason": "", "seconds": "", "values": {},
                     "metrics": report["after"]})  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
