"""Looking at the device while it works: skipped steps, a request to stop, the loss, without making it wait.

A look starts a copy and the one before is read, so that a GPU always has work in its queue.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mamba.config.schema import RunConfig
from mamba.errors import TrainingError
from mamba.runs import checkpoint as ckpt
from mamba.runs.folder import stop_requested
from mamba.runs.tracking import Tracker
from mamba.train.distributed import Process
from mamba.train.step import OptimizerStep
from mamba.train.writer import Writer

LOG_EVERY_S = 0.5
"""Seconds between two lines of step metrics, and between two looks for a request to stop."""
LOOK_EVERY_STEPS = 10
"""Steps between two looks at a GPU."""


class Look(NamedTuple):
    """What the device showed after an optimizer step: skipped steps in a row, stop, bad loss, loss, gradient norm."""

    step: int
    values: Tensor
    ready: torch.cuda.Event | None


class Monitor:
    """Follows the steps of a run: logs them, ends a run that no longer learns, and says when to stop."""

    def __init__(
        self,
        config: RunConfig,
        process: Process,
        folder: Path,
        tracker: Tracker | None,
        steps_per_epoch: int,
        writer: Writer,
    ) -> None:
        self.writer = writer
        self.config, self.process, self.folder, self.tracker = config, process, folder, tracker
        self.steps_per_epoch = steps_per_epoch
        self.gpu = process.device.type == "cuda"
        self.epoch = 0
        self.looks: list[Look] = []  # begun and not yet read
        self.looked_for_stop = 0.0
        self.logged, self.logged_step = 0.0, 0  # when, and after which step of the epoch

    def begin_epoch(self, epoch: int, step: int) -> None:
        self.epoch, self.logged, self.logged_step = epoch, time.perf_counter(), step
        self.looks.clear()

    def stop_requested(self) -> bool:
        """Rank 0 looks for the file, and whether a machine will go away; the answer travels with the step's other
        flags, so all ranks stop together."""
        now = time.perf_counter()
        if self.process.rank != 0 or now - self.looked_for_stop < LOG_EVERY_S:
            return False
        self.looked_for_stop = now
        return stop_requested(self.folder) or self.process.leaving()

    def due(self, step: int) -> bool:
        """Whether to look after this step of the epoch."""
        return not self.gpu or step == self.steps_per_epoch or step % LOOK_EVERY_STEPS == 0

    def look(self, step: int, taken: OptimizerStep, loss: Tensor, norm: Tensor) -> bool:
        """Begin a look at the device, and act on the one before, or after an epoch's last step on this one. Returns
        whether to stop.

        Which look is acted on depends on the step alone, so all ranks stop at the same one.
        """
        now = step == self.steps_per_epoch
        self.looks.append(self._begin(step, torch.stack((taken.skipped[1], taken.stop, taken.bad_loss, loss, norm))))
        if self.gpu and not now and len(self.looks) == 1:
            return False
        look = self.looks[-1] if now else self.looks[0]
        self.looks = [] if now or not self.gpu else self.looks[1:]
        if look.ready:
            look.ready.synchronize()
        in_a_row, stop, bad_loss, loss_value, norm_value = look.values.tolist()
        self._log(look.step, loss_value, norm_value, always=now)
        self._check_skipped(int(in_a_row), "loss" if bad_loss else "gradient")
        return stop > 0

    def _begin(self, step: int, values: Tensor) -> Look:
        if not self.gpu:
            return Look(step, values, None)
        copy = torch.empty(len(values), pin_memory=True).copy_(values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Look(step, copy, ready)

    def _log(self, step: int, loss: float, norm: float, always: bool) -> None:
        now = time.perf_counter()
        if not self.tracker or not (always or now - self.logged >= LOG_EVERY_S):
            return
        images = (step - self.logged_step) * self.config.data.batch_size
        values = {"loss": loss, "grad_norm": norm, "images_per_s": images / (now - self.logged)}
        self.logged, self.logged_step = now, step
        self.tracker.step(self.epoch * self.steps_per_epoch + step, values)
        self.tracker.progress(
            epoch=self.epoch,
            epochs=self.config.optim.epochs,
            step=step,
            steps_per_epoch=self.steps_per_epoch,
            **values,
        )

    def _check_skipped(self, in_a_row: int, what: str) -> None:
        if in_a_row < self.config.optim.max_skipped:
            return
        self.writer.wait()
        newest = ckpt.newest_checkpoint(self.folder)
        raise TrainingError(
            f"the {what} was not finite in {in_a_row} steps in a row (optim.max_skipped "
            f"{self.config.optim.max_skipped}), last in epoch {self.epoch + 1}; lower optim.lr, set "
            f"optim.grad_clip or try --preset unstable; last good checkpoint: {newest or 'none yet'}",
            every_rank=True,
        )
