"""One optimizer step, as the device takes it: forward, loss, backward, averages over ranks, clipping, update.

All of it can be recorded as a CUDA graph: no value is read back by the host, and what lasts longer than the step is
changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mamba.config.schema import OptimConfig
from mamba.models.model import MambaModel
from mamba.ops.update import Update, is_known, make_update
from mamba.train.distributed import Pending, Process
from mamba.train.ema import ModelEma
from mamba.train.gradients import Gradients, average_gradients
from mamba.train.hooks import TrainHook
from mamba.train.loss import TrainingLoss
from mamba.train.record import Batches, RecordedStep, can_record
from mamba.train.schedule import set_learning_rate


class RunningStatistics:
    """The running means and variances of a model's batch norms: the same on every rank after each step, the average of
    what the ranks' forward passes made of them, and as before where a step is skipped."""

    def __init__(self, model: nn.Module, process: Process) -> None:
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self.buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self.averaged = [buffer for buffer in self.buffers if buffer.is_floating_point()]  # not the count of batches
        self.process = process

    def copy(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.buffers]

    def average(self) -> None:
        if self.averaged and self.process.world_size > 1:
            flat = torch.cat([buffer.flatten() for buffer in self.averaged])
            parts = self.process.sum(flat).div_(self.process.world_size).split([b.numel() for b in self.averaged])
            torch._foreach_copy_(self.averaged, [p.view_as(b) for p, b in zip(parts, self.averaged, strict=True)])

    def keep(self, finite: Tensor, before: Sequence[Tensor]) -> None:
        """Put back what was before, unless the step was finite."""
        for buffer, old in zip(self.buffers, before, strict=True):
            buffer.copy_(torch.where(finite, buffer, old))


class OptimizerStep:
    """Takes micro-batches on the device and updates the model. Make it when weights and optimizer have been restored;
    `prepare` it when the model is as it will be trained.

    A step whose loss or gradient is not finite on any rank changes nothing on any of them and is counted.
    """

    def __init__(
        self,
        config: OptimConfig,
        process: Process,
        model: MambaModel,
        ema: ModelEma[MambaModel] | None,
        optimizer: torch.optim.Optimizer,
        loss: TrainingLoss,
        amp: torch.dtype | None,
        hooks: Sequence[TrainHook] = (),
    ) -> None:
        self.config, self.process, self.model, self.ema = config, process, model, ema
        self.optimizer, self.loss, self.amp, self.hooks = optimizer, loss, amp, hooks
        device = process.device
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.statistics = RunningStatistics(model, process)
        self.gradients = Gradients(model)
        self.update: Update
        self.recorded: RecordedStep | None = None
        self.rate = torch.zeros((), device=device)  # the learning rate, where a recorded step reads it
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)  # this epoch's loss sum and count
        self.skipped = torch.zeros(2, device=device)  # steps that were not finite: in all, and in a row
        self.bad_loss = torch.zeros((), device=device)  # above 0 where the last step's loss was not finite on some rank
        self.stop_asked = torch.zeros((), device=device)  # 1 once this rank saw the request to stop
        self.stop = torch.zeros((), device=device)  # above 0 once any rank did

    def prepare(self) -> None:
        """Decide how gradients are averaged, and whether steps are recorded."""
        stream = None
        foreign = None if is_known(self.optimizer) else type(self.optimizer).__name__
        recording = can_record(self.config.cuda_graph, self.process.device, self.scaler.is_enabled(), foreign)
        self.update = make_update(self.optimizer, self.ema, self.config.grad_clip, fused=recording)
        if recording:
            self.recorded = RecordedStep(self.take, self.update.fill_in)
            stream = self.recorded.stream
        self.gradients = average_gradients(self.model, self.process, self.config.accumulate, stream)
        if self.recorded:
            self.recorded.warm_up = self.gradients.warm_up

    def __call__(self, micro_batches: Batches, rate: float, stop: bool = False) -> tuple[Tensor, Tensor]:
        """Returns the loss (mean over this rank's images) and the gradient norm, on the device. Both may be overwritten
        by the next step. `stop`: this rank asks all to stop."""
        set_learning_rate(self.optimizer, rate)
        self.rate.fill_(rate)
        if stop:
            self.stop_asked.fill_(1)
        return self.recorded(micro_batches) if self.recorded else self.take(micro_batches)

    def take(self, micro_batches: Batches) -> tuple[Tensor, Tensor]:
        """The part that can be recorded."""
        before = self.statistics.copy()
        loss, flags, agreed = self._backward(micro_batches)
        self.gradients.wait()
        self.scaler.unscale_(self.optimizer)
        for hook in self.hooks:
            hook.gradients()
        norm = self.update.norm()
        self.statistics.average()
        agreed.wait()
        # gradients are averaged over the ranks, so their norm is the same everywhere; losses are not
        finite = (flags[0] == 0) & norm.isfinite()
        self.statistics.keep(finite, before)
        self.update.apply(self.rate, norm, finite)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._count(loss, flags, finite)
        return loss, norm

    def _backward(self, micro_batches: Batches) -> tuple[Tensor, Tensor, Pending]:
        """Gradients of the mean loss. What only this rank knows (a bad loss, a request to stop) travels meanwhile."""
        loss = torch.zeros((), device=self.process.device)
        flags, agreed = loss, None
        for i, (images, targets) in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with self.gradients.micro_batch(last):
                with torch.autocast(self.process.device.type, dtype=self.amp, enabled=self.amp is not None):
                    logits = self.gradients.module(images)
                part = self.loss(images, logits, targets) / len(micro_batches)
                loss += part.detach()
                if last:
                    flags = torch.stack(((~loss.isfinite()).float(), self.stop_asked))
                    agreed = self.process.begin_sum(flags)
                self.scaler.scale(part * self.gradients.share if self.gradients.share != 1 else part).backward()
        assert agreed is not None
        return loss, flags, agreed

    def _count(self, loss: Tensor, flags: Tensor, finite: Tensor) -> None:
        bad = (~finite).float()
        self.skipped[0] += bad
        self.skipped[1] = (self.skipped[1] + 1) * bad
        self.bad_loss.copy_(flags[0])
        self.stop += flags[1]
        self.totals += torch.stack((loss.masked_fill(~finite, 0.0).double(), finite.double()))
