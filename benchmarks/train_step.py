"""Time real training: the whole recipe through the Trainer, from the images to the updated average of the weights.

    python benchmarks/train_step.py --root CIFAR10                              # an image folder; or --dataset cifar10
    python benchmarks/train_step.py --models mamba_small --batches 128 --modes recorded compiled plain --json out.json
    python benchmarks/train_step.py --cold                                      # with an empty compile cache
    python benchmarks/train_step.py --dataset digits --models mamba_tiny --batches 16 --steps 5 --epochs 1   # on a CPU

Every case is a process of its own: preset v2, its first epoch for compilation and warm-up, then `--epochs` epochs that
are timed with validation left out. `images/s` is the median epoch, with the slowest and the fastest. `wait` is the part
of the time that the device spends on making batches or waiting for them. `first step` counts from the making of the
trainer to the end of the first optimizer step (importing torch left out), the data already decoded. `memory` is the
most that tensors took. Modes: `recorded` (compiled blocks in a CUDA graph), `compiled`, `graph` (recorded, not
compiled), `plain`; `uneven` is `recorded` with different widths in every block, as pruning leaves them. `--profile N`
prints the N kernels that take the most time in three steps. `--scan` puts another scan into the same training:
`reference` (the plain loop over tokens), `two_phase`, or `mamba_ssm` where it is importable.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mamba.errors import ForgeError
from mamba.train.distributed import Process, local_process

MODES = {
    "recorded": {"optim.compile": True, "optim.cuda_graph": True},
    "uneven": {"optim.compile": True, "optim.cuda_graph": True},
    "compiled": {"optim.compile": True, "optim.cuda_graph": False},
    "graph": {"optim.compile": False, "optim.cuda_graph": True},
    "plain": {"optim.compile": False, "optim.cuda_graph": False},
}
FASTEST = "recorded" if torch.cuda.is_available() else "plain"  # of those that this machine can


def uneven_checkpoint(folder: Path, model: str, classes: int, side: int) -> Path:
    """New weights of a model each of whose blocks keeps another 50 to 100 % of its widths."""
    from dataclasses import replace

    from mamba.config.schema import ModelConfig
    from mamba.models.model import Architecture, MambaModel
    from mamba.runs.checkpoint import save_checkpoint

    whole = Architecture.from_config(ModelConfig(name=model), classes, side)
    shapes = []
    for i, b in enumerate(whole.blocks):
        share = 0.5 + 0.5 * i / len(whole.blocks)
        shapes.append(replace(b, d_inner=int(share * b.d_inner), mlp_hidden=int((1.5 - share) * b.mlp_hidden)))
    model_ = MambaModel(replace(whole, blocks=tuple(shapes)))
    description = {"epoch": 0, "metrics": {}, "weights": "raw", "classes": [str(i) for i in range(classes)],
                   "mean": [0.5] * 3, "std": [0.25] * 3, "config": {}}  # fmt: skip
    return save_checkpoint(folder / "uneven", model_, None, description, None)


def use_scan(name: str) -> None:
    """Let one-way mixers of this process scan by a backend, or by mamba-ssm's own function."""
    import mamba.models.ssm

    if name == "mamba_ssm":
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        mamba.models.ssm.selective_scan = selective_scan_fn
    elif name != "auto":
        mamba.models.ssm.selective_scan = partial(mamba.models.ssm.selective_scan, backend=name)  # type: ignore[assignment]


def run_case(case: dict[str, Any], process: Process) -> dict[str, Any]:
    """One case in this process, which may be one of several that train together."""
    from mamba.config.presets import get_preset
    from mamba.data.registry import load_data
    from mamba.train.trainer import Trainer

    values = {
        "data.dataset": case["dataset"],
        "data.root": Path(case["root"]),
        "data.img_size": 32,
        "data.batch_size": case["batch"],
        "model.name": case["model"],
        **MODES[case["mode"]],
        **case["overrides"],
    }
    gpu = process.device.type == "cuda"
    use_scan(case["scan"])
    with tempfile.TemporaryDirectory() as scratch:
        config = get_preset("v2").with_values({**values, "out": Path(scratch)}).resolve()
        data = load_data(config.data, config.seed)
        if case["mode"] == "uneven":
            path = uneven_checkpoint(Path(scratch), case["model"], len(data.classes), 32)
            config = config.with_values({"model.checkpoint": path})
        began = time.perf_counter()
        trainer = Trainer(config, process, Path(scratch), data)
        first: list[float] = []
        take = trainer.train_step

        def first_step(batches):
            result = take(batches)
            result[0].item()
            first.append(time.perf_counter() - began)
            del trainer.train_step  # the class's own again; a bound method kept here would be a cycle
            return result

        trainer.train_step = first_step
        speeds, waits = [], []
        for epoch in range(1 + case["epochs"]):
            trainer.model.train()
            if case["steps"]:
                steps = min(trainer.steps_per_epoch, case["steps"])
                trainer.steps_per_epoch = trainer.monitor.steps_per_epoch = steps
            trainer.epoch, trainer.step = epoch, 0
            trainer.train_epoch()
            metrics = trainer.epoch_metrics()
            if epoch:
                speeds.append(metrics["train/images_per_s"])
                waits.append(metrics["train/data_wait_percent"])
        if case["profile"]:
            profile(trainer, case["profile"])
        result = {
            "images_per_s": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "wait_percent": statistics.median(waits),
            "first_step_s": first[0],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
            "reserved_gib": torch.cuda.memory_reserved() / 2**30 if gpu else None,
            "last_loss": metrics["train/loss"],
            "skipped": metrics["train/skipped_steps"],
        }
        trainer.close()
    return result


