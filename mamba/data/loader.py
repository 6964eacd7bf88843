"""Batches for one rank, made by loader processes.

Order and augmentation are functions of (seed, epoch, step) alone, drawn for the whole global batch: they do not
depend on how many workers or loader processes share it, nor on where a run was interrupted.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mamba.config.schema import DataConfig
from mamba.data.augment import BatchAugment
from mamba.data.files import ImageFiles
from mamba.data.images import ImageData, ImageSet
from mamba.errors import DataError


def check_batch_size(train_images: int, config: DataConfig) -> None:
    """Raises DataError where the training set does not fill one batch."""
    if train_images < config.batch_size:
        raise DataError(
            f"data.batch_size {config.batch_size} is larger than the training set of {train_images} images; "
            f"choose at most {train_images}"
        )


class BatchKey(NamedTuple):
    """One rank's part of one micro-batch: rows [lo, hi) of the global batch `step` of `epoch`, and which images."""

    epoch: int
    step: int
    lo: int
    hi: int
    rows: NDArray[np.int64]


class ShardSampler(Sampler[BatchKey]):
    """The order of an epoch, cut into global batches, micro-batches and this rank's contiguous share of each.

    Set `epoch` (and `start`, a step to begin at) before iterating. Images that do not fill the last batch are left
    out of that epoch. With `repeats`, a batch is that many times the same images one after the other
    (https://arxiv.org/abs/1901.09335), and an epoch has as many steps as without.
    """

    def __init__(
        self, size: int, batch_size: int, accumulate: int, rank: int, world_size: int, seed: int, repeats: int = 1
    ) -> None:
        self.size, self.batch_size, self.accumulate = size, batch_size, accumulate
        self.rank, self.world_size, self.seed, self.repeats = rank, world_size, seed, repeats
        self.epoch = self.start = 0

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        return self.size // self.batch_size

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[BatchKey]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        micro = self.batch_size // self.accumulate
        share = micro // self.world_size
        different = self.batch_size // self.repeats
        for step in range(self.start, self.steps):
            batch = np.tile(order[step * different : (step + 1) * different], self.repeats)
            for part in range(self.accumulate):
                lo = part * micro + self.rank * share
                yield BatchKey(self.epoch, step, lo, lo + share, batch[lo : lo + share])


class TrainBatches(Dataset[tuple[Tensor, Tensor]]):
    """BatchKey -> (images (n, 3, side, side) float32 augmented and normalised, labels (n,) int64)."""

    def __init__(self, data: ImageData, config: DataConfig, seed: int) -> None:
        self.data, self.batch_size = data, config.batch_size
        self.augment = BatchAugment(config, data.side, data.mean, seed)

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, Tensor]:
        train = self.data.train
        rows = train.index[key.rows]
        labels = torch.from_numpy(train.labels[rows])
        if not self.augment.active:
            return self.data.normalise(torch.from_numpy(np.asarray(train.images[rows]))), labels
        draws = self.augment.draw(key.epoch, key.step, self.batch_size).part(key.lo, key.hi)
        if self.augment.moves and self.augment.resized and isinstance(train.images, ImageFiles):
            images = train.images.crops(rows, draws.boxes)
            whole = np.array([0, 0, self.data.side, self.data.side])  # what is left to do is to mirror
            draws = replace(draws, boxes=np.column_stack([np.tile(whole, (len(rows), 1)), draws.boxes[:, 4]]))
        else:
            images = np.asarray(train.images[rows])
        augmented = self.augment.transform(torch.from_numpy(images).permute(0, 3, 1, 2), draws)
        normalised = self.data.normalise(augmented.permute(0, 2, 3, 1))
        return self.augment.erase(normalised, torch.from_numpy(draws.erased)), labels


@dataclass
class TrainLoader:
    """A loader of one rank's shards; `epoch(e, start)` iterates one epoch from step `start` on."""

    loader: DataLoader[Any]
    sampler: ShardSampler

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.epoch, self.sampler.start = epoch, start
        return iter(self.loader)


def make_train_loader(
    data: ImageData, config: DataConfig, seed: int, accumulate: int, rank: int, world_size: int, cpus: int, pin: bool
) -> TrainLoader:
    """`cpus` are those of this rank; `pin` the batches' memory for transfer to a GPU.

    Raises:
        DataError: the training set is smaller than one batch.
    """
    check_batch_size(len(data.train), config)
    sampler = ShardSampler(len(data.train), config.batch_size, accumulate, rank, world_size, seed, config.repeats)
    batches = TrainBatches(data, config, seed)
    workers = config.loader_workers
    if workers is None:
        idle = not batches.augment.active and not isinstance(data.train.images, ImageFiles)
        workers = 0 if idle else max(0, min(16, cpus - 1))
    loader: DataLoader[Any] = DataLoader(
        batches,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=config.prefetch_factor if workers > 0 else None,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_trainer,
        generator=torch.Generator().manual_seed(seed),  # its own, so that making an iterator leaves the global one
    )
    return TrainLoader(loader, sampler)


def _leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C reaches a terminal's whole process group; a loader process that ended at once would take the trainer's
    orderly stop with it. Loader processes end with their trainer."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def eval_batches(
    data: ImageData, split: ImageSet, batch_size: int, rank: int, world_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's every world_size-th image of a split, normalised, on the device: nothing padded, nothing twice."""
    mine = split.index[rank::world_size]
    parts = [mine[at : at + batch_size] for at in range(0, len(mine), batch_size)]
    for rows, pixels in zip(parts, _ahead(split, parts), strict=True):
        images = torch.from_numpy(np.ascontiguousarray(pixels)).to(device, non_blocking=True)
        yield data.normalise(images), torch.from_numpy(split.labels[rows]).to(device, non_blocking=True)


def _ahead(split: ImageSet, parts: list[NDArray[np.int64]]) -> Iterator[NDArray[np.uint8]]:
    """The images of each part; files are decoded while the part before is worked on."""
    if not isinstance(split.images, ImageFiles):
        yield from (split.images[rows] for rows in parts)
        return
    with ThreadPoolExecutor(1) as pool:
        coming: list[Future[NDArray[np.uint8]]] = []
        for rows in parts:
            coming.append(pool.submit(split.images.__getitem__, rows))
            if len(coming) == 2:
                yield coming.pop(0).result()
        yield from (part.result() for part in coming)
