"""Run by torchrun in test_distributed.py: train the configs in the folders given, one after the other, in a real
process group. `how.json` beside a config names a function of this file, with its argument."""

from __future__ import annotations

import json
import os
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
    with patch.object(gradients, "BUCKET", size), patch.dict(os.environ, {gradients.CHOICE: "flat"}):
        yield


HOW = {"poison": poison, "buckets": buckets}

torch.set_num_threads(1)
process = torchrun_process()
for folder in map(Path, sys.argv[1:]):
    config = RunConfig.from_yaml(folder / "config.yaml")
    with ExitStack() as stack:
        if (folder / "how.json").exists():
            name, argument = json.loads((folder / "how.json").read_text())
            stack.enter_context(HOW[name](argument))
        fit(config, process, folder, hooks=hooks_for(config, process.rank))
dist.destroy_process_group()
