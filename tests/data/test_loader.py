"""Loaders: exact, seeded, independent of how the work is shared out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mamba.data.images import ImageSet
from mamba.data.loader import eval_batches, make_train_loader
from mamba.data.registry import load_data
from mamba.errors import DataError
from tests.data.helpers import config


def loader(data, rank=0, world_size=1, accumulate=1, seed=0, **values):
    spec = config(dataset="digits", batch_size=16, **values)
    return make_train_loader(data, spec, seed, accumulate, rank, world_size, cpus=1, pin=False)


def batches(data, epoch=0, start=0, **kwargs):
    return list(loader(data, **kwargs).epoch(epoch, start))


def test_an_epoch_sees_each_image_once_and_reshuffles(small_data):
    marked = np.arange(96, dtype=np.int64)  # labels that say which image it was
    data = small_data.__class__(
        ImageSet(small_data.train.images, marked, small_data.train.index), None, small_data.test, ("a",), (0,), (1,)
    )
    first, second = (torch.cat([labels for _, labels in batches(data, epoch=e)]).tolist() for e in (0, 1))
    assert len(set(first)) == len(first) == 64  # 72 images, 4 batches of 16, the rest is left out
    assert set(first) <= set(small_data.train.index.tolist())
    assert first != second
    again = torch.cat([labels for _, labels in batches(data, epoch=1)]).tolist()
    assert again == second


@pytest.mark.parametrize("augment", ["none", "basic", "randaugment", "autoaugment"])
def test_sharing_the_work_changes_nothing(small_data, augment):
    """The same images, augmented the same way: one worker, two workers, micro-batches, loader processes."""
    settings = {"augment": augment, "random_erasing": 0.5}
    whole = batches(small_data, epoch=1, **settings)
    ranks = [batches(small_data, epoch=1, rank=r, world_size=2, **settings) for r in (0, 1)]
    micro = batches(small_data, epoch=1, accumulate=2, **settings)
    processes = batches(small_data, epoch=1, loader_workers=2, **settings)
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(images, torch.cat([ranks[r][step][0] for r in (0, 1)]))
        assert torch.equal(images, torch.cat([micro[2 * step + i][0] for i in (0, 1)]))
        assert torch.equal(images, processes[step][0])
        assert torch.equal(labels, torch.cat([ranks[r][step][1] for r in (0, 1)]))


def test_loader_processes_work_so_far_ahead(small_data):
    """`data.prefetch_factor`, which changes no batch; without processes there is nothing to be ahead."""
    ahead = loader(small_data, loader_workers=2, prefetch_factor=1)
    assert ahead.loader.prefetch_factor == 1 and loader(small_data, loader_workers=1).loader.prefetch_factor == 4
    assert loader(small_data, loader_workers=0, prefetch_factor=3).loader.prefetch_factor is None
    for (images, _), (others, _) in zip(ahead.epoch(0, 0), batches(small_data), strict=True):
        assert torch.equal(images, others)


def test_augmentation_differs_by_seed_epoch_and_step(small_data):
    """The same 16 images over and over, so that only the random numbers can make a difference."""
    few = replace(small_data, train=replace(small_data.train, index=np.zeros(48, int)))
    settings = {"augment": "basic", "random_erasing": 0.5}
    first, second = (images for images, _ in batches(few, **settings)[:2])
    other_epoch = batches(few, epoch=1, **settings)[0][0]
    other_seed = batches(few, seed=1, **settings)[0][0]
    for other in (second, other_epoch, other_seed):
        assert not torch.equal(first, other)
    assert len({i.numpy().tobytes() for i in first}) > 8  # nor is it one draw for the whole batch


def test_an_epoch_can_begin_in_the_middle(small_data):
    settings = {"augment": "basic"}
    rest = batches(small_data, epoch=2, start=2, **settings)
    for (a, _), (b, _) in zip(batches(small_data, epoch=2, **settings)[2:], rest, strict=True):
        assert torch.equal(a, b)


def test_loading_leaves_the_global_random_state(small_data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    batches(small_data, augment="autoaugment", random_erasing=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_larger_than_the_training_set(small_data):
    spec = config(dataset="digits", batch_size=128)
    with pytest.raises(DataError, match="data.batch_size 128 is larger than the training set of 72 images"):
        make_train_loader(small_data, spec, 0, 1, 0, 1, cpus=1, pin=False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_sees_each_image_exactly_once(small_data, world_size):
    seen = [
        labels
        for rank in range(world_size)
        for _, labels in eval_batches(small_data, small_data.val, 7, rank, world_size, torch.device("cpu"))
    ]
    counts = torch.bincount(torch.cat(seen), minlength=3).tolist()
    assert counts == np.bincount(small_data.val.labels[small_data.val.index]).tolist()


def test_normalised_training_images(small_data):
    data = load_data(config(dataset="digits"), 0)
    images = data.normalise(torch.from_numpy(data.train.images))
    assert images.shape[1:] == (3, 8, 8)
    assert abs(float(images.mean())) < 1e-3 and abs(float(images.std()) - 1) < 1e-3
