"""Training, from a resolved config to a result: `fit` reads top to bottom, everything else serves it.

One `Trainer` a rank. All that changes while it runs is in `state()`, so that a run interrupted at any optimizer step
continues as if it had not been: same order, same random numbers, same bits on a deterministic device.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mamba.config.schema import RunConfig
from mamba.data.augment import tta_views
from mamba.data.device_loader import make_train_batches
from mamba.data.images import ImageData, ImageSet
from mamba.data.loader import eval_batches
from mamba.data.mix import BatchMix
from mamba.data.registry import load_data
from mamba.errors import ForgeError, TrainingError
from mamba.models.model import Architecture, MambaModel, count_parameters
from mamba.ops.conv import HAS_TRITON
from mamba.runs import checkpoint as ckpt
from mamba.runs.tracking import Tracker, environment
from mamba.train.compilation import compile_blocks, should_compile
from mamba.train.distributed import Pending, Process
from mamba.train.ema import ModelEma
from mamba.train.gradients import FlatGradients
from mamba.train.hooks import TrainHook
from mamba.train.loss import TrainingLoss
from mamba.train.optim import make_optimizer
from mamba.train.record import Batches, RecordedStep
from mamba.train.schedule import learning_rate, set_learning_rate
from mamba.train.stopwatch import Stopwatch

if TYPE_CHECKING:
    from mamba.ops.update.triton import FusedUpdate

LOG_EVERY_S = 0.5
"""Seconds between two lines of step metrics, and between two looks for a request to stop."""
LOOK_EVERY_STEPS = 10
"""Steps between two looks at what lives on a GPU (skipped steps, a request to stop, the loss). A look starts a copy and
reads the one before, so that the device always has work in its queue."""


class Look(NamedTuple):
    """What the device showed after an optimizer step: skipped steps in a row, stop, loss, gradient norm."""

    step: int
    values: Tensor
    ready: torch.cuda.Event | None


def fit(
    config: RunConfig, process: Process, folder: Path, data: ImageData | None = None, hooks: Sequence[TrainHook] = ()
) -> dict[str, Any]:
    """Train a resolved config in `folder`, from its newest checkpoint if there is one; every rank calls it.

    Returns:
        what result.json holds; with status "interrupted" when `request_stop` was called.

    Raises:
        ForgeError: data, checkpoint or training errors, each a sentence for the user.
    """
    data = data if data is not None else load_data(config.data, config.seed)
    trainer = Trainer(config, process, folder, data, hooks)
    try:
        return trainer.run()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of GPU memory ({str(error).splitlines()[0]}); lower data.batch_size or raise optim.accumulate"
        ) from None
    except OSError as error:
        raise TrainingError(f"the run's folder {folder} could not be written to: {error}") from None
    finally:
        trainer.close()


def request_stop(folder: Path) -> None:
    """Ask the run in this folder to save a checkpoint at its current step and end."""
    (folder / "STOP").touch()


class Trainer:
    """A rank's model, optimizer and position, and the loop over them."""

    def __init__(
        self, config: RunConfig, process: Process, folder: Path, data: ImageData, hooks: Sequence[TrainHook] = ()
    ) -> None:
        gpu = process.device.type == "cuda"
        config.check_workers(process.world_size, gpu)
        self.config, self.process, self.folder, self.data, self.hooks = config, process, folder, data, hooks
        optim = config.optim
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.model = self._initial_model().to(process.device)
        self.statistics = batch_norm_statistics(self.model)  # a forward pass changes them, a skipped step must not
        self.ema = ModelEma(self.model, config.ema.decay) if config.ema.enabled else None
        self.optimizer = make_optimizer(self.model, optim)
        self.mix = BatchMix.from_config(config, len(data.classes))
        cpus = config.scaling.cpus_per_worker or process.cpus
        self.batches = make_train_batches(
            data, config.data, config.seed, optim.accumulate, process.rank, process.world_size, cpus, process.device
        )
        self.steps_per_epoch = self.batches.sampler.steps
        self.amp = resolve_amp(optim.amp, process.device)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=self.amp is torch.float16)

        side = data.side
        self.loss = TrainingLoss(config, len(data.classes), side, process.device, self.amp)

        self.epoch = 0  # epochs completed
        self.step = 0  # optimizer steps taken in the current epoch
        self.totals = torch.zeros(2, dtype=torch.float64, device=process.device)  # this epoch's loss sum and count
        self.seconds = {"epoch": 0.0, "run": 0.0, "waiting": 0.0}  # training, validation left out; for data
        self.skipped = torch.zeros(2, device=process.device)  # non-finite steps: in all, and in a row
        self.stop_asked = torch.zeros((), device=process.device)  # 1 once this rank saw the request to stop
        self.stop = torch.zeros((), device=process.device)  # above 0 once any rank did
        self.looked_for_stop = 0.0
        self.rate = torch.zeros((), device=process.device)  # the learning rate, where a recorded step reads it
        self.waiting = Stopwatch(process.device)
        self.looks: list[Look] = []  # begun and not yet read
        self.logged, self.logged_step = 0.0, 0  # when, and after which step of the epoch
        self.best: dict[str, Any] = {"accuracy": -math.inf, "epoch": 0, "weights": "ema" if self.ema else "raw"}
        self.metrics: dict[str, float] = {}
        torch.manual_seed(config.seed + 1000 * (process.rank + 1))  # drop path differs between ranks
        self._restore()
        for hook in hooks:
            hook.attach(self.model, self.ema, self.optimizer, config.seed)

        self.compiled = should_compile(optim.compile, optim.epochs * len(data.train), process.device)
        if self.compiled:
            compile_blocks(self.model)
        self.forward: nn.Module = self.model
        self.recorded: RecordedStep | None = None
        self.fused: FusedUpdate | None = None
        self.flat: FlatGradients | None = None
        if self._should_record():
            from mamba.ops.update.triton import FusedUpdate  # needs triton

            parameters = dict(self.model.named_parameters())
            self.fused = FusedUpdate(self.optimizer, self.ema, parameters, optim.grad_clip)
            self.flat = FlatGradients(list(parameters.values()), process) if process.world_size > 1 else None
            self.recorded = RecordedStep(self._optimizer_step, self.fused.fill_in)
        elif process.world_size > 1:
            device_ids = [process.device.index] if gpu else None
            self.forward = DistributedDataParallel(self.model, device_ids=device_ids)
        self.tracker = Tracker(folder, config, self.epoch, self.global_step) if process.rank == 0 else None

    def _initial_model(self) -> MambaModel:
        """New weights, or those of the checkpoint that the run starts from, with its widths."""
        config, classes, side = self.config.model, len(self.data.classes), self.data.side
        if config.checkpoint is None:
            model = MambaModel(Architecture.from_config(config, classes, side))
        else:
            ckpt.check_start(config.checkpoint, classes, side)
            model = ckpt.load_model(config.checkpoint, drop_path=config.drop_path)[0]
        if config.sync_batchnorm and self.process.world_size > 1 and self.process.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model

    @property
    def global_step(self) -> int:
        """Optimizer steps taken in the whole run."""
        return self.epoch * self.steps_per_epoch + self.step

    # --- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        config = self.config
        while self.epoch < config.optim.epochs:
            self.model.train()
            for hook in self.hooks:
                hook.begin_epoch(self.epoch, config.optim.epochs)
            if self._train_epoch() == "stop":
                self._save_state()
                return {"status": "interrupted", "epoch": self.epoch, "step": self.step, "folder": str(self.folder)}
            self.metrics = self._train_metrics()
            for hook in self.hooks:
                self.metrics |= hook.end_epoch(self.epoch)
            self.epoch, self.step = self.epoch + 1, 0
            last = self.epoch == config.optim.epochs
            if self.data.val is not None and (last or self.epoch % config.eval.every == 0):
                self._validate(self.data.val)
            if self.tracker:
                self.tracker.epoch(self.epoch, self.epoch * self.steps_per_epoch, self.metrics, self._rates())
            # weights that no longer give a finite loss must not replace the last good ones
            due = self.epoch % config.checkpoint.every == 0 and self.skipped[1].item() == 0
            saved = self._save_state() if last or due else None
            self.process.report(self.metrics, saved)
        return self._finish()

    def _train_epoch(self) -> str:
        """Train what is left of the current epoch. Returns "stop" if the run was asked to stop, else "done"."""
        began, seconds_before = time.perf_counter(), self.seconds["epoch"]
        self.logged, self.logged_step = began, self.step
        for micro_batches in self._steps():
            loss, norm = self._train_step(micro_batches)
            self.step += 1
            last = self.step == self.steps_per_epoch
            if self.process.device.type == "cpu" or last or self.step % LOOK_EVERY_STEPS == 0:
                stop = self._look(loss, norm, last)
                self.seconds["epoch"] = seconds_before + time.perf_counter() - began
                if stop and not last:
                    break
        self.looks.clear()
        self.seconds["waiting"] += self.waiting.read()
        return "done" if self.step == self.steps_per_epoch else "stop"

    def _steps(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The rest of the epoch's optimizer steps, each a list of micro-batches on the device, mixed."""
        config, device = self.config, self.process.device
        batches = self.batches.epoch(self.epoch, self.step)
        for step in range(self.step, self.steps_per_epoch):
            micro = []
            for _ in range(config.optim.accumulate):
                with self.waiting.running():
                    images, labels = next(batches)
                    images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                micro.append(self.mix(images, labels, self.epoch, step))
            if self.tracker and self.epoch == 0 and step == 0:
                self.tracker.samples(micro[0][0], self.data.mean, self.data.std)
            yield micro

    def _train_step(self, micro_batches: Batches) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns the loss (mean over this rank's images) and the gradient norm, on the device.

        Both may be overwritten by the next step.
        """
        rate = learning_rate(self.config.optim, self.global_step, self.steps_per_epoch)
        set_learning_rate(self.optimizer, rate)
        self.rate.fill_(rate)
        if self._stop_requested():
            self.stop_asked.fill_(1)
        return self.recorded(micro_batches) if self.recorded else self._optimizer_step(micro_batches)

    def _optimizer_step(self, micro_batches: Batches) -> tuple[Tensor, Tensor]:
        """The part of a step that happens on the device, which can be recorded: no value is read back by the host, and
        what lasts longer than the step is changed in place.

        A step whose loss or gradient is not finite on any rank changes nothing on any of them and is counted.
        """
        statistics = [buffer.clone() for buffer in self.statistics]
        loss = torch.zeros((), device=self.process.device)
        flags: Tensor
        agreed: Pending
        for i, (images, targets) in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            hold = isinstance(self.forward, DistributedDataParallel) and not last
            with self.forward.no_sync() if hold else nullcontext():  # type: ignore[operator]
                with torch.autocast(self.process.device.type, dtype=self.amp, enabled=self.amp is not None):
                    logits = self.forward(images)
                part = self.loss(images, logits, targets) / len(micro_batches)
                loss += part.detach()
                if last:  # what only this rank knows travels during backward
                    flags = torch.stack(((~loss.isfinite()).float(), self.stop_asked))
                    agreed = self.process.begin_sum(flags)
                    if self.flat:
                        self.flat.expect()
                share = part / self.process.world_size if self.flat else part  # their sum is the average
                self.scaler.scale(share).backward()
        if self.flat:
            self.flat.sum()
        self.scaler.unscale_(self.optimizer)
        for hook in self.hooks:
            hook.gradients()
        norm = self.fused.norm() if self.fused else self._clip()
        # gradients are averaged over the ranks, so their norm is the same everywhere; losses are not
        if self.flat:  # DistributedDataParallel would hand out rank 0's; with SyncBatchNorm they are equal anyway
            for buffer in self.statistics:
                if buffer.is_floating_point():
                    self.process.sum(buffer).div_(self.process.world_size)
        agreed.wait()
        finite = (flags[0] == 0) & norm.isfinite()
        self.stop += flags[1]
        for buffer, before in zip(self.statistics, statistics, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        self._apply(norm, finite)
        bad = (~finite).float()
        self.skipped[0] += bad
        self.skipped[1] = (self.skipped[1] + 1) * bad
        self.totals += torch.stack((loss.masked_fill(~finite, 0.0).double(), finite.double()))
        return loss, norm

    def _clip(self) -> Tensor:
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip or math.inf)

    def _apply(self, norm: Tensor, finite: Tensor) -> None:
        """Step the optimizer where `finite`, and the average with it."""
        if self.fused:  # clips as well
            self.fused.apply(self.rate, norm, finite)
        elif self.scaler.is_enabled():  # the scaler reads its own verdict on the host anyway
            if finite.item():
                self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema and not self.fused:
            self.ema.update(finite)

    def _should_record(self) -> bool:
        """What `optim.cuda_graph` means here; a warning where it is asked for and not possible."""
        asked = self.config.optim.cuda_graph
        if not asked or self.process.device.type != "cuda":
            return False
        obstacle = None
        if self.scaler.is_enabled():
            obstacle = "fp16 cannot be recorded"
        elif not HAS_TRITON:
            obstacle = "triton is missing"
        if obstacle and asked is True:
            warnings.warn(f"optim.cuda_graph: {obstacle}, steps are launched one by one", stacklevel=2)
        return obstacle is None

    # --- validation and the end --------------------------------------------------------------------------------------

    def _validate(self, split: ImageSet) -> None:
        """Validate raw and averaged weights, and keep the best of both so far."""
        self.metrics["val/loss"], self.metrics["val/accuracy"] = self.evaluate(self.model, split)
        accuracies = {"raw": self.metrics["val/accuracy"]}
        if self.ema:
            _, accuracies["ema"] = self.evaluate(self.ema.model, split)
            self.metrics["val/ema_accuracy"] = accuracies["ema"]
        weights = max(accuracies, key=lambda k: accuracies[k])
        eligible = all(hook.may_be_best(self.epoch - 1) for hook in self.hooks)
        if eligible and accuracies[weights] > self.best["accuracy"]:
            self.best = {"accuracy": accuracies[weights], "epoch": self.epoch, "weights": weights}
            self._save(self.folder / "checkpoints" / f"best-{self.epoch:05d}", None)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: ImageSet, views: int = 1) -> tuple[float, float]:
        """Mean cross-entropy and accuracy in percent over a split, counted exactly over all ranks.

        With several views, the class probabilities of each image's views are averaged.
        """
        if self.compiled:  # for the training batch alone: more graphs would cost more than they save here
            with torch.compiler.set_stance("force_eager"):
                return self._evaluate(model, split, views)
        return self._evaluate(model, split, views)

    def _evaluate(self, model: nn.Module, split: ImageSet, views: int) -> tuple[float, float]:
        process = self.process
        model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=process.device)
        batches = eval_batches(
            self.data, split, self.config.eval.batch_size, process.rank, process.world_size, process.device
        )
        for images, labels in batches:
            with torch.autocast(process.device.type, dtype=self.amp, enabled=self.amp is not None):
                seen = [model(view).float().softmax(-1) for view in tta_views(images, views)]
            log_probabilities = torch.stack(seen).mean(0).clamp_min(1e-12).log()
            loss = F.nll_loss(log_probabilities, labels, reduction="sum")
            correct = (log_probabilities.argmax(-1) == labels).sum()
            totals += torch.stack(
                (loss.double(), correct.double(), torch.tensor(float(len(labels)), device=loss.device))
            )
        loss_sum, correct_sum, count = process.sum(totals).tolist()
        return loss_sum / count, 100 * correct_sum / count

    def _finish(self) -> dict[str, Any]:
        """Test once, with the weights that validated best (the last ones where nothing was validated)."""
        chosen = str(self.best["weights"])
        model: MambaModel = self.ema.model if self.ema else self.model
        best = ckpt.best_checkpoint(self.folder)
        if best is not None:
            model, _ = ckpt.load_model(best, device=self.process.device)
        views = self.config.eval.tta_views
        test_loss, test_accuracy = self.evaluate(model, self.data.test, views)
        metrics = {
            **self.metrics,
            "test/loss": test_loss,
            "test/accuracy": test_accuracy,
            "model/params": count_parameters(self.model),
            "model/macs": self.model.architecture.macs(),
        }
        result = {
            "status": "finished",
            "metrics": metrics,
            "tested": {"weights": chosen, "epoch": self.best["epoch"] if best else self.epoch, "tta_views": views},
            "epochs": self.epoch,
            "seconds": round(self.seconds["run"], 3),
            "seed": self.config.seed,
            "world_size": self.process.world_size,
            "amp": str(self.amp).removeprefix("torch.") if self.amp else "off",
            "compiled": self.compiled,
            "recorded": self.recorded is not None,
            "images": {"train": len(self.data.train), "val": len(self.data.val or ()), "test": len(self.data.test)},
            "folder": str(self.folder),
            **environment(self.process.device),
        }
        if self.tracker:
            self.tracker.finish(result, self.global_step)
        return result

    def close(self) -> None:
        self.recorded = None  # it refers to this trainer; a graph must not outlive the process group it talks through
        if self.tracker:
            with suppress(OSError):  # a full disk has been reported by then
                self.tracker.close()

    # --- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that changes while training, weights excepted: plain containers and tensors only."""
        cuda = torch.cuda.get_rng_state(self.process.device) if self.process.device.type == "cuda" else None
        return {
            "epoch": self.epoch,
            "step": self.step,
            "totals": self.process.sum(self.totals.clone()) / self.process.world_size,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "best": self.best,
            "metrics": self.metrics,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema_updates": int(self.ema.updates.item()) if self.ema else 0,
            "train_images": len(self.data.train),
            "rng": self.process.gather({"cpu": torch.get_rng_state(), "cuda": cuda}),
            "world_size": self.process.world_size,
        }

    def _restore(self) -> None:
        """Continue from the newest checkpoint of the run's folder, if there is one."""
        folder = ckpt.newest_checkpoint(self.folder)
        if folder is None:
            return
        ckpt.load_weights(self.model, folder)
        state = ckpt.load_training_state(folder)
        if state["train_images"] != len(self.data.train):
            raise ckpt.CheckpointError(
                f"{folder} was trained on {state['train_images']} images and the training set now has "
                f"{len(self.data.train)}: a run resumes on its own data only"
            )
        if self.ema:
            ckpt.load_weights(self.ema.model, folder, ckpt.EMA_WEIGHTS)
            self.ema.updates.fill_(state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.totals.copy_(state["totals"])
        self.skipped.copy_(state["skipped"])
        self.seconds, self.best, self.metrics = state["seconds"], state["best"], state["metrics"]
        if self.process.rank == 0:
            ckpt.remove_best_after(self.folder, self.epoch)
        if state["world_size"] == self.process.world_size:  # else drop path goes on from a fresh seed
            rng = state["rng"][self.process.rank]
            torch.set_rng_state(rng["cpu"])
            if rng["cuda"] is not None and self.process.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.process.device)

    def _save_state(self) -> Path:
        folder = self.folder / "checkpoints" / f"step-{self.global_step:08d}"
        self._save(folder, self.state())  # every rank: its random state is gathered
        if self.process.rank == 0:  # a best is dropped only once no training state can lead back to before the next
            ckpt.remove_old(self.folder, "step-*", self.config.checkpoint.keep)
            ckpt.remove_old(self.folder, "best-*", 1)
        return folder

    def _save(self, folder: Path, state: dict[str, Any] | None) -> None:
        """Rank 0 writes; all ranks learn whether it worked, so that they end together."""
        failure: str | None = None
        if self.process.rank == 0:
            description = {
                "epoch": self.epoch,
                "metrics": self.metrics,
                "weights": self.best["weights"],
                "classes": list(self.data.classes),
                "mean": list(self.data.mean),
                "std": list(self.data.std),
                "config": self.config.model_dump(mode="json"),
            }
            try:
                extra = {name: tensors for hook in self.hooks for name, tensors in hook.files().items()}
                ema = self.ema.model if self.ema else None
                ckpt.save_checkpoint(folder, self.model, ema, description, state, extra)
            except ForgeError as error:
                failure = str(error)
        failure = self.process.broadcast(failure)
        if failure:
            raise ckpt.CheckpointError(failure, every_rank=True)

    # --- looking at the device ---------------------------------------------------------------------------------------

    def _train_metrics(self) -> dict[str, float]:
        loss_sum, count = (self.process.sum(self.totals.clone()) / self.process.world_size).tolist()
        self.totals.zero_()
        seconds, waiting = self.seconds["epoch"], self.seconds["waiting"]
        self.seconds = {"epoch": 0.0, "run": self.seconds["run"] + seconds, "waiting": 0.0}
        return {
            "train/loss": loss_sum / max(1.0, count),
            "train/lr": self.optimizer.param_groups[-1]["lr"],
            "train/images_per_s": self.steps_per_epoch * self.config.data.batch_size / max(seconds, 1e-9),
            "train/data_wait_percent": 100 * waiting / max(seconds, 1e-9),
            "train/skipped_steps": float(self.skipped[0].item()),
            **peak_memory(self.process.device),
        }

    def _rates(self) -> dict[str, float]:
        return {str(g["name"]): float(g["lr"]) for g in self.optimizer.param_groups}

    def _look(self, loss: Tensor, norm: Tensor, now: bool) -> bool:
        """Begin a look at the device, and act on the one before, or with `now` on this one. Returns whether to stop.

        Which look is acted on depends on the step alone, so all ranks stop at the same one.
        """
        gpu = self.process.device.type == "cuda"
        values = torch.stack((self.skipped[1], self.stop, loss, norm))
        ready = None
        if gpu:
            values = torch.empty(4, pin_memory=True).copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.looks.append(Look(self.step, values, ready))
        if gpu and not now and len(self.looks) == 1:
            return False
        look = self.looks[-1] if now else self.looks[0]
        self.looks = [] if now or not gpu else self.looks[1:]
        if look.ready:
            look.ready.synchronize()
        in_a_row, stop, loss_value, norm_value = look.values.tolist()
        self._log_step(look.step, loss_value, norm_value, always=now)
        self._check_skipped(int(in_a_row))
        return stop > 0

    def _log_step(self, step: int, loss: float, norm: float, always: bool) -> None:
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

    def _check_skipped(self, in_a_row: int) -> None:
        if in_a_row >= self.config.optim.max_skipped:
            newest = ckpt.newest_checkpoint(self.folder)
            raise TrainingError(
                f"loss or gradient was not finite in {in_a_row} steps in a row (optim.max_skipped "
                f"{self.config.optim.max_skipped}), last in epoch {self.epoch + 1}; lower optim.lr, set "
                f"optim.grad_clip or try --preset unstable; last good checkpoint: {newest or 'none yet'}",
                every_rank=True,
            )

    def _stop_requested(self) -> bool:
        """Rank 0 looks for the file; the answer travels with the step's other flags, so all ranks stop together."""
        now = time.perf_counter()
        if self.process.rank != 0 or now - self.looked_for_stop < LOG_EVERY_S:
            return False
        self.looked_for_stop = now
        return (self.folder / "STOP").exists()


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most GPU memory that tensors have taken in this process so far, in MiB."""
    if device.type != "cuda":
        return {}
    return {"train/peak_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20}


def batch_norm_statistics(model: nn.Module) -> list[Tensor]:
    """The running means, variances and counts of a model's batch norms."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers()]


def resolve_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of `optim.amp`: on GPUs auto is bf16 where it is native, else fp16; on CPU auto is off."""
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
