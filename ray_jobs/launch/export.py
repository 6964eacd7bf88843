"""export.py's work: a run's model, without the units that its masks take, in another format."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from mamba.models.model import count_parameters
from mamba.predict.export import FORMATS, ROUNDS, export
from mamba.predict.predictor import Predictor
from pruning.store import load_smaller


def export_run(args: Namespace) -> int:
    """Write, compare, and say so; returns 0. `args`: of ray_jobs/export.py. Raises ForgeError."""
    smaller, description = load_smaller(args.run)
    predictor = Predictor(smaller.model, description, str(args.run))
    path = args.out or Path(f"{args.run.resolve().name}{FORMATS[args.format]}")
    found = export(predictor, args.format, path)
    side, opset = predictor.transform.side, f", opset {found.opset}" if found.opset else ""
    size = found.path.stat().st_size / 2**10
    told = f"{size / 2**10:.1f} MiB" if size >= 2**10 else f"{size:.0f} KiB"
    print(f"{found.path}: {count_parameters(smaller.model):,} parameters, {told}{opset}")
    print(f"input: images, float32 (any batch, 3, {side}, {side}), normalised by the mean and std in the file")
    print(f"logits differ from ours by at most {found.difference:.1e}")
    print(
        f"one image on this CPU ({torch.get_num_threads()} threads): {found.ms} by the file, {found.ours_ms} by ours; "
        f"each the median of {ROUNDS} (lowest to highest)"
    )
    if args.format == "torch_export":
        print("to load it: import mamba.ops.scan, then torch.export.load; it runs on a CPU")
    return 0
