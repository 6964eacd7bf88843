"""What a trained model, dense or pruned, says of images: a line for each in a CSV file.

python ray_jobs/predict.py runs/quickstart/first photos/ --out predictions.csv
python ray_jobs/predict.py runs/flowers/first flowers/test --out test.csv     # folders called as classes: accuracy too
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ray_jobs.launch.ending import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for an error of the user's, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, or a checkpoint's")
    parser.add_argument("images", nargs="+", help="images, folders of images, or patterns such as 'photos/*.jpg'")
    parser.add_argument("--out", type=Path, default=Path("predictions.csv"), help="the table (predictions.csv)")
    parser.add_argument("--top", type=int, default=5, help="classes to name for each image (5)")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a forward pass (64)")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--weights", choices=("best", "raw", "ema"), default="best", help="which weights (best)")
    parser.add_argument("--views", type=int, default=1, help="views of each image to average, up to 10 (1)")
    parser.add_argument("--unlabelled", action="store_true", help="names of folders are no classes")
    args = parser.parse_args(argv)

    def work() -> int:
        from ray_jobs.report.predict_files import predict_files

        return predict_files(args)

    return exit_code(work, "stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
