"""Run by torchrun in test_distributed.py: train the configs in the folders given, one after the other, in a real
process group. `how.json` beside a config names a function of this file, with its argument."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from mamba.config.schema import RunConfig
from mamba.train import gradients
from mamba.train.distributed import torchrun_process
from mamba.train.trainer import Trainer, fit
from pruning.rounds import hooks_for
from tests.conftest import make_small_data


@contextmanager
def poison(step_at: int):
    """Make one batch of rank 1 not finite."""
    original = Trainer.train_step

    def step(self, micro_batches):
        if self.process.rank == 1 and self.global_step == step_at:
            micro_batches = [(images * float("nan"), targets) for images, targets in micro_batches]
        return original(self, micro_batches)

    with patch.object(Trainer, "train_step", step):
        yield


@contextmanager
def buckets(size: int):
    """Sum gradients as recorded steps do, which are for GPUs only, instead of by DistributedDataParallel."""
    original = gradients.FlatGradients.__init__

    def init(self, *args):
        original(self, *args)
        assert len(self.buckets) > 3

    changed = patch.object(gradients.FlatGradients, "__init__", init)
    with patch.object(gradients, "BUCKET", size), patch.dict(os.environ, {gradients.CHOICE: "flat"}), changed:
        yield


@contextmanager
def resumed(name: str):
    """Go on from the first two epochs of a run that has ended. The schedule is that of the whole run, so it is cut by
    leaving out the last checkpoint."""
    if process.rank == 0:
        shutil.copytree(folder.parent / name, folder, dirs_exist_ok=True)
        checkpoints = sorted((folder / "checkpoints").glob("step-*"))
        assert len(checkpoints) == 3
        shutil.rmtree(checkpoints[-1])
    dist.barrier()
    yield


@contextmanager
def statistics(ways: str):
    """Keep each rank's batch norm statistics: after each step, at each evaluation and at the end; gradients are
    averaged as `ways` says."""
    seen: dict[str, list[torch.Tensor]] = {"step": [], "evaluated": []}
    step, evaluate, close = Trainer.train_step, Trainer.evaluate, Trainer.close

    def note(kind, model):
        buffers = [b.flatten().float() for name, b in model.named_buffers() if "running" in name]
        seen[kind].append(torch.cat(buffers).clone())

    def noted_step(self, micro_batches):
        result = step(self, micro_batches)
        note("step", self.model)
        return result

    def noted_evaluate(self, model, *args, **named):
        note("evaluated", model)
        return evaluate(self, model, *args, **named)

    def noted_close(self):
        torch.save(seen, self.folder / f"statistics-{self.process.rank}.pt")
        close(self)

    changed = {"train_step": noted_step, "evaluate": noted_evaluate, "close": noted_close}
    with patch.multiple(Trainer, **changed), patch.dict(os.environ, {gradients.CHOICE: ways}):
        yield


HOW = {"poison": poison, "buckets": buckets, "statistics": statistics, "resumed": resumed}

torch.set_num_threads(1)
process = torchrun_process()
for folder in map(Path, sys.argv[1:]):
    config = RunConfig.from_yaml(folder / "config.yaml")
    with ExitStack() as stack:
        if (folder / "how.json").exists():
            name, argument = json.loads((folder / "how.json").read_text())
            stack.enter_context(HOW[name](argument))
        fit(config, process, folder, make_small_data(), hooks_for(config, process.rank))
dist.destroy_process_group()
