"""The models side by side at several image sizes: forward, training, memory of an image; and the ways to scan in one.

A model is a named size, `vit_small` (DeiT-S, ViT-S: benchmarks/others.py) or `resnet50`, and how it mixes tokens:
`fused` or `plain` attention; `default` scan, `mamba_ssm` (its kernel, where it is importable) or `loop`, the way
of the project's prototype: a loop over tokens in Python (our reference). Training is forward, cross-entropy, backward
and AdamW on random images, recorded as one CUDA graph but for the loop; forward is replayed from one. Both in bf16 on a
GPU, in float32 on a CPU. Nothing is compiled unless `compile` is set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mamba.models.ssm
from benchmarks import others
from benchmarks.timing import Row, fitting, forward, peak_mib, replayed, seconds_of, with_range
from mamba.config.schema import OptimConfig
from mamba.errors import TrainingError
from mamba.models.model import MambaModel, count_parameters, named_model
from mamba.ops.candidates import ON
from mamba.ops.update import make_update
from mamba.train.compilation import compile_blocks
from mamba.train.distributed import own_device
from mamba.train.optim import make_optimizer
from mamba.train.record import Batches, RecordedStep

CLASSES = 1000


def rows(
    models: Sequence[str],
    sizes: Sequence[int],
    batch: int,
    memory_batch: int,
    loop_batch: int,
    loop_size: int,
    seconds: float,
    compile: bool = False,
    **overrides: object,
) -> Iterator[Row]:
    """A row a model (`vit_small:plain`, `mamba_small:loop`) and size.

    batch: images at the smallest of `sizes`; at larger ones as many as have about as many pixels, fewer where that does
    not fit. The loop: `loop_batch` images, up to `loop_size` pixels. overrides: of `ModelConfig`, for toys.
    """
    device = own_device()
    for name in models:
        size, _, how = name.partition(":")
        how = how or ("fused" if size == "vit_small" else "-" if size == "resnet50" else "default")
        if how == "mamba_ssm" and not others.has_mamba_ssm():
            continue
        for side in sizes:
            if how == "loop" and side > loop_size:
                continue
            images = loop_batch if how == "loop" else max(1, round(batch * (sizes[0] / side) ** 2))
            make = partial(build, size, how, side, **overrides)
            row: Row = {"model": size, "how": how, "img_size": side, "compiled": compile}
            with scanning(how):
                row |= facts(make)
                row |= fitting(partial(forward_row, make, device, seconds), images, "forward_images_per_s")
                steps = partial(training_row, make, device, seconds, how != "loop", compile)
                row |= fitting(steps, images, "training_images_per_s")
                row |= fitting(partial(memory_row, make, device), memory_batch, "training_mib_per_image")
            yield row


def build(size: str, how: str, side: int, **overrides: object) -> nn.Module:
    """On large images all have patches of the size that they have at 224."""
    torch.manual_seed(0)
    if size in others.OTHERS:
        return others.other(size, CLASSES, side, how != "plain", toy=bool(overrides))
    return named_model(size, CLASSES, side, **overrides)  # type: ignore[arg-type]


def made(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """On the device from the start: weights drawn on a CPU take longer than what is timed."""
    with device:
        return make().to(device)


@contextmanager
def scanning(how: str) -> Iterator[None]:
    """Let mixers of one direction scan in another way."""
    ours = mamba.models.ssm.selective_scan
    candidates = set(ON)
    if how != "default":
        ON.discard("mixer")  # it brings its own scan
    if how == "mamba_ssm":
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        mamba.models.ssm.selective_scan = selective_scan_fn
    elif how == "loop":
        mamba.models.ssm.selective_scan = partial(ours, backend="reference")  # type: ignore[assignment]
    try:
        yield
    finally:
        mamba.models.ssm.selective_scan = ours
        ON.update(candidates)


def facts(make: Callable[[], nn.Module]) -> Row:
    """Tokens, parameters and multiply-accumulates of an image; of others' models, matrix products and convolutions."""
    with torch.device("meta"):
        model = make().eval()
        if isinstance(model, MambaModel):
            a = model.architecture
            return {"tokens": a.num_tokens, "params": count_parameters(model), "macs": a.macs()}
        counter = FlopCounterMode(display=False)
        side = model.image_size
        with counter, torch.no_grad():
            model(torch.empty(1, 3, side, side))
    tokens = model.encoder.pos_embedding.shape[1] if hasattr(model, "encoder") else None
    return {"tokens": tokens, "params": count_parameters(model), "macs": counter.get_total_flops() // 2}


def forward_row(make: Callable[[], nn.Module], device: torch.device, seconds: float, batch: int) -> Row:
    model = made(make, device).eval()
    images, _ = random_batch(model, batch, device)
    with torch.no_grad():
        call = replayed(partial(forward, model, images), device)
        times = seconds_of(call, device, seconds)
    return {"forward_batch": batch, **with_range("forward_images_per_s", times, lambda s: batch / s)}


def training_row(
    make: Callable[[], nn.Module], device: torch.device, seconds: float, record: bool, compile: bool, batch: int
) -> Row:
    """Recorded where that can be, else launched one by one."""
    while True:
        model = made(make, device).train()
        if compile and isinstance(model, MambaModel):
            compile_blocks(model)
        try:
            step = training_step(model, batch, record)
            times = seconds_of(step, device, seconds, warm_up=RecordedStep.warm_up + 2 if record else 2)
        except TrainingError:  # another's kernel may refuse to be recorded
            if not record:
                raise
            record = False
            continue
        recorded = record and device.type == "cuda"
        return {
            "train_batch": batch,
            "recorded": recorded,
            **with_range("training_images_per_s", times, lambda s: batch / s),
        }


def training_step(model: nn.Module, batch: int, record: bool = True) -> Callable[[], object]:
    """Forward, loss, backward, AdamW on the same random images."""
    device = next(model.parameters()).device
    config = OptimConfig()
    if isinstance(model, MambaModel):
        optimizer = make_optimizer(model, config)
    else:
        optimizer = torch.optim.AdamW(others.groups(model, config.weight_decay), lr=config.lr, fused=True)
    images, labels = random_batch(model, batch, device)
    if device.type != "cuda" or not record:

        def step() -> None:
            backward(model, images, labels)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step
    update = make_update(optimizer, None, clip=None, fused=True)
    rate, finite = torch.tensor(1e-4, device=device), torch.tensor(True, device=device)

    def device_step(batches: Batches) -> tuple[Tensor, Tensor]:
        ((images, labels),) = batches
        loss = backward(model, images, labels)
        norm = update.norm()
        update.apply(rate, norm, finite)
        optimizer.zero_grad(set_to_none=True)
        return loss, norm

    recorded = RecordedStep(device_step, update.fill_in)
    return lambda: recorded([(images, labels)])


def memory_row(make: Callable[[], nn.Module], device: torch.device, batch: int) -> Row:
    """Of an image, beyond weights, gradients and images: the most that a pass of `batch` takes, divided by it."""
    if device.type != "cuda":
        return {"forward_mib_per_image": None, "training_mib_per_image": None}
    model = made(make, device).eval()
    images, labels = random_batch(model, batch, device)
    with torch.no_grad():
        ahead = peak_mib(partial(forward, model, images), device)
    model.train()
    for p in model.parameters():  # there before the pass, and no part of what an image takes
        p.grad = torch.zeros_like(p)
    both = peak_mib(partial(backward, model, images, labels), device)
    assert ahead is not None and both is not None
    return {"forward_mib_per_image": ahead / batch, "training_mib_per_image": both / batch}


def random_batch(model: nn.Module, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    side = model.base.img_size if isinstance(model, MambaModel) else model.image_size
    return torch.randn(batch, 3, side, side, device=device), torch.randint(CLASSES, (batch,), device=device)


def backward(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(forward(model, images), labels)
    loss.backward()
    return loss.detach()


def draw(rows: Sequence[Row], path: Path) -> None:
    """Memory and time of an image against its number of tokens: a straight line is linear growth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = {
        "training_mib_per_image": "memory of an image, training, MiB",
        "forward_images_per_s": "time of an image, forward, ms",
        "training_images_per_s": "time of an image, training, ms",
    }
    names = dict.fromkeys((r["model"], r["how"]) for r in rows if r["tokens"] and r["how"] not in ("loop", "mamba_ssm"))
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        for model, how in names:
            found = [r for r in rows if (r["model"], r["how"]) == (model, how) and isinstance(r.get(key), int | float)]
            values = [1000 / r[key] if key.endswith("per_s") else r[key] for r in found]
            label_of = model if how in ("default", "fused") else f"{model}, {how} attention"
            axis.plot([r["tokens"] for r in found], values, "o-", markersize=4, label=label_of)
        axis.set(xlabel="tokens", ylabel=label, xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
