"""Signs of life of a run's processes: what each is doing, so that one that makes no step can be named.

Each rank writes `.alive/rank-N.json` in the run's folder from a thread of its own; whoever follows the run, in another
process or on another machine, reads them. No clocks are compared: what counts is whether a file still changes.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mamba.errors import FolderError
from mamba.runs.files import write_json
from mamba.train.distributed import Process

FOLDER = ".alive"
BEAT_S = 2.0
"""Seconds between two signs of life."""
STALL_S = 60.0
"""Seconds without a step after which a run is said to stand still."""
SILENT_S = 5 * BEAT_S
"""Seconds without a sign of life after which a process is said not to answer."""


class Heartbeat:
    """This rank's sign of life, while it is entered. What has changed since the last one costs nothing to say."""

    def __init__(self, folder: Path, process: Process) -> None:
        self.path = folder / FOLDER / f"rank-{process.rank}.json"
        self.world_size = process.world_size
        self.phase = "reading the data"
        self.reading = False  # waits for a batch
        self.steps = 0  # begun by this process
        self.beats = 0
        self.wake, self.ended = threading.Event(), False
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True
        self.wake.set()
        self.thread.join()
        with suppress(OSError):
            if not self.path.parent.is_symlink():
                self.path.unlink()
                self.path.parent.rmdir()  # the last rank's

    def enter(self, phase: str) -> None:
        """Begin a part of the run that may take long; said at once."""
        self.phase = phase
        self.wake.set()

    def _beat(self) -> None:
        while not self.ended:
            with suppress(OSError, FolderError):  # a full disk is told of where something matters
                self._write()
            self.wake.wait(BEAT_S)
            self.wake.clear()  # before `ended` is read: who sets both is not overlooked

    def _write(self) -> None:
        self.beats += 1
        doing = f"{self.phase}, waiting for a batch" if self.reading else self.phase
        sign = {"world_size": self.world_size, "steps": self.steps, "doing": doing, "beats": self.beats}
        if not self.path.parent.is_symlink():
            self.path.parent.mkdir(exist_ok=True)
            write_json(self.path, sign)


class Seen(NamedTuple):
    """A rank's last sign of life, and since when (by this process's clock) its step and its beat are what they are."""

    sign: dict[str, Any]
    step_since: float
    beat_since: float


class Watch:
    """Follows the signs of life of a run; make it before the run starts. `look()` now and then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        left_over = [] if self.folder.is_symlink() else self.folder.glob("rank-*.json")
        for left in left_over:  # by processes that were killed
            with suppress(OSError):
                left.unlink()
        self.seen: dict[int, Seen] = {}
        self.said = False  # this standstill

    def look(self) -> str | None:
        """What to tell the user: once for each time that no process has made a step for STALL_S seconds."""
        now = time.monotonic()
        self._read(now)
        still = min((now - seen.step_since for seen in self.seen.values()), default=0.0)
        if still < STALL_S:
            self.said = False
            return None
        if self.said:
            return None
        self.said = True
        return f"no step for {still:.0f} s{self._whose(now)}"

    def doing(self) -> str | None:
        """What rank 0 is doing, as it last said."""
        self._read(time.monotonic())
        return str(self.seen[0].sign["doing"]) if 0 in self.seen else None

    def since(self) -> float:
        """Since when, by this process's clock, rank 0 does that without another step."""
        return self.seen[0].step_since if 0 in self.seen else time.monotonic()

    def _read(self, now: float) -> None:
        found: dict[int, Seen] = {}
        for path in self.folder.glob("rank-*.json"):
            try:
                rank, sign = int(path.stem.partition("-")[2]), json.loads(path.read_text())
                step, beat = (sign["steps"], sign["doing"]), sign["beats"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            before = self.seen.get(rank)
            same = before is not None and (before.sign["steps"], before.sign["doing"]) == step
            found[rank] = Seen(
                sign,
                before.step_since if before is not None and same else now,
                before.beat_since if before is not None and before.sign["beats"] == beat else now,
            )
        self.seen = found

    def _whose(self, now: float) -> str:
        """The processes that the others wait for: those that do not answer, else those that have begun fewest steps,
        of them those that wait for a batch."""
        silent = {rank for rank, seen in self.seen.items() if now - seen.beat_since > SILENT_S}
        if silent:
            return "".join(f", {self._name(rank)}does not answer" for rank in sorted(silent))
        fewest = min(seen.sign["steps"] for seen in self.seen.values())
        behind = {rank: seen.sign["doing"] for rank, seen in self.seen.items() if seen.sign["steps"] == fewest}
        reading = {rank: doing for rank, doing in behind.items() if doing.endswith("waiting for a batch")}
        return "".join(f", {self._name(rank)}{doing}" for rank, doing in sorted((reading or behind).items()))

    def _name(self, rank: int) -> str:
        world_size = self.seen[rank].sign["world_size"]
        return f"worker {rank} of {world_size}: " if world_size > 1 else ""
