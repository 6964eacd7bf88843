"""A trained model in a format that others read, compared with ours after it was written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from errno import EISDIR
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamba.errors import ConfigError, reason
from mamba.models.model import Architecture, MambaModel
from mamba.predict.onnx import OPSET, require_onnx, run_onnx, write_onnx
from mamba.predict.predictor import Predictor
from mamba.runs.files import create

FORMATS = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ".safetensors"}
MOST = 1e-4
"""By which logits may differ from ours."""
BATCHES = (1, 2, 5)
"""Batch sizes that are compared."""
ROUNDS = 15
"""Repetitions of which a time has its median."""

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one thing done `ROUNDS` times."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ms ({self.lowest:.2f} to {self.highest:.2f})"


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how it does beside our model on this CPU."""

    path: Path
    difference: float
    """Of logits, at most, over `BATCHES`."""
    ms: Times
    """Of one image, by the exported file."""
    ours_ms: Times
    """Of the same, by our model, in turns with the file."""
    opset: int | None = None


def export(predictor: Predictor, form: str, path: Path) -> Exported:
    """Write a model, read it back, and compare; what had the name stays until a file is there whose logits are ours.

    Args:
        predictor: on the CPU.
        form: a key of `FORMATS`.
        path: of the file.

    Raises:
        ConfigError: an unknown format, optional packages that are missing, a file that cannot be written, logits that
            differ by more than `MOST`.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: valid are {', '.join(FORMATS)}")
    if path.is_file():  # of another run, or what somebody else wrote
        raise ConfigError(f"--out {path} is there already; remove it, or choose another place")
    if form == "onnx":
        require_onnx()
    model, side = predictor.model.float().cpu().eval(), predictor.transform.side
    partial = path.with_name(f".partial-{path.name}{FORMATS[form]}")  # torch looks at endings
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(n, 3, side, side, generator=generator) for n in BATCHES]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(path))
        partial.unlink(missing_ok=True)  # of an export that was killed
        with create(partial):  # so that the system says what is wrong with the place, in its own words
            pass
        run = _written(model, form, partial, side, about(predictor))
        with torch.no_grad():
            difference = max(float((run(x) - model(x)).abs().max()) for x in images)
        if not difference <= MOST:  # NaN neither
            raise ConfigError(f"--format {form}: logits differ from ours by {difference:.1e}, more than {MOST:.0e}")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {reason(error)}") from None
    except (SafetensorError, RuntimeError) as error:  # how safetensors and torch tell of a disk that is full
        if not isinstance(error, SafetensorError) and "inline_container" not in str(error):
            raise
        raise ConfigError(f"--out {path} cannot be written: {reason(error)}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    with torch.no_grad():
        opset = OPSET if form == "onnx" else None
        ms, ours_ms = _times([run, model], images[0])
        return Exported(path, difference, ms, ours_ms, opset)


def about(predictor: Predictor) -> dict[str, str]:
    """What goes with the weights, as text: classes, statistics, architecture, how images are made."""
    transform = predictor.transform
    tree = {"classes": predictor.classes, **asdict(transform), "architecture": predictor.model.architecture.to_dict()}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in tree.items()}


def _written(model: MambaModel, form: str, path: Path, side: int, facts: dict[str, str]) -> Run:
    """Write the file; returns what runs it."""
    if form == "onnx":
        write_onnx(model, side, path, facts)
        run = run_onnx(path, torch.get_num_threads())
        return lambda x: torch.from_numpy(run(x.numpy()))
    if form == "torch_export":
        shapes: Any = ({0: torch.export.Dim("batch")},)
        with torch.no_grad():
            program = torch.export.export(model, (torch.zeros(2, 3, side, side),), dynamic_shapes=shapes)
        torch.export.save(program, path, extra_files={f"{key}.txt": value for key, value in facts.items()})
        return torch.export.load(path).module()
    assert form == "safetensors", form
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path, facts)
    with safe_open(path, "pt") as file:
        again = MambaModel(Architecture.from_dict(json.loads(file.metadata()["architecture"])))
    again.load_state_dict(load_file(path))
    return again.eval()


def _times(runs: Sequence[Run], images: Tensor) -> list[Times]:
    """Of each, in turns: what the machine does besides is shared."""
    found: list[list[float]] = [[] for _ in runs]
    for turn in range(1 + ROUNDS):  # the first is not counted
        for run, times in zip(runs, found, strict=True):
            began = time.perf_counter()
            run(images)
            if turn:
                times.append(1e3 * (time.perf_counter() - began))
    return [Times(median(times), min(times), max(times)) for times in found]
