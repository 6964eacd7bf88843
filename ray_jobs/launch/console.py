"""What a person sees of a run: a live progress bar on a terminal, plain lines elsewhere, a table at the end.

It reads the run's folder, so it shows the same whether training happens here or in a worker on another machine.
"""

from __future__ import annotations

import io
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from mamba.errors import FolderError, ForgeError
from mamba.runs.files import append
from mamba.runs.folder import LOG, epochs_of, position_of, request_stop, stop_requested
from mamba.runs.metrics import METRICS, best_accuracy
from mamba.train.heartbeat import Watch


class Display:
    """Follows a run's progress.json and metrics.jsonl from a thread of its own, until closed. What it says also goes to
    train.log in the run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self.seen = len(epochs_of(folder))
        self.last: dict[str, Any] = {}
        self.watch = Watch(folder)
        self.said = time.monotonic()
        """When something was said last."""
        self.began: tuple[float, int] | None = None
        """When steps were first seen, and how many there were."""
        self.stopping = ""
        """What the run was last said to do on its way to the end."""
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Display:
        self.log(f"--- {datetime.now():%F %T} {shlex.join(sys.argv)}")
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self.done.set()
        self.thread.join()
        if error is not None:
            self.log(f"error: {error}" if isinstance(error, ForgeError) else f"ended by {type(error).__name__}")

    def say(self, text: str) -> None:
        self.said = time.monotonic()
        self.log(text)
        self.console.print(text, markup=False)

    def show(self, table: Table) -> None:
        """Print a table."""
        self.console.print(table)
        plain = Console(width=120, file=io.StringIO())
        plain.print(table)
        assert isinstance(plain.file, io.StringIO)
        self.log(plain.file.getvalue().rstrip())

    def log(self, text: str) -> None:
        """Write to train.log alone; a disk that is full is told of elsewhere."""
        with suppress(FolderError):
            append(self.folder / LOG, text + "\n")

    def _follow(self) -> None:
        if not self.console.is_terminal:
            while not self.done.wait(0.5):
                self._print_epochs()
                self._watch()
                self._break_silence()
            self._print_epochs()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[now]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=self.console, speed_estimate_period=60) as progress:
            task = progress.add_task("starting", total=None, now="")
            while not self.done.wait(0.25):
                self._update(progress, task)
                self._watch()
            self._update(progress, task)

    def _update(self, progress: Progress, task: Any) -> None:
        for metrics in self._new_epochs():
            self.last = metrics
            self.log(self._line(metrics))
        position = position_of(self.folder)
        doing = self.watch.doing()
        if not position or not (doing or TRAINING).startswith(TRAINING):
            progress.update(task, description=doing or "starting")
        if not position:
            return
        done, total = _steps(position)
        accuracies = [self.last[key] for key in EPOCH_COLUMNS if key in self.last]
        nan = float("nan")
        now = f"loss {position.get('loss', nan):.3f}  {position.get('images_per_s', nan):,.0f} images/s"
        now += f"  val {max(accuracies):.2f} %" if accuracies else ""
        progress.update(task, total=total, completed=done, now=now)
        if (doing or TRAINING).startswith(TRAINING):
            epoch = min(position["epoch"] + 1, position["epochs"])
            progress.update(task, description=f"epoch {epoch}/{position['epochs']}")

    def _print_epochs(self) -> None:
        for metrics in self._new_epochs():
            self.say(self._line(metrics))

    def _line(self, m: dict[str, Any]) -> str:
        epochs = position_of(self.folder).get("epochs", "?")
        words = [f"epoch {m['epoch']}/{epochs}"]
        words += [f"loss {m['train/loss']:.4f}"] if "train/loss" in m else []
        words += [f"{label} {m[key]:.2f} %" for key, label in EPOCH_COLUMNS.items() if key in m]
        words += [f"{m['train/images_per_s']:,.0f} images/s"] if "train/images_per_s" in m else []
        words += [f"{m['train/skipped_steps']:.0f} steps skipped"] if m.get("train/skipped_steps") else []
        return "  ".join(words)

    def _watch(self) -> None:
        """Say when no process has made a step for long, and which one the others wait for; and each thing that a run
        does on its way to the end that it was asked for."""
        text = self.watch.look()
        if text:
            self.say(text)
        doing = (self.watch.doing() or "").removesuffix(", waiting for a batch") if stop_requested(self.folder) else ""
        if doing and doing != self.stopping:
            self.stopping = doing
            self.say(f"stopping: {doing}")

    def _break_silence(self) -> None:
        """Where nothing was said for QUIET_S seconds: where the run is and when it will be over, or what it is doing
        that makes no steps, and since when."""
        now, position = time.monotonic(), position_of(self.folder)
        done, total = _steps(position) if position else (0, 0)
        if position and self.began is None:
            self.began = (now, done)
        doing = self.watch.doing()
        if now - self.said < QUIET_S or doing is None:
            return
        if not doing.startswith(TRAINING) or not position or "first steps" in doing:
            self.say(f"{doing}, {now - self.watch.since():.0f} s so far")
            return
        nan, (began, before) = float("nan"), self.began or (now, done)
        epoch, step, steps = position["epoch"] + 1, position["step"], position["steps_per_epoch"]
        text = f"epoch {epoch}/{position['epochs']}  step {step}/{steps}  loss {position.get('loss', nan):.4f}"
        text += f"  {position.get('images_per_s', nan):,.0f} images/s"
        if done > before:
            text += f"  about {duration((now - began) / (done - before) * (total - done))} left"
        self.say(text)

    def _new_epochs(self) -> list[dict[str, Any]]:
        epochs = epochs_of(self.folder)
        self.seen = min(self.seen, len(epochs))  # a restarted run drops what it repeats
        new, self.seen = epochs[self.seen :], len(epochs)
        return new


def _steps(position: dict[str, Any]) -> tuple[int, int]:
    """Steps taken and steps in all."""
    steps = position["steps_per_epoch"]
    return int(position["epoch"] * steps + position["step"]), int(position["epochs"] * steps)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, in two places at most."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


QUIET_S = 5.0
"""Seconds after which a plain log says where a run is."""
TRAINING = "training epoch"
"""How the phase begins in which steps are made (`mamba.train.trainer`)."""
EPOCH_COLUMNS = {"val/accuracy": "val", "val/ema_accuracy": "val (ema)"}


class SweepDisplay:
    """The state of a sweep: one live line on a terminal, a line for each ended trial elsewhere."""

    def __init__(self, total: int, rows: list[dict[str, Any]], objective: str, mode: str = "max") -> None:
        self.console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self.total, self.objective, self.best = total, objective, max if mode == "max" else min
        self.ended = {row["trial"]: row for row in rows}
        self.running: set[str] = set()
        self.live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[now]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> SweepDisplay:
        self.live.start()
        self.task = self.live.add_task("trials", total=self.total, completed=len(self.ended), now="")
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def changed(self, name: str, result: dict[str, Any]) -> None:
        """A trial started or ended."""
        if result["status"] == "running":
            self.running.add(name)
        else:
            self.running.discard(name)
            self.ended[name] = result
            score = result["metrics"].get(self.objective)
            words = [f"{len(self.ended)}/{self.total}", name, result["status"]]
            words += [f"{self.objective} {score:.4g}"] if score is not None else []
            words += [result["reason"]] if result.get("reason") else []
            if not self.console.is_terminal or result["status"] == "failed":
                self.console.print("  ".join(words), markup=False)
        failed = sum(r["status"] == "failed" for r in self.ended.values())
        scores = [
            r["metrics"][self.objective]
            for r in self.ended.values()
            if r["status"] == "finished" and math.isfinite(r["metrics"].get(self.objective, math.nan))
        ]
        now = f"{len(self.running)} running  {failed} failed"
        now += f"  best {self.objective} {self.best(scores):.4g}" if scores else ""
        self.live.update(self.task, completed=len(self.ended), now=now)


SAME_SIGNAL_S = 2.0
"""Signals this close together count as one: `timeout` and `make` pass theirs on, besides the terminal's own."""


