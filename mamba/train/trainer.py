"""Training, from a resolved config to a result: `fit`, and the loop that it runs.

One `Trainer` a rank. What a step does is in `mamba.train.step`, what is saved of a run in `mamba.train.state`, how a
model is scored in `mamba.train.evaluate`, how the device is watched in `mamba.train.monitor`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mamba.config.schema import RunConfig
from mamba.data.device_loader import make_train_batches
from mamba.data.images import ImageData, ImageSet
from mamba.data.mix import BatchMix
from mamba.data.registry import load_data
from mamba.data.sound import check_images
from mamba.data.views import ONE, Views
from mamba.errors import TrainingError
from mamba.models.model import MambaModel, count_parameters
from mamba.runs import checkpoint as ckpt
from mamba.runs.confusion import Confusion
from mamba.runs.environment import environment
from mamba.runs.metrics import SCORE
from mamba.runs.provenance import with_split
from mamba.runs.start import check_models, first_weights, start_of
from mamba.runs.tracking import Tracker
from mamba.train.compilation import compile_blocks, should_compile
from mamba.train.distributed import Process
from mamba.train.ema import ModelEma
from mamba.train.evaluate import ClassCounts, Score, Stopped, best_views, evaluate
from mamba.train.heartbeat import Heartbeat
from mamba.train.hooks import TrainHook
from mamba.train.loss import TrainingLoss
from mamba.train.monitor import Monitor
from mamba.train.optim import make_optimizer
from mamba.train.precision import resolve_amp
from mamba.train.record import Batches
from mamba.train.schedule import learning_rate
from mamba.train.state import finish_writing, forget_best, own_best, restore, save, write_checkpoint
from mamba.train.step import OptimizerStep
from mamba.train.stopwatch import Stopwatch
from mamba.train.writer import Writer

FIRST_STEPS = 4
"""Steps of a process that may take long: kernels are loaded, blocks compiled, a step recorded."""


def fit(
    config: RunConfig, process: Process, folder: Path, data: ImageData | None = None, hooks: Sequence[TrainHook] = ()
) -> dict[str, Any]:
    """Train a resolved config in `folder`, from its newest checkpoint if there is one; every rank calls it.

    Returns:
        what result.json holds; with status "interrupted" when `mamba.runs.folder.request_stop` was called.

    Raises:
        ForgeError: data, checkpoint or training errors, each a sentence for the user.
    """
    with out_of_memory_told(), Heartbeat(folder, process) as alive:
        start = start_of(config, folder)
        if data is None:
            data = load_data(with_split(config, start).data, config.seed)
        else:
            check_images(data, "the data given")
        check_models(config, data, start)
        alive.enter("making the model")
        trainer = Trainer(config, process, folder, data, hooks, alive)
        try:
            return trainer.run()
        finally:
            trainer.close()


class Trainer:
    """A rank's model, optimizer and position, and the loop over them."""

    def __init__(
        self,
        config: RunConfig,
        process: Process,
        folder: Path,
        data: ImageData,
        hooks: Sequence[TrainHook] = (),
        alive: Heartbeat | None = None,
    ) -> None:
        config.check_workers(process.world_size, process.device.type == "cuda")
        self.config, self.process, self.folder, self.data, self.hooks = config, process, folder, data, hooks
        self.alive = alive or Heartbeat(folder, process)
        optim, classes, side = config.optim, len(data.classes), data.side
        self.writer = Writer()  # of checkpoints, on rank 0
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.model = initial_model(config, folder, classes, side, process).to(process.device)
        self.ema = ModelEma(self.model, config.ema.decay) if config.ema.enabled else None
        self.optimizer = make_optimizer(self.model, optim)
        self.amp = resolve_amp(optim.amp, process.device)
        loss = TrainingLoss(config, classes, side, process.device, self.amp)
        self.optimizer_step = OptimizerStep(optim, process, self.model, self.ema, self.optimizer, loss, self.amp, hooks)
        self.mix = BatchMix.from_config(config, classes)
        cpus = config.scaling.cpus_per_worker or process.cpus
        self.batches = make_train_batches(
            data, config.data, config.seed, optim.accumulate, process.rank, process.world_size, cpus, process.device
        )
        self.steps_per_epoch = self.batches.sampler.steps

        self.epoch = 0  # epochs completed
        self.step = 0  # optimizer steps taken in the current epoch
        self.unvalidated = False  # the epoch has ended, and its validation was interrupted
        self.seconds = {"epoch": 0.0, "run": 0.0, "waiting": 0.0}  # training, validation left out; for data
        self.best: dict[str, Any] = {"accuracy": -math.inf, "epoch": 0, "weights": "ema" if self.ema else "raw"}
        self.metrics: dict[str, float] = {}
        torch.manual_seed(config.seed + 1000 * (process.rank + 1))  # drop path differs between ranks
        restore(self)
        for hook in hooks:
            hook.attach(self.model, self.ema, self.optimizer, config.seed)

        self.compiled = should_compile(optim.compile, optim.epochs * len(data.train), process.device)
        if self.compiled:
            compile_blocks(self.model)
        self.optimizer_step.prepare()
        self.waiting = Stopwatch(process.device)
        self.tracker = Tracker(folder, config, self.epoch, self.global_step) if process.rank == 0 else None
        self.monitor = Monitor(config, process, folder, self.tracker, self.steps_per_epoch, self.writer)

    def sizes(self) -> dict[str, float]:
        """What the model costs, however well it does."""
        return {"model/params": count_parameters(self.model), "model/macs": self.model.architecture.macs()}

    @property
    def global_step(self) -> int:
        """Optimizer steps taken in the whole run."""
        return self.epoch * self.steps_per_epoch + self.step

    def run(self) -> dict[str, Any]:
        while self.epoch < self.config.optim.epochs or self.unvalidated:
            if not self.unvalidated:
                if not self.train_epoch():
                    return self.interrupted()
                self.metrics = self.epoch_metrics()
                self.epoch, self.step = self.epoch + 1, 0
            if self.data.val is not None and self._due(self.config.eval.every):
                self.unvalidated = True
                try:
                    self.validate(self.data.val)
                except Stopped:
                    return self.interrupted()
            self.unvalidated = False
            self.end_epoch()
        return self.finish()

    def interrupted(self) -> dict[str, Any]:
        """Save where the run is; returns what says so."""
        save(self)
        finish_writing(self)
        return {"status": "interrupted", "epoch": self.epoch, "step": self.step, "folder": str(self.folder)}

    def _due(self, every: int) -> bool:
        """Whether something happens after this epoch, which is each so many epochs and after the last."""
        return self.epoch % every == 0 or self.epoch == self.config.optim.epochs

    # --- an epoch ----------------------------------------------------------------------------------------------------

    def train_epoch(self) -> bool:
        """Train what is left of the current epoch. Returns whether it was finished, which it is unless the run was
        asked to stop."""
        phase = f"training epoch {self.epoch + 1} of {self.config.optim.epochs}"
        self.alive.enter(phase if self.alive.steps >= FIRST_STEPS else f"{phase}, its first steps")
        self.model.train()
        for hook in self.hooks:
            hook.begin_epoch(self.epoch, self.config.optim.epochs)
        began, seconds_before = time.perf_counter(), self.seconds["epoch"]
        self.monitor.begin_epoch(self.epoch, self.step)
        for micro_batches in self.steps():
            loss, norm = self.train_step(micro_batches)
            self.step += 1
            if self.alive.steps == FIRST_STEPS:
                self.alive.enter(phase)
            if self.monitor.due(self.step):
                stop = self.monitor.look(self.step, self.optimizer_step, loss, norm)
                self.seconds["epoch"] = seconds_before + time.perf_counter() - began
                if stop:
                    break
        self.seconds["waiting"] += self.waiting.read()
        return self.step == self.steps_per_epoch

    def steps(self) -> Iterator[Batches]:
        """The rest of the epoch's optimizer steps, each a list of micro-batches on the device, mixed."""
        device = self.process.device
        batches = self.batches.epoch(self.epoch, self.step)
        for step in range(self.step, self.steps_per_epoch):
            micro = []
            for _ in range(self.config.optim.accumulate):
                self.alive.reading = True
                with self.waiting.running():
                    images, labels = next(batches)
                    images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                self.alive.reading = False
                micro.append(self.mix(images, labels, self.epoch, step))
            if self.tracker and self.epoch == 0 and step == 0:
                self.tracker.samples(micro[0][0], self.data.mean, self.data.std)
                self.tracker.pictures({tag: one for hook in self.hooks for tag, one in hook.pictures().items()}, 0)
            yield micro

    def train_step(self, micro_batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step. Returns the loss (mean over this rank's images) and the gradient norm, on the device.

        Both may be overwritten by the next step.
        """
        self.alive.steps += 1
        rate = learning_rate(self.config.optim, self.global_step, self.steps_per_epoch)
        return self.optimizer_step(micro_batches, rate, stop=self.monitor.stop_requested())

    def epoch_metrics(self) -> dict[str, float]:
        """What the epoch's training was like; its counts begin anew."""
        totals = self.optimizer_step.totals
        loss_sum, finite_steps = (self.process.sum(totals.clone()) / self.process.world_size).tolist()
        totals.zero_()
        seconds, waiting = self.seconds["epoch"], self.seconds["waiting"]
        self.seconds = {"epoch": 0.0, "run": self.seconds["run"] + seconds, "waiting": 0.0}
        metrics = {
            "train/loss": loss_sum / finite_steps if finite_steps else math.nan,
            "train/lr": self.optimizer.param_groups[-1]["lr"],
            "train/images_per_s": self.steps_per_epoch * self.config.data.batch_size / max(seconds, 1e-9),
            "train/data_wait_percent": 100 * waiting / max(seconds, 1e-9),
            "train/skipped_steps": float(self.optimizer_step.skipped[0].item()),
            **self.sizes(),  # here too: what is stopped early has no result
        }
        if self.process.device.type == "cuda":  # the most that tensors have taken in this process so far
            metrics["train/peak_memory_mib"] = torch.cuda.max_memory_allocated(self.process.device) / 2**20
        if self.best["epoch"]:
            metrics["val/best_accuracy"] = self.best["accuracy"]
        for hook in self.hooks:
            metrics |= hook.end_epoch(self.epoch)
        return metrics

    def validate(self, split: ImageSet) -> None:
        """Validate raw and averaged weights, and keep the better of both if nothing was as good so far.

        `val/best_accuracy` is that of the weights that are kept. NaN is never better. Raises Stopped.
        """
        self.alive.enter(f"validating epoch {self.epoch}")
        stop = self.monitor.stop_requested
        self.metrics["val/loss"], self.metrics["val/accuracy"] = self.evaluate(self.model, split, stop=stop)
        accuracies = {"raw": self.metrics["val/accuracy"]}
        if self.ema:
            _, accuracies["ema"] = self.evaluate(self.ema.model, split, stop=stop)
            self.metrics["val/ema_accuracy"] = accuracies["ema"]
        weights = max(accuracies, key=lambda k: -math.inf if math.isnan(accuracies[k]) else accuracies[k])
        eligible = all(hook.may_be_best(self.epoch - 1) for hook in self.hooks)
        if eligible and accuracies[weights] > self.best["accuracy"]:
            self.best = {"accuracy": accuracies[weights], "epoch": self.epoch, "weights": weights}
            self.metrics["val/best_accuracy"] = accuracies[weights]
            write_checkpoint(self, f"best-{self.epoch:05d}", None)

    def evaluate(
        self,
        model: nn.Module,
        split: ImageSet,
        views: Views = ONE,
        counts: ClassCounts | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Score:
        """`mamba.train.evaluate.evaluate` with the run's settings. What is compiled is so for the training batch alone:
        more graphs would cost more than they save here."""
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            return evaluate(
                model, self.data, split, self.process, self.config.eval.batch_size, self.amp, views, counts, stop
            )

    def end_epoch(self) -> None:
        """Log, save and report the epoch that has ended."""
        if self.tracker:
            rates = {str(g["name"]): float(g["lr"]) for g in self.optimizer.param_groups}
            self.tracker.epoch(self.epoch, self.global_step, self.metrics, rates)
        # weights that no longer give a finite loss must not replace the last good ones
        good = self.optimizer_step.skipped[1].item() == 0
        due = self._due(self.config.checkpoint.every) and (good or self.epoch == self.config.optim.epochs)
        saved = save(self) if due else None
        self.process.report({"epoch": self.epoch, **self.metrics}, saved)

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Test once, with the weights that validated best (the last ones where nothing was validated)."""
        finish_writing(self)
        model: MambaModel = self.ema.model if self.ema else self.model
        kept = own_best(self)
        if kept is not None:
            model, _ = ckpt.load_model(kept, device=self.process.device)
        else:  # none was, or it was taken away: the last weights are what is left
            forget_best(self)
            last = self.metrics.get("val/ema_accuracy" if self.ema else "val/accuracy", math.nan)
            self.metrics |= {SCORE: last} if math.isfinite(last) else {}
        self.alive.enter("testing")
        views, compared = self._views(model)
        counts = ClassCounts(self.data.classes, self.process.device)
        score = self.evaluate(model, self.data.test, views, counts)
        if math.isnan(score.loss):
            skipped = int(self.optimizer_step.skipped[0].item())
            raise TrainingError(
                f"the run diverged: after {self.epoch} epochs no weights are left whose outputs are finite ({skipped} "
                "optimizer steps were skipped); lower optim.lr, set optim.grad_clip or try --preset unstable",
                every_rank=True,
            )
        epoch = self.best["epoch"] if kept else self.epoch
        tested = {"weights": self.best["weights"], "epoch": epoch, "tta_views": views.count, **compared}
        confusion = counts.result()
        result = self._result(score, confusion, tested)
        if self.tracker:
            self.tracker.confusion(confusion, self.global_step)
            self.tracker.finish(result, self.global_step)
        return result

    def _result(self, score: Score, confusion: Confusion, tested: dict[str, Any]) -> dict[str, Any]:
        """What result.json holds. `score` and `confusion`: of the test images; `tested`: of which weights, and how."""
        data = self.data
        return {
            "status": "finished",
            "metrics": {
                **self.metrics,
                "test/loss": score.loss,
                "test/accuracy": score.accuracy,
                **({} if confusion.top5 is None else {"test/top5_accuracy": confusion.top5}),
                **self.sizes(),
            },
            "tested": tested,
            "by_class": confusion.to_dict(),
            "epochs": self.epoch,
            "seconds": round(self.seconds["run"], 3),
            "seed": self.config.seed,
            "world_size": self.process.world_size,
            "amp": str(self.amp).removeprefix("torch.") if self.amp else "off",
            "compiled": self.compiled,
            "recorded": self.optimizer_step.recorded is not None,
            "images": {"train": len(data.train), "val": len(data.val or ()), "test": len(data.test)},
            "folder": str(self.folder),
            **environment(self.process.device),
        }

    def _views(self, model: MambaModel) -> tuple[Views, dict[str, Any]]:
        """The views to test with, and what result.json says of them where several were asked for."""
        config, val = self.config.eval, self.data.val
        if config.tta_views == 1:
            return ONE, {}
        asked = Views.fitting(config.tta_views, self.config.data, self.data.side)
        score = None if val is None else lambda views: self.evaluate(model, val, views)
        views, said = best_views(asked, score, config.tta_always)
        return views, {"tta": said}

    def close(self) -> None:
        self.writer.close()
        self.optimizer_step.recorded = None  # it refers to itself; a graph must not outlive its process group
        if self.tracker:
            with suppress(OSError):  # a full disk has been reported by then
                self.tracker.close()


def initial_model(config: RunConfig, folder: Path, classes: int, side: int, process: Process) -> MambaModel:
    """New weights, or those of what the run starts from, with its widths."""
    model = first_weights(config, folder, classes, side)
    if config.model.sync_batchnorm and process.world_size > 1 and process.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Turn a device that is out of memory into a sentence."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        gpu = isinstance(error, torch.OutOfMemoryError)
        if not gpu and not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(
            f"out of {'GPU ' if gpu else ''}memory ({(str(error) or type(error).__name__).splitlines()[0]}); lower "
            "data.batch_size, raise optim.accumulate or choose a smaller model"
        ) from None
