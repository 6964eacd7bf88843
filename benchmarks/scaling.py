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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project, wherever this is run from

from benchmarks.train_step import FASTEST, MODES, run_case
from mamba.runs.environment import environment
from mamba.train.distributed import own_device, torchrun_process
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


def rows(
    gpus: Sequence[int],
    batches: Sequence[int],
    model: str = "mamba_small",
    gradients: Sequence[str] = (),
    mode: str = FASTEST,
    dataset: str = "folder",
    root: str = "data",
    epochs: int = 3,
    steps: int = 0,
    profile: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """A row a count of GPUs, batch a GPU, and way of averaging gradients."""
    common = {"model": model, "mode": mode, "dataset": dataset, "root": str(root), "epochs": epochs, "steps": steps,
              "profile": profile, "scan": "default", "overrides": dict(overrides or {})}  # fmt: skip
    firsts: dict[int, float] = {}
    for count in gpus:
        ways = gradients if gradients and count > 1 else [None]
        cases = [{**common, "batch": batch, "gradients": way} for batch in batches for way in ways]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
        done = subprocess.run([*command, "--cases", json.dumps(cases)], env=os.environ, capture_output=True, text=True)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        for case, result in zip(cases, found, strict=False):
            row = {"model": model, "gpus": count, "batch": case["batch"], "gradients": case["gradients"] or "-"}
            first = firsts.setdefault(case["batch"], result["images_per_s"])
            yield row | result | {"ratio": result["images_per_s"] / first}
        if done.returncode:
            row = {"model": model, "gpus": count, "batch": cases[len(found)]["batch"] if len(found) < len(cases) else 0}
            yield row | {"gradients": "-", "images_per_s": f"failed: {done.stderr.strip()[-600:]}"}
        if profile:
            print(done.stderr[-4000:], flush=True)


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
    report: dict[str, Any] = {**environment(own_device()), "command": " ".join(sys.argv), "rows": []}
    print(json.dumps(report["hardware"]), json.dumps(report["versions"]))
    print(f"{'GPUs':>5} {'batch':>6} {'gradients':>9} {'images/s':>9} {'slowest':>8} {'fastest':>8} {'ratio':>6} "
          f"{'per GPU':>8}")  # fmt: skip
    for row in rows(args.gpus, args.batches, args.model, args.gradients or (), args.mode, args.dataset, args.root,
                    args.epochs, args.steps, args.profile):  # fmt: skip
        report["rows"].append(row)
        if isinstance(row["images_per_s"], str):
            print(f"{row['gpus']:>5} {row['images_per_s']}", flush=True)
            continue
        print(f"{row['gpus']:>5} {row['batch']:>6} {row['gradients']:>9} {row['images_per_s']:9.0f} "
              f"{row['images_per_s_low']:8.0f} {row['images_per_s_high']:8.0f} {row['ratio']:6.2f} "
              f"{row['images_per_s'] / row['gpus']:8.0f}", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
