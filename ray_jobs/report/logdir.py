"""A folder for TensorBoard in which everything that finished can be compared at first sight.

A run's own events are written while it goes on, when nobody knows what it will be compared with. Here all runs are
known: names are short and in the order of the ranking, HPARAMS opens on the keys that differ, its metrics are those
that all runs have (the parallel coordinates leave out every run that lacks one), curves are drawn against epochs, and
the one picture is of the newest run.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from mamba.errors import ConfigError
from mamba.runs.files import replacing
from mamba.runs.folder import STATUSES, epochs_of
from mamba.runs.hparams import EVERY_RUN_HAS, HPARAM_METRICS, comparable, most_different, write_line
from mamba.runs.metrics import SCORE, metric
from mamba.runs.tensorboard import layout_summary
from ray_jobs.report.collect import Found
from ray_jobs.report.rows import finite, measured, ranked, score

MARK = ".mamba-forge-logdir"
"""Says that a folder was written here and may be replaced."""
SHOWN = 15
"""Characters of a run's name that the HPARAMS table shows."""
SAMPLES = "train/augmented"
Row = Mapping[str, Any]


def write_logdir(target: Path, found: Found, folders: Sequence[Path], by: str) -> Path:
    """Write, or write anew, a folder for `tensorboard --logdir`.

    Args:
        target: the folder; must be new, empty, or of an earlier call, and not within what it is made of.
        found: what lies under `folders`.
        by: the metric that ranks.

    Raises:
        ConfigError: the folder cannot be written, or holds something else.
    """
    _check(target, folders)
    rows = in_order(found.rows, by)
    try:
        if target.exists():
            shutil.rmtree(target)
        target.mkdir(parents=True)
        (target / MARK).write_text("made by compare.py --tensorboard; may be deleted\n")
        values, first = told(rows)
        tags = metrics_of(rows, by)
        for i, (row, name) in enumerate(zip(rows, short_names([row["trial"] for row in rows]), strict=True)):
            folder = target / name
            folder.mkdir()
            _write_scalars(folder, row, [layout_summary()] if i == 0 else [])
            status = row["status"] if row["status"] in STATUSES else "finished"
            write_line(folder, values[i], status, first, tags, name)
        _write_samples(target, rows)
    except OSError as error:
        raise ConfigError(f"--tensorboard {target} cannot be written: {error.strerror or error}") from None
    return target


def _check(target: Path, folders: Sequence[Path]) -> None:
    inside = [folder for folder in folders if target.resolve().is_relative_to(folder.resolve())]
    if inside:
        raise ConfigError(f"--tensorboard {target} lies within {inside[0]}, which it is made of; choose another folder")
    if target.exists() and not (target / MARK).exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--tensorboard {target} holds something else; choose a new folder")


