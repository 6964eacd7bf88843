"""On a CPU: the forward pass of a model by our own code, and by ONNX Runtime from the file that export.py writes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu import CPU, TURNS, clock_of, threads_of
from benchmarks.timing import Row, seconds_of, with_range
from mamba.config.presets import get_preset
from mamba.models.model import MambaModel, count_parameters, named_model
from mamba.predict.onnx import run_onnx, write_onnx


def rows(
    models: Sequence[str], batches: Sequence[int], seconds: float, threads: int, **overrides: Any
) -> Iterator[Row]:
    """A row a model, batch and runtime: ms of a forward pass in float32, and how often ONNX Runtime's fits into ours.

    Args:
        models: `quickstart`, or a model's name, at 32x32 pixels.
        batches: images of a pass.
        seconds: for which each is timed, in turns.
        threads: of both.
    """
    with threads_of(threads), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name in models:
            model, side = _model(name, overrides)
            path = Path(folder) / f"{name}.onnx"
            write_onnx(model, side, path, {})
            runtime = run_onnx(path, threads)
            for batch in batches:
                images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
                calls = {"ours": partial(model, images), "onnxruntime": partial(runtime, images.numpy())}
                times: dict[str, list[float]] = {key: [] for key in calls}
                for _ in range(TURNS):
                    for key, call in calls.items():
                        times[key] += seconds_of(call, CPU, seconds / TURNS, clock=clock_of(threads))
                found = {key: with_range("forward_ms", own, lambda s: 1000 * s) for key, own in times.items()}
                for key, row in found.items():
                    yield {
                        "model": name,
                        "batch": batch,
                        "runtime": key,
                        "threads": threads,
                        "params": count_parameters(model),
                        **row,
                        "ratio": found["ours"]["forward_ms"] / row["forward_ms"],
                        "load": os.getloadavg()[0],
                    }


def _model(name: str, overrides: dict[str, Any]) -> tuple[MambaModel, int]:
    """A model with new weights, and the side of its images."""
    torch.manual_seed(0)
    if name != "quickstart":
        return named_model(name, 10, 32, **overrides).eval(), 32
    own = get_preset("quickstart").model
    values = {"d_model": own.d_model, "depth": own.depth, **overrides}
    return named_model("mamba_tiny", 10, 8, **values).eval(), 8
