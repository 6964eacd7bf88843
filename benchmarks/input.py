"""Time the making of training batches alone: loader processes against the device path.

    python benchmarks/input.py --root CIFAR10                       # an image folder; or --dataset cifar10, digits
    python benchmarks/input.py --dataset digits --augment basic autoaugment --workers 0 1 --json input.json

A case makes an epoch's batches, normalised and on the device, mixing left out; `images/s` is the median of `--epochs`
epochs after one that is not timed, with the slowest and the fastest. `loader N` has N loader processes (torchvision on
Pillow images), `device` is the path of `data.device` gpu, which runs on a CPU too where there is no GPU. The recipe's
AutoAugment and erasing at 0.25 are the default.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project, wherever this is run from

from mamba.config.schema import RunConfig
from mamba.data.device_loader import make_train_batches
from mamba.data.images import ImageData
from mamba.data.registry import load_data
from mamba.runs.environment import environment
from mamba.train.distributed import local_process, own_device


def measure(config: RunConfig, data: ImageData, epochs: int) -> dict[str, float]:
    process = local_process()
    batches = make_train_batches(data, config.data, config.seed, 1, 0, 1, process.cpus, process.device)
    speeds = []
    for epoch in range(1 + epochs):
        began, images = time.perf_counter(), 0
        for part, labels in batches.epoch(epoch):
            part, labels = part.to(process.device, non_blocking=True), labels.to(process.device, non_blocking=True)
            images += len(labels)
        if process.device.type == "cuda":
            torch.cuda.synchronize()
        if epoch:
            speeds.append(images / (time.perf_counter() - began))
    low_high = {"images_per_s_low": min(speeds), "images_per_s_high": max(speeds)}
    return {"images_per_s": statistics.median(speeds), **low_high}


def rows(
    augments: Sequence[str],
    workers: Sequence[int],
    dataset: str = "folder",
    root: str = "data",
    side: int = 32,
    batch: int = 128,
    erasing: float = 0.25,
    epochs: int = 3,
) -> Iterator[dict[str, Any]]:
    """A row an augmentation and way: so many loader processes, or the device path."""
    values = {"data.dataset": dataset, "data.root": Path(root), "data.img_size": side, "data.batch_size": batch,
              "data.random_erasing": erasing}  # fmt: skip
    base = RunConfig().with_values(values).resolve()
    data = load_data(base.data, base.seed)
    ways = {f"loader {n}": {"data.device": "cpu", "data.loader_workers": n} for n in workers}
    for augment in augments:
        for way, chosen in {**ways, "device": {"data.device": "gpu"}}.items():
            row = measure(base.with_values({"data.augment": augment, **chosen}), data, epochs)
            yield {"augment": augment, "way": way, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="folder")
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--augment", nargs="+", default=["none", "basic", "randaugment", "autoaugment"])
    parser.add_argument("--erasing", type=float, default=0.25)
    parser.add_argument("--workers", nargs="+", type=int, default=[max(1, min(16, (os.cpu_count() or 2) - 1))])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {**environment(own_device()), "command": " ".join(sys.argv), "rows": []}
    print(json.dumps(report["hardware"]), json.dumps(report["versions"]))
    print(f"{'augment':>12} {'way':>10} {'images/s':>9} {'slowest':>8} {'fastest':>8}")
    for row in rows(args.augment, args.workers, args.dataset, args.root, args.side, args.batch, args.erasing,
                    args.epochs):  # fmt: skip
        report["rows"].append(row)
        print(f"{row['augment']:>12} {row['way']:>10} {row['images_per_s']:9.0f} {row['images_per_s_low']:8.0f} "
              f"{row['images_per_s_high']:8.0f}", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