def in_order(rows: Sequence[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """Group after group, each from the best to the worst."""
    mode = "min" if metric(by).better == "down" else "max"
    ordered = []
    for group in sorted({row["group"] for row in rows}):
        ordered += ranked([row for row in rows if row["group"] == group], by, mode)
    return ordered


def short_names(trials: Sequence[str]) -> list[str]:
    """A number and what tells a trial from its neighbours, as long as the table shows: each is another."""
    width = len(str(len(trials)))
    names = []
    for i, trial in enumerate(trials, 1):
        room = SHOWN - width - 1
        word = trial.rstrip("/").rpartition("/")[2]
        if " (" in trial:  # `digits/base (before)`
            word = trial.rpartition(" (")[2].rstrip(")")
        while len(word) > room and (rest := re.search(r"[_-](?=\w)", word)):  # linear_delta-0.3: delta-0.3
            word = word[rest.end() :]
        safe = re.sub(r"[^A-Za-z0-9._=+-]+", "-", word)[-room:].strip("-") or "run"
        names.append(f"{i:0{width}d} {safe}")
    return names


def told(rows: Sequence[Row]) -> tuple[list[dict[str, float | str]], list[str]]:
    """What the HPARAMS tab says of each run, the keys that differ and no others, and the columns that come first."""
    flat = [comparable({**row["config"], **row["values"]}) for row in rows]
    keys = [key for key in dict.fromkeys(k for own in flat for k in own)
            if len({str(own.get(key, "not recorded")) for own in flat}) > 1]  # fmt: skip
    experiments = [row["experiment"] or str(row["config"].get("name", "")) for row in rows]
    groups = [row["group"].replace(" % to validate", " %") for row in rows]
    several = {"experiment": experiments, "data": groups}
    several = {key: some for key, some in several.items() if len(set(some)) > 1}
    told = []
    for i, (row, own) in enumerate(zip(rows, flat, strict=True)):
        line: dict[str, float | str] = {"status": row["status"], "trial": row["trial"]}
        line |= {key: some[i] for key, some in several.items()}
        for key in keys:
            value = own.get(key, "not recorded")
            numbers = all(isinstance(other.get(key), int | float) for other in flat)
            line[key] = value if numbers else str(value)
        told.append(line)
    differ = most_different([{key: own[key] for key in keys if key in own} for own in flat], 5 - len(several))
    differ = [key for key in differ if key in keys]
    return told, [*several, *differ]


def metrics_of(rows: Sequence[Row], by: str) -> list[str]:
    """The columns of metrics: what ranks, then what all runs have that can be ranked, then the others; without the
    others where TensorBoard, which shows five unasked, would come to them."""
    known = [row for row in rows if value_of(row, by) is not None]
    counts = {
        key: sum(value_of(row, key) is not None for row in known)
        for key in dict.fromkeys((by, *EVERY_RUN_HAS, *HPARAM_METRICS))
    }
    everywhere = [key for key, count in counts.items() if count == len(known)]
    others = [key for key, count in counts.items() if 0 < count < len(known)]
    return [*everywhere, *(others if len(everywhere) >= len(EVERY_RUN_HAS) else [])]


def value_of(row: Row, key: str) -> float | None:
    return score(row) if key == SCORE else measured(row, key)


def _write_scalars(folder: Path, row: Row, before: Sequence[Summary]) -> None:
    """A run's epochs, and what it came to at the last of them."""
    epochs = epochs_of(row["path"]) if row["status"] in STATUSES else []
    points: dict[int, dict[str, float]] = {}
    for epoch in epochs:
        values = {key: known for key, value in epoch.items() if "/" in key and (known := finite(value)) is not None}
        points[epoch["epoch"]] = values
    last = max(points, default=0)
    final = {key: known for key, value in row["metrics"].items() if "/" in key and (known := finite(value)) is not None}
    kept = score(row)
    if kept is not None:
        final[SCORE] = kept
    points[last] = {**points.get(last, {}), **final}
    began = _modified(row["path"])
    with replacing(folder / "events.out.tfevents.0.metrics") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
        for summary in before:
            writer.write(Event(wall_time=began, summary=summary).SerializeToString())
        for step in sorted(points):
            for key, value in points[step].items():
                event = Event(wall_time=began + step, step=step, summary=scalar(key, value))
                writer.write(event.SerializeToString())


def _modified(path: Path) -> float:
    files = ("trial.json", "result.json", "config.yaml", "pruned.json")
    times = [(path / name).stat().st_mtime for name in files if (path / name).exists()]
    return max(times, default=0.0)


def _write_samples(target: Path, rows: Sequence[Row]) -> None:
    """The training images of the newest run that kept some."""
    for row in sorted(rows, key=lambda row: -_modified(row["path"])):
        if not any(row["path"].glob("events*")):
            continue
        with suppress(Exception):  # a damaged file of events: the next run's
            events = EventAccumulator(str(row["path"]), size_guidance={"images": 1})
            events.Reload()
            if SAMPLES not in events.Tags()["images"]:
                continue
            image = events.Images(SAMPLES)[-1]
            picture = Summary.Image(
                height=image.height, width=image.width, colorspace=3, encoded_image_string=image.encoded_image_string
            )
            folder = target / "newest run"
            folder.mkdir()
            with replacing(folder / "events.out.tfevents.0.images") as file:
                writer = RecordWriter(file)
                writer.write(Event(wall_time=image.wall_time, file_version="brain.Event:2").SerializeToString())
                summary = Summary(value=[Summary.Value(tag=f"{SAMPLES}, {row['trial']}", image=picture)])
                writer.write(Event(wall_time=image.wall_time, summary=summary).SerializeToString())
            return
