"""Run by torchrun in test_distributed.py: train the config in the folder given, in a real process group."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mamba import parallel
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


def sum_in_buckets(size: int) -> None:
    """Gradients as recorded steps sum them, which are for GPUs only, instead of by DistributedDataParallel."""
    original = Trainer.__init__

    def init(self, config, worker, *args, **kwargs):
        original(self, config, worker, *args, **kwargs)
        self.forward, self.flat = self.model, parallel.FlatGradients(list(self.model.parameters()), worker)
        assert len(self.flat.buckets) > 3

    parallel.BUCKET = size
    Trainer.__init__ = init


folder = Path(sys.argv[1])
torch.set_num_threads(1)
match sys.argv[2:]:
    case ["poison", step]:
        poison_rank_1(int(step))
    case ["buckets", size]:
        sum_in_buckets(int(size))
config, worker = RunConfig.from_yaml(folder / "config.yaml"), torchrun_worker()
fit(config, worker, folder, hooks=hooks_for(config, worker.rank))
dist.destroy_process_group()
