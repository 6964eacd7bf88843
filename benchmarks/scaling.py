"""Several GPUs against one, at the same batch per GPU: the whole recipe through the Trainer.

    python benchmarks/scaling.py --root CIFAR10                     # 1 GPU, then all of this machine
    python benchmarks/scaling.py --gpus 1 2 4 --batch 1024 --model mamba_small --mode recorded --json scaling.json

Each count is a start of torchrun; what is timed is said in benchmarks/train_step.py. `ratio` is to the first count.
Without a GPU the processes share the CPU and talk through gloo, which shows that it runs and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from train_step import FASTEST, MODES, hardware, run_case

from mamba.train.distributed import torchrun_process


def worker_main(case: dict[str, Any]) -> None:
    process = torchrun_process()
    result = run_case({**case, "batch": case["batch"] * process.world_size}, process)
    if process.rank == 0:
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=sorted({1, max(1, torch.cuda.device_count())}))
    parser.add_argument("--model", default="mamba_small")
    parser.add_argument("--batch", type=int, default=1024, help="images per GPU and step")
    parser.add_argument("--mode", choices=list(MODES), default=FASTEST)
    parser.add_argument("--dataset", default="folder")
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps an epoch; 0: all")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print rank 0's N longest kernels")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        worker_main(json.loads(args.case))
        return
    report: dict[str, Any] = {"hardware": hardware(), "command": " ".join(sys.argv), "rows": []}
    print(" ".join(f"{k}={v}" for k, v in report["hardware"].items()))
    print(f"{'GPUs':>5} {'images/s':>9} {'slowest':>8} {'fastest':>8} {'ratio':>6} {'per GPU':>8}")
    case = {"model": args.model, "batch": args.batch, "mode": args.mode, "dataset": args.dataset,
            "root": str(args.root), "epochs": args.epochs, "steps": args.steps, "profile": args.profile,
            "scan": "auto", "overrides": {}}  # fmt: skip
    for count in args.gpus:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
        done = subprocess.run([*command, "--case", json.dumps(case)], env=os.environ, capture_output=True, text=True)
        if done.returncode:
            print(f"{count:>5} failed: {done.stderr.strip()[-600:]}")
            continue
        row = {"gpus": count, **json.loads(done.stdout.splitlines()[-1])}
        report["rows"].append(row)
        ratio = row["images_per_s"] / report["rows"][0]["images_per_s"]
        print(f"{count:>5} {row['images_per_s']:9.0f} {row['slowest']:8.0f} {row['fastest']:8.0f} {ratio:6.2f} "
              f"{row['images_per_s'] / count:8.0f}", flush=True)  # fmt: skip
        if args.profile:
            print(done.stderr[-4000:], flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
