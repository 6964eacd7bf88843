"""Run by torchrun in test_distributed.py: train the config in the folder given, in a real process group."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mamba.config import RunConfig
from mamba.trainer import Trainer, fit
from mamba.worker import torchrun_worker
from pruning.rounds import hooks_for


def poison_rank_1(step_at: int) -> None:
    """Make one batch of rank 1 not finite."""
    original = Trainer._train_step

    def step(self, micro_batches):
        if self.worker.rank == 1 and self.global_step == step_at:
            micro_batches = [(images * float("nan"), targets) for images, targets in micro_batches]
        return original(self, micro_batches)

    Trainer._train_step = step


folder = Path(sys.argv[1])
torch.set_num_threads(1)
if len(sys.argv) > 2:
    poison_rank_1(int(sys.argv[2]))
config, worker = RunConfig.from_yaml(folder / "config.yaml"), torchrun_worker()
fit(config, worker, folder, hooks=hooks_for(config, worker.rank))
dist.destroy_process_group()
