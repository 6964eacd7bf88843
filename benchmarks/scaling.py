"""Several GPUs against one, at the same batch per GPU: the whole recipe through the Trainer.

    python benchmarks/scaling.py --root CIFAR10                     # 1 GPU, then all of this machine
    python benchmarks/scaling.py --gpus 1 2 4 --batches 128 1024 --model mamba_small --mode recorded --json scaling.json
    python benchmarks/scaling.py --gpus 1 2 --gradients flat ddp    # both ways of averaging gradients over GPUs

Each count is a start of torchrun, which runs the cases one after the other; what is timed is said in
benchmarks/train_step.py. `ratio` is to the first count at the same batch. Without a GPU the processes share the CPU and
talk through gloo, which shows that it runs and nothing else.
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
from mamba.train.gradients import CHOICE


def run_cases(cases: list[dict[str, Any]]) -> None:
    """What each process does; rank 0 prints a line a case."""
    process = torchrun_process()
    for case in cases:
        if case["gradients"]:
            os.environ[CHOICE] = case["gradients"]
        result = run_case({**case, "batch": case["batch"] * process.world_size}, process)
        torch._dynamo.reset()  # the next case's shapes are not those of this one
        if process.rank == 0:
            print(json.dumps(result), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=sorted({1, max(1, torch.cuda.device_count())}))
    parser.add_argument("--model", default="mamba_small")
    parser.add_argument("--batches", nargs="+", type=int, default=[1024], help="images per GPU and step")
    parser.add_argument("--gradients", nargs="+", choices=["flat", "ddp"], help="how they are averaged over GPUs")
    parser.add_argument("--mode", choices=list(MODES), default=FASTEST)
    parser.add_argument("--dataset", default="folder")
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps an epoch; 0: all")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print rank 0's N longest kernels")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cases:
        run_cases(json.loads(args.cases))
        return
    report: dict[str, Any] = {"hardware": hardware(), "command": " ".join(sys.argv), "rows": []}
    print(" ".join(f"{k}={v}" for k, v in report["hardware"].items()))
    print(f"{'GPUs':>5} {'batch':>6} {'gradients':>9} {'images/s':>9} {'slowest':>8} {'fastest':>8} {'ratio':>6} "
          f"{'per GPU':>8}")  # fmt: skip
    common = {"model": args.model, "mode": args.mode, "dataset": args.dataset, "root": str(args.root),
              "epochs": args.epochs, "steps": args.steps, "profile": args.profile, "scan": "auto",
              "overrides": {}}  # fmt: skip
    for count in args.gpus:
        ways = args.gradients if args.gradients and count > 1 else [None]
        cases = [{**common, "batch": batch, "gradients": way} for batch in args.batches for way in ways]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
        done = subprocess.run([*command, "--cases", json.dumps(cases)], env=os.environ, capture_output=True, text=True)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        for case, result in zip(cases, found, strict=False):
            row = {"gpus": count, "batch": case["batch"], "gradients": case["gradients"], **result}
            report["rows"].append(row)
            first = next(r for r in report["rows"] if r["batch"] == case["batch"])
            print(f"{count:>5} {row['batch']:>6} {row['gradients'] or '-':>9} {row['images_per_s']:9.0f} "
                  f"{row['slowest']:8.0f} {row['fastest']:8.0f} {row['images_per_s'] / first['images_per_s']:6.2f} "
                  f"{row['images_per_s'] / count:8.0f}", flush=True)  # fmt: skip
        if done.returncode:
            print(f"{count:>5} failed: {done.stderr.strip()[-600:]}")
        if args.profile:
            print(done.stderr[-4000:], flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
