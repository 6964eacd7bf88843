"""The models side by side: parameters, multiply-accumulates, images per second forward and in training; and what memory
and time cost against the image's size, which the Vision Mamba paper says grow linearly with its area.

    python benchmarks/models.py --json models.json --figure models.png              # on a GPU: the table, the figure
    python benchmarks/models.py --models mamba_small mamba_small:bidirectional --img-size 32 --batch 1024 --sizes 32
    python benchmarks/models.py --models vim_tiny --img-size 32 --batch 4 --train-batch 4 --sizes 32 64 --seconds 0.2

A model is a named size, or `size:mixer`. `forward` is the median of replays of one CUDA graph in eval mode, `training`
the median step of forward, cross-entropy, backward and AdamW on random images, blocks compiled unless `--plain`, the
whole step recorded as in the trainer; both in bf16 autocast on a GPU, in float32 on a CPU. Memory is the most that a
pass of `--size-batch` images took beyond what was there before it (weights, gradients, images), divided by their
number, without torch.compile; a CPU does not count it. What does not fit is reported as such.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba.config.schema import ModelConfig, OptimConfig
from mamba.models.model import MambaModel, count_parameters, named_model
from mamba.ops.update import make_update
from mamba.runs.environment import environment
from mamba.train.compilation import compile_blocks
from mamba.train.distributed import own_device
from mamba.train.optim import make_optimizer
from mamba.train.record import WARM_UP, Batches, RecordedStep
from pruning.measure import speed

SIZED = ("vim_tiny", "vim_small", "mamba_small")
CLASSES = 1000
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vim_tiny", "vim_small", "vim_base", "mamba_small"])
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256, help="images of a forward pass")
    parser.add_argument("--train-batch", type=int, default=128, help="images of a training step")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each speed is timed")
    parser.add_argument("--plain", action="store_true", help="train without torch.compile")
    parser.add_argument("--sized", nargs="*", default=None, help=f"models to enlarge images for; default: {SIZED}")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448, 624, 832, 1040, 1248])
    parser.add_argument("--size-batch", type=int, default=4, help="images of a pass at each of --sizes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    device = own_device()
    torch.backends.cuda.matmul.allow_tf32 = True
    about = {"command": " ".join(["python", *sys.argv]), "date": date.today().isoformat(), **environment(device)}
    print(json.dumps(about["hardware"]), json.dumps(about["versions"]))
    models = []
    for name in args.models:
        models.append(side_by_side(name, args, device))
        show(models[-1], first=len(models) == 1)
    sized = [name for name in SIZED if name in args.models] if args.sized is None else args.sized
    sizes = []
    for name in sized:
        for side in args.sizes:
            sizes.append(at_size(name, side, args.size_batch, device))
            show(sizes[-1], first=len(sizes) == 1)
    if args.json:
        args.json.write_text(json.dumps({"about": about, "models": models, "sizes": sizes}, indent=1) + "\n")
    if args.figure and sizes:
        draw(sizes, args.figure)


def build(name: str, side: int, device: torch.device) -> MambaModel:
    """`vim_tiny` or `mamba_small:bidirectional`; on large images all have patches of the size that they have at 224."""
    size, _, mixer = name.partition(":")
    torch.manual_seed(0)
    config = ModelConfig(name=size, mixer=mixer or None)  # type: ignore[arg-type]
    return named_model(config.name, CLASSES, side, mixer=config.mixer).to(device)


def side_by_side(name: str, args: argparse.Namespace, device: torch.device) -> Row:
    """A row of the table."""
    model = build(name, args.img_size, device)
    row: Row = {"model": name, "params": count_parameters(model), "macs": model.architecture.macs()}
    row["tokens"] = model.architecture.num_tokens
    row["forward_images_per_s"] = unless_too_large(lambda: forward_speed(model, args.batch, args.seconds))
    if not args.plain:
        compile_blocks(model)
    row["training_images_per_s"] = unless_too_large(
        lambda: args.train_batch / training_seconds(model, args.train_batch, args.seconds)
    )
    return row


def training_seconds(model: MambaModel, batch: int, seconds: float) -> float:
    """Median seconds of a step, after a warm-up that compiles."""
    device = model.head.weight.device
    step = training_step(model, batch)
    for _ in range(WARM_UP + 2):
        step()
    times: list[float] = []
    ends = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < ends:
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def training_step(model: MambaModel, batch: int) -> Callable[[], object]:
    """Forward, loss, backward, AdamW on the same random images."""
    optimizer = make_optimizer(model.train(), OptimConfig())
    images, labels = random_batch(model, batch)
    if not images.is_cuda:

        def step() -> None:
            backward(model, images, labels)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step
    update = make_update(optimizer, None, clip=None, fused=True)
    rate, finite = torch.tensor(1e-4, device=images.device), torch.tensor(True, device=images.device)

    def device_step(batches: Batches) -> tuple[Tensor, Tensor]:
        ((images, labels),) = batches
        loss = backward(model, images, labels)
        norm = update.norm()
        update.apply(rate, norm, finite)
        optimizer.zero_grad(set_to_none=True)
        return loss, norm

    recorded = RecordedStep(device_step, update.fill_in)
    return lambda: recorded([(images, labels)])


def random_batch(model: MambaModel, batch: int) -> tuple[Tensor, Tensor]:
    device, side = model.head.weight.device, model.base.img_size
    return torch.randn(batch, 3, side, side, device=device), torch.randint(CLASSES, (batch,), device=device)


def forward(model: MambaModel, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.is_cuda):
        return model(images).float()


def backward(model: MambaModel, images: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(forward(model, images), labels)
    loss.backward()
    return loss.detach()


def at_size(name: str, side: int, batch: int, device: torch.device) -> Row:
    """Memory of an image, forward and in training, and images per second forward, at an image size."""
    model = build(name, side, device).eval()
    a = model.architecture
    images, labels = random_batch(model, batch)
    row: Row = {"model": name, "img_size": side, "tokens": a.num_tokens, "macs": a.macs()}
    with torch.no_grad():
        row["forward_images_per_s"] = unless_too_large(lambda: forward_speed(model, batch, 0.3))
        row["forward_mib_per_image"] = unless_too_large(lambda: peak_mib(lambda: forward(model, images), images))
    model.train()
    for p in model.parameters():  # there before the pass, and no part of what an image takes
        p.grad = torch.zeros_like(p)
    row["training_mib_per_image"] = unless_too_large(lambda: peak_mib(lambda: backward(model, images, labels), images))
    return row


def forward_speed(model: MambaModel, batch: int, seconds: float) -> float:
    return speed(model, batch, seconds, torch.bfloat16 if model.head.weight.is_cuda else None)["bench/images_per_s"]


def peak_mib(run: Callable[[], object], images: Tensor) -> float | None:
    """What a pass takes beyond what is there before it, in MiB an image; None on a CPU."""
    device = images.device
    if device.type != "cuda":
        return None
    run()  # the first pass also sets up libraries
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20 / len(images)


def unless_too_large(measure: Callable[[], float | None]) -> float | str | None:
    try:
        return measure()
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        release()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(row: Row, first: bool) -> None:
    """One line, under a heading at first."""
    if first:
        print("  ".join(f"{key:>{max(14, len(key))}}" for key in row))
    cells = {k: f"{v:,.1f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for k, v in row.items()}
    print("  ".join(f"{cell or '-'!s:>{max(14, len(key))}}" for key, cell in cells.items()), flush=True)


def draw(sizes: Sequence[Row], path: Path) -> None:
    """Memory an image, and time an image, against the number of tokens: a straight line is linear growth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = {
        "forward_mib_per_image": "memory of an image, forward, MiB",
        "training_mib_per_image": "memory of an image, training, MiB",
        "forward_images_per_s": "time of an image, forward, ms",
    }
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        for name in dict.fromkeys(row["model"] for row in sizes):
            rows = [row for row in sizes if row["model"] == name and isinstance(row[key], float)]
            values = [1000 / row[key] if key.endswith("per_s") else row[key] for row in rows]
            axis.plot([row["tokens"] for row in rows], values, "o-", markersize=4, label=name)
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    marks = {row["tokens"]: row["img_size"] for row in sizes}
    top = axes[0].secondary_xaxis("top")
    top.set_xticks(list(marks), [str(side) for side in marks.values()], rotation=60, fontsize=7)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
