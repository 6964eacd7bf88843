"""Compare trials of any experiments and runs: a table for each data set and split, one CSV, one page.

python ray_jobs/compare.py runs/ablation runs/v2 [--csv all.csv] [--html all.html] [--tensorboard LOGDIR]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mamba.errors import ConfigError, ForgeError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an error of the user's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="experiments or runs, or a folder of many")
    parser.add_argument("--by", default="val/best_accuracy", help="metric to rank by, the better way first")
    parser.add_argument("--csv", type=Path, default=None, help="write all values and metrics to this file")
    parser.add_argument("--html", type=Path, default=None, help="write a page with a link to everything to this file")
    words = "write a folder for tensorboard --logdir, in which all of them can be compared at first sight"
    parser.add_argument("--tensorboard", type=Path, default=None, metavar="LOGDIR", help=words)
    args = parser.parse_args(argv)
    from mamba.config.help import quiet_pipe
    from ray_jobs.report.collect import collect
    from ray_jobs.report.comparison import check_places, show_groups, write_index
    from ray_jobs.report.table import write_results

    try:
        check_places(args.csv, args.html)
        found = collect(args.folders)
        for sentence in found.skipped:
            print(f"left out: {sentence}", file=sys.stderr)
        if not found.rows:
            raise ConfigError(f"nothing that finished under {', '.join(map(str, args.folders))}")
        if not any(args.by in row["metrics"] for row in found.rows) and args.by != "val/best_accuracy":
            known = sorted({key for row in found.rows for key in row["metrics"]})
            raise ConfigError(f"--by {args.by}: no trial has it; valid: {', '.join(known)}")
        with quiet_pipe():
            show_groups(found.rows, args.by)
        if args.csv:
            write_results(args.csv, found.rows, about=("experiment", "group"))
            print(f"table: {args.csv}")
        if args.html:
            print(f"page: {write_index(args.html, found, args.by)}")
        if args.tensorboard:
            from mamba.runs.tensorboard import pinned_link
            from ray_jobs.report.logdir import write_logdir

            there = write_logdir(args.tensorboard, found, args.folders, args.by)
            print(f"compare in TensorBoard: tensorboard --logdir {there}\n  curves, accuracy first: {pinned_link()}")
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
