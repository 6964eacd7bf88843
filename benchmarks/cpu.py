"""On a CPU: a training step of the quickstart model by each way to scan, and the latency of what the plans make."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import mamba.models.ssm
from benchmarks.timing import Row, seconds_of, with_range
from mamba.config.presets import get_preset
from mamba.models.model import MambaModel, count_parameters, mamba_small, named_model
from mamba.ops.scan import selective_scan
from pruning import apply_plan

CPU = torch.device("cpu")
TURNS = 5
"""In which what is compared is timed, so that what else the machine does hits all alike."""


def steps(scans: Sequence[str], batch: int, seconds: float, threads: int, **overrides: Any) -> Iterator[Row]:
    """A row a scan: forward (no gradients) and forward and backward of a batch of the quickstart model, ms. `loop` is
    the prototype's way, a loop over tokens in Python; `none` leaves the scan out: what everything else takes."""
    config = get_preset("quickstart").model
    torch.manual_seed(0)
    values = {"d_model": config.d_model, "depth": config.depth, **overrides}
    model = named_model("mamba_tiny", 10, 8, **values)
    images, labels = torch.randn(batch, 3, 8, 8), torch.randint(10, (batch,))

    def forward() -> None:
        with torch.no_grad():
            model(images)

    def both() -> None:
        F.cross_entropy(model(images), labels).backward()
        model.zero_grad(set_to_none=True)

    with threads_of(threads):
        found = {(scan, what): [] for scan in scans for what in ("forward_ms", "both_ms")}
        for _ in range(TURNS):
            for scan in scans:
                with scanned_by(scan):
                    for what, call in (("forward_ms", forward), ("both_ms", both)):
                        found[scan, what] += seconds_of(call, CPU, seconds / TURNS, clock=clock_of(threads))
    for scan in scans:
        row: Row = {"scan": scan, "batch": batch, "threads": threads}
        for what in ("forward_ms", "both_ms"):
            row |= with_range(what, found[scan, what], lambda s: 1000 * s)
        yield row | {"load": os.getloadavg()[0]}


@contextmanager
def scanned_by(scan: str) -> Iterator[None]:
    """Let mixers scan by a backend; `loop`: by the reference; `none`: not at all."""
    ways: dict[str, Callable[..., Any]] = {
        "default": selective_scan,
        "none": lambda u, *_, **__: u,
        "loop": partial(selective_scan, backend="reference"),
    }
    mamba.models.ssm.selective_scan = ways.get(scan) or partial(selective_scan, backend=scan)  # type: ignore[assignment]
    try:
        yield
    finally:
        mamba.models.ssm.selective_scan = selective_scan


def latency(plans: Sequence[str], seconds: float, threads: Sequence[int], **overrides: Any) -> Iterator[Row]:
    """A row a plan and number of threads: one image through mamba_small (`dense`) and through what a plan makes of it,
    ms, in turns. `ratio`: dense over it."""
    torch.manual_seed(0)
    dense = mamba_small(10, 32, **overrides)
    models: dict[str, MambaModel] = {"dense": dense} | {name: apply_plan(dense, name).model for name in plans}
    image = torch.randn(1, 3, 32, 32)

    def one(model: MambaModel) -> None:
        with torch.no_grad():
            model(image)

    for count in threads:
        with threads_of(count):
            times: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(TURNS):
                for name, model in models.items():
                    times[name] += seconds_of(partial(one, model.eval()), CPU, seconds / TURNS, clock=clock_of(count))
        found = {name: with_range("latency_ms", t, lambda s: 1000 * s) for name, t in times.items()}
        for name, row in found.items():
            model = models[name]
            yield {
                "plan": name,
                "threads": count,
                "params": count_parameters(model),
                "macs": model.architecture.macs(),
                **row,
                "ratio": found["dense"]["latency_ms"] / row["latency_ms"],
                "macs_ratio": dense.architecture.macs() / model.architecture.macs(),
                "load": os.getloadavg()[0],
            }


def clock_of(threads: int) -> Callable[[], float]:
    """On one thread processor time, which leaves out what other processes took; elapsed time otherwise."""
    return time.process_time if threads == 1 else time.perf_counter


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