def profile(trainer: Any, rows: int) -> None:
    trainer.step = 0
    steps = trainer.steps()
    batches = next(steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            trainer.train_step(batches)
        torch.cuda.synchronize()
    if trainer.process.rank:
        return
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    total, count = sum(e.self_device_time_total for e in events) / 3e3, sum(e.count for e in events) / 3
    print(f"  {total:.2f} ms in {count:.0f} kernels a step", file=sys.stderr)
    for e in events[:rows]:
        print(f"  {e.self_device_time_total / 3e3:8.3f} ms {e.count / 3:6.0f} x  {e.key[:110]}", file=sys.stderr)


def hardware() -> dict[str, str]:
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    found = {"device": name, "torch": torch.__version__, "date": date.today().isoformat()}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mamba_tiny", "mamba_small", "mamba_base"])
    parser.add_argument("--batches", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=[FASTEST])
    parser.add_argument("--dataset", default="folder")
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs, after one that is not")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps an epoch; 0: all")
    parser.add_argument("--cold", action="store_true", help="give every case an empty compile cache")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config values, as data.device=cpu")
    parser.add_argument("--profile", type=int, default=0, metavar="N")
    parser.add_argument("--scan", choices=["auto", "reference", "two_phase", "mamba_ssm"], default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        try:
            print(json.dumps(run_case(json.loads(args.case), local_process())))
        except ForgeError as error:
            raise SystemExit(str(error)) from None
        return

    report: dict[str, Any] = {"hardware": hardware(), "command": " ".join(sys.argv), "rows": []}
    print(" ".join(f"{k}={v}" for k, v in report["hardware"].items()))
    print(f"{'model':>12} {'batch':>6} {'mode':>9} {'images/s':>9} {'slowest':>8} {'fastest':>8} "
          f"{'wait %':>7} {'first step s':>12} {'memory GiB':>10}")  # fmt: skip
    overrides = {key: json.loads(value) if value[:1] in "0123456789tfn" else value
                 for key, value in (item.split("=", 1) for item in args.set)}  # fmt: skip
    for model in args.models:
        for batch in args.batches:
            for mode in args.modes:
                case = {"model": model, "batch": batch, "mode": mode, "dataset": args.dataset, "root": str(args.root),
                        "epochs": args.epochs, "steps": args.steps, "profile": args.profile, "scan": args.scan,
                        "overrides": overrides}  # fmt: skip
                with tempfile.TemporaryDirectory() as empty:
                    caches = ("MAMBA_FORGE_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
                    env = {**os.environ, **(dict.fromkeys(caches, empty) if args.cold else {})}
                    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], env=env,
                                          capture_output=True, text=True)  # fmt: skip
                if done.returncode:
                    print(f"{model:>12} {batch:>6} {mode:>9} failed: {done.stderr.strip()[-600:]}", flush=True)
                    continue
                row = json.loads(done.stdout.splitlines()[-1])
                report["rows"].append({"model": model, "batch": batch, "mode": mode, **row})
                memory = f"{row['peak_gib']:10.2f}" if row["peak_gib"] else f"{'-':>10}"
                print(f"{model:>12} {batch:>6} {mode:>9} {row['images_per_s']:9.0f} {row['slowest']:8.0f} "
                      f"{row['fastest']:8.0f} {row['wait_percent']:7.2f} {row['first_step_s']:12.1f} {memory}",
                      flush=True)  # fmt: skip
                if args.profile:
                    print(done.stderr[-6000:], flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
