"""Training batches of images that lie on the GPU and are augmented there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mamba.config.schema import DataConfig
from mamba.data.augment import BatchAugment, Draws, to_device
from mamba.data.files import ImageFiles
from mamba.data.images import ImageData
from mamba.data.loader import BatchKey, ShardSampler, TrainLoader, check_batch_size, make_train_loader
from mamba.errors import DataError


class DeviceBatches:
    """As `TrainLoader`, for images that lie on the device and are augmented there, many steps' worth at a time.

    The number of launches for a chunk hardly depends on its size. On a GPU a chunk is made in a stream of its own while
    steps are taken on the one before.
    """

    def __init__(
        self, data: ImageData, config: DataConfig, seed: int, sampler: ShardSampler, device: torch.device
    ) -> None:
        self.sampler, self.device = sampler, device
        train = data.train
        images = torch.from_numpy(np.ascontiguousarray(train.images[train.index]))
        self.images = images.to(device).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(train.labels[train.index]).to(device)
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (data.mean, data.std))
        self.factor, self.offset = 1 / (255 * std), -mean / std
        self.augment = BatchAugment(config, self.images.shape[-1], data.mean, seed)
        self.batch_size = config.batch_size
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # which has made the images

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(images (n, 3, side, side) float32 augmented and normalised, labels (n,) int64), as the loader gives them."""
        self.sampler.epoch, self.sampler.start = epoch, start
        coming = self._chunks()
        chunk = next(coming, None)
        while chunk:
            following = None
            for i, batch in enumerate(self._batches(chunk)):
                yield batch
                if i == 0:  # not before: the first steps of an epoch need not wait for two chunks to be asked for
                    following = next(coming, None)
            chunk = following

    def _chunks(self) -> Iterator[Chunk]:
        keys: list[BatchKey] = []
        size = 0
        limit = max(1, CHUNK_BYTES // self.images[0].numel())
        for key in self.sampler:
            keys.append(key)
            size += len(key.rows)
            if size + len(key.rows) > limit:
                yield self._make(keys)
                keys, size = [], 0
        if keys:
            yield self._make(keys)

    def _make(self, keys: list[BatchKey]) -> Chunk:
        draws = Draws.join([self.augment.draw(k.epoch, k.step, self.batch_size).part(k.lo, k.hi) for k in keys])
        with torch.cuda.stream(self.stream):  # of None: as it is
            rows = to_device(torch.from_numpy(np.concatenate([k.rows for k in keys])), self.device)
            rectangles = to_device(torch.from_numpy(draws.erased), self.device)
            images, labels = self.augment.transform(self.images[rows], draws), self.labels[rows]
        made = self.stream.record_event() if self.stream else None
        return Chunk([len(k.rows) for k in keys], images, labels, rectangles, made)

    def _batches(self, chunk: Chunk) -> Iterator[tuple[Tensor, Tensor]]:
        if chunk.made:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(chunk.made)
            for tensor in (chunk.images, chunk.labels, chunk.rectangles):
                tensor.record_stream(here)  # or its memory would be given away while this stream still reads it
        parts = (t.split(chunk.sizes) for t in (chunk.images, chunk.labels, chunk.rectangles))
        for images, labels, rectangles in zip(*parts, strict=True):
            normalised = torch.addcmul(self.offset, images.float(), self.factor)
            yield self.augment.erase(normalised, rectangles), labels


class Chunk(NamedTuple):
    """Augmented images of several batches of these sizes, there once `made` has come by."""

    sizes: list[int]
    images: Tensor
    labels: Tensor
    rectangles: Tensor
    made: torch.cuda.Event | None


CHUNK_BYTES = 2**24
"""Pixels augmented at a time on a GPU: 5,461 CIFAR images. Two or three chunks are kept."""
GPU_SHARE = 0.125
"""Part of a GPU's memory that the training images may take before `data.device` auto leaves them on the host."""


def make_train_batches(
    data: ImageData,
    config: DataConfig,
    seed: int,
    accumulate: int,
    rank: int,
    world_size: int,
    cpus: int,
    device: torch.device,
) -> TrainLoader | DeviceBatches:
    """Training batches of one rank by the rule of `data.device`; `cpus` are those that its loader processes may use.

    Raises:
        DataError: the training set is smaller than one batch.
    """
    gpu = device.type == "cuda"
    on_device = config.device == "gpu"
    decoded = not isinstance(data.train.images, ImageFiles)
    if on_device and not decoded:
        raise DataError("data.device 'gpu' needs decoded images, and here they stay files; valid: cpu, auto")
    if config.device == "auto" and gpu and decoded:
        total = torch.cuda.get_device_properties(device).total_memory
        on_device = len(data.train) * data.side**2 * 3 <= GPU_SHARE * total
    if not on_device:
        return make_train_loader(data, config, seed, accumulate, rank, world_size, cpus, pin=gpu)
    check_batch_size(len(data.train), config)
    sampler = ShardSampler(len(data.train), config.batch_size, accumulate, rank, world_size, seed, config.repeats)
    return DeviceBatches(data, config, seed, sampler, device)