@contextmanager
def stop_on_signal(folder: Path, display: Display) -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into an orderly stop with a checkpoint; a second one ends at once."""
    began = time.monotonic()

    received: dict[str, float] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = received.setdefault("first", now)  # one operation: this handler can interrupt itself
        if first is not now:
            if now - first > SAME_SIGNAL_S:
                raise KeyboardInterrupt
            return
        signal.alarm(0)  # Ray's, where it took the signal first while it was starting: it would abort this stop
        request_stop(folder)
        display.say(
            f"{signal.Signals(number).name} after {time.monotonic() - began:.0f} s: saving a checkpoint and stopping "
            "(again to stop at once, with the last checkpoint)"
        )

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def result_table(result: dict[str, Any]) -> Table:
    """The final metrics, one a row."""
    metrics, tested = result["metrics"], result["tested"]
    table = Table(show_header=False, box=None, pad_edge=False)
    hardware = result["hardware"]
    views = f", {tested['tta_views']} views" if tested["tta_views"] > 1 else ""
    device = hardware["gpu"] or f"{hardware['cpus']} CPU cores"
    text = {key: METRICS[key].text(metrics.get(key)) or "not measured" for key in METRICS}
    kept = f"{tested['weights']} weights of epoch {tested['epoch']}"
    validation = METRICS["val/best_accuracy"].text(best_accuracy(metrics)) if "val/accuracy" in metrics else "no split"
    rows = {
        "test accuracy": f"{text['test/accuracy']}  ({kept}{views})",
        "validation accuracy": validation,  # of the same weights
        "parameters": text["model/params"],
        "MACs per image": text["model/macs"],
        "training": f"{result['epochs']} epochs in {result['seconds']:.1f} s, {text['train/images_per_s']} in the last",
        "hardware": f"{result['world_size']} worker{'s'[: result['world_size'] > 1]} on {device}, amp {result['amp']}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
