"""A trained model, dense or pruned, in a format that others read: ONNX, torch.export or safetensors.

python ray_jobs/export.py runs/quickstart/first --format onnx --out digits.onnx
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
    parser.add_argument("--format", choices=("onnx", "torch_export", "safetensors"), default="onnx")
    parser.add_argument("--out", type=Path, default=None, help="the file (the run's name, with the format's ending)")
    args = parser.parse_args(argv)

    def work() -> int:
        from ray_jobs.launch.export import export_run

        return export_run(args)

    return exit_code(work, "stopped")


if __name__ == "__main__":
    sys.exit(main())
