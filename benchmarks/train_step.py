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
`loop` (the plain loop over tokens), or `mamba_ssm` where it is importable.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project, wherever this is run from

from benchmarks.others import has_mamba_ssm
from benchmarks.side_by_side import scanning
from mamba.errors import ForgeError
from mamba.runs.environment import environment
from mamba.train.distributed import Process, local_process, own_device

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
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as scratch, scanning(case["scan"]):
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
            "images_per_s_low": min(speeds),
            "images_per_s_high": max(speeds),
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


def rows(
    models: Sequence[str],
    batches: Sequence[int],
    modes: Sequence[str] = (FASTEST,),
    scans: Sequence[str] = ("default",),
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    dataset: str = "folder",
    root: str = "data",
    epochs: int = 3,
    steps: int = 0,
    profile: int = 0,
    cold: bool = False,
    isolated: bool = True,
) -> Iterator[dict[str, Any]]:
    """A row a case: model, batch, mode, scan, variant. `variants`: name -> config values, by dotted keys.
    `isolated`: each in a process of its own, so that none finds what another left."""
    for model, batch, mode, scan, (variant, values) in itertools.product(
        models, batches, modes, scans, (variants or {"-": {}}).items()
    ):
        if scan == "mamba_ssm" and not has_mamba_ssm():
            continue
        case = {"model": model, "batch": batch, "mode": mode, "dataset": dataset, "root": str(root), "scan": scan,
                "epochs": epochs, "steps": steps, "profile": profile, "overrides": dict(values)}  # fmt: skip
        row = {"model": model, "batch": batch, "mode": mode, "scan": scan, "variant": variant}
        if not isolated:
            yield row | run_case(case, local_process())
            continue
        with tempfile.TemporaryDirectory() as empty:
            caches = ("MAMBA_FORGE_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
            env = {**os.environ, **(dict.fromkeys(caches, empty) if cold else {})}
            done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], env=env,
                                  capture_output=True, text=True)  # fmt: skip
        if done.returncode:
            yield row | {"images_per_s": f"failed: {done.stderr.strip()[-600:]}"}
            continue
        if profile:
            print(done.stderr[-6000:], flush=True)
        yield row | json.loads(done.stdout.splitlines()[-1])


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
    parser.add_argument("--scan", choices=["default", "loop", "mamba_ssm"], default="default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        try:
            print(json.dumps(run_case(json.loads(args.case), local_process())))
        except ForgeError as error:
            raise SystemExit(str(error)) from None
        return

    report: dict[str, Any] = {**environment(own_device()), "command": " ".join(sys.argv), "rows": []}
    print(json.dumps(report["hardware"]), json.dumps(report["versions"]))
    print(f"{'model':>12} {'batch':>6} {'mode':>9} {'images/s':>9} {'slowest':>8} {'fastest':>8} "
          f"{'wait %':>7} {'first step s':>12} {'memory GiB':>10}")  # fmt: skip
    overrides = {key: json.loads(value) if value[:1] in "0123456789tfn" else value
                 for key, value in (item.split("=", 1) for item in args.set)}  # fmt: skip
    for row in rows(args.models, args.batches, args.modes, [args.scan], {"-": overrides}, args.dataset, args.root,
                    args.epochs, args.steps, args.profile, args.cold):  # fmt: skip
        report["rows"].append(row)
        line = f"{row['model']:>12} {row['batch']:>6} {row['mode']:>9} "
        if isinstance(row["images_per_s"], str):
            print(line + row["images_per_s"], flush=True)
            continue
        memory = f"{row['peak_gib']:10.2f}" if row["peak_gib"] else f"{'-':>10}"
        print(f"{line}{row['images_per_s']:9.0f} {row['images_per_s_low']:8.0f} {row['images_per_s_high']:8.0f} "
              f"{row['wait_percent']:7.2f} {row['first_step_s']:12.1f} {memory}", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
