"""Augmentation: crops, mirroring, rectangles and policies, on whatever device the images lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from mamba.config.schema import RunConfig
from mamba.data.augment import BatchAugment, Draws
from mamba.data.device_loader import make_train_batches
from mamba.errors import ConfigError

MEAN = (0.49, 0.48, 0.45)


def make_augment(side=32, seed=0, **values):
    config = RunConfig().with_values({f"data.{key}": value for key, value in values.items()}).data
    return BatchAugment(config, side, MEAN, seed)


def pictures(n, side=32):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_basic_crops_with_padding_and_flips():
    """Each output is the padded image at one of 9 x 9 offsets, half of them mirrored, all offsets used."""
    image = pictures(1).clamp_min(1)
    n = 1500
    augment = make_augment(augment="basic")
    out = augment.transform(image.expand(n, -1, -1, -1), augment.draw(0, 0, n))
    padded = torch.nn.functional.pad(image[0], (4, 4, 4, 4))
    crops = {}
    for y in range(9):
        for x in range(9):
            crop = padded[:, y : y + 32, x : x + 32]
            crops[crop.numpy().tobytes()] = (y, x, False)
            crops[crop.flip(-1).numpy().tobytes()] = (y, x, True)
    found = [crops[o.numpy().tobytes()] for o in out]
    assert len({f[:2] for f in found}) == 81
    assert 0.45 < np.mean([f[2] for f in found]) < 0.55


@pytest.mark.parametrize("scale", [0.8, 0.2])
def test_resized_boxes_are_torchvisions(scale):
    """Height, width and position, against RandomResizedCrop's own numbers; half are mirrored."""
    n, side = 4000, 32
    boxes = make_augment(augment="basic", crop="resized", crop_scale=scale).draw(0, 0, n).boxes
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(side, scale=(scale, 1.0))
    theirs = [crop.make_params([torch.zeros(3, side, side)]) for _ in range(n)]
    for ours, name in zip(boxes.T, ("top", "left", "height", "width"), strict=False):
        values = np.array([p[name] for p in theirs])
        assert abs(ours.mean() - values.mean()) < 5 * values.std() * (2 / n) ** 0.5, name
        assert abs(ours.std() - values.std()) < 0.1 * values.std(), name
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:4] <= side).all()
    assert 0.46 < boxes[:, 4].mean() < 0.54


def test_erased_rectangles_are_torchvisions():
    """Rate, mean height, width and area, and the spread of positions, against RandomErasing's own numbers."""
    n, side = 4000, 32
    y0, y1, x0, x1 = make_augment(augment="none", random_erasing=1.0).draw(0, 0, n).erased[:, 0].T
    torch.manual_seed(0)
    theirs = [v2.RandomErasing(p=1.0).make_params([torch.zeros(3, side, side)]) for _ in range(n)]
    for ours, name in ((y1 - y0, "h"), (x1 - x0, "w"), (y0, "i"), (x0, "j")):
        values = np.array([p[name] for p in theirs])
        assert abs(ours.mean() - values.mean()) < 5 * values.std() * (2 / n) ** 0.5, name
        assert abs(ours.std() - values.std()) < 0.1 * values.std(), name
    assert (y1 <= side).all() and (x1 <= side).all() and (y1 > y0).all()
    rates = make_augment(augment="none", random_erasing=0.25).draw(0, 0, n).erased[:, 0]
    assert 0.22 < (rates[:, 1] > 0).mean() < 0.28


def test_erasing_zeroes_the_rectangles_alone():
    augment = make_augment(side=16, augment="none", random_erasing=0.5)
    images = torch.ones(2, 3, 16, 16)
    rectangles = torch.tensor([[[2, 5, 1, 9], [10, 12, 0, 2]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    out = augment.erase(images, rectangles)
    assert out[0, :, 2:5, 1:9].abs().max() == 0 and out[0, :, 10:12, :2].abs().max() == 0
    assert out[0].sum() == 3 * (256 - 24 - 4) and torch.equal(out[1], images[1])


def test_cutout_is_a_square_anywhere():
    """Around every pixel, so it is whole in the middle and cut off at the edges."""
    edges = make_augment(augment="none", cutout=8).draw(0, 0, 20_000).erased[:, 1]
    height, width = edges[:, 1] - edges[:, 0], edges[:, 3] - edges[:, 2]
    assert height.max() == width.max() == 8 and height.min() == 4 and (edges >= 0).all() and (edges <= 32).all()
    assert len({tuple(e) for e in edges.tolist()}) == 32 * 32
    assert (make_augment(augment="basic").draw(0, 0, 8).erased == 0).all()


@pytest.mark.parametrize("name", ["randaugment", "autoaugment", "autoaugment_imagenet", "randaugment_inc"])
@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_images_do_not_depend_on_which_are_worked_on_together(name, crop):
    augment = make_augment(augment=name, crop=crop)
    images, draws = pictures(48), augment.draw(2, 1, 48)
    whole = augment.transform(images, draws)
    alone = [augment.transform(images[i : i + 1], draws.part(i, i + 1)) for i in range(48)]
    parts = Draws.join([draws.part(0, 7), draws.part(7, 48)])
    assert torch.equal(whole, torch.cat(alone)) and torch.equal(whole, augment.transform(images, parts))
    assert (whole != images).flatten(1).any(1).float().mean() > 0.9


def batches(data, monkeypatch, epoch=1, start=0, rank=0, world_size=1, accumulate=1, chunk=None, seed=0, **more):
    if chunk:
        monkeypatch.setattr("mamba.data.device_loader.CHUNK_BYTES", chunk)
    values = {"dataset": "digits", "batch_size": 16, "augment": "autoaugment", "random_erasing": 0.5, "device": "gpu"}
    values |= {"loader_workers": 0, **more}
    config = RunConfig().with_values({f"data.{k}": v for k, v in values.items()}).resolve().data
    device = torch.device("cpu")  # the device path runs on any device
    made = make_train_batches(data, config, seed, accumulate, rank, world_size, 1, device)
    return list(made.epoch(epoch, start))


@pytest.mark.parametrize("repeats", [1, 2])
def test_sharing_and_chunking_the_work_changes_nothing(small_data, monkeypatch, repeats):
    whole = batches(small_data, monkeypatch, repeats=repeats)
    small = batches(small_data, monkeypatch, chunk=16 * 192, repeats=repeats)
    ranks = [batches(small_data, monkeypatch, rank=r, world_size=2, chunk=2**20, repeats=repeats) for r in (0, 1)]
    micro = batches(small_data, monkeypatch, accumulate=2, repeats=repeats)
    rest = batches(small_data, monkeypatch, start=2, repeats=repeats)
    assert len(whole) == 4 and whole[0][0].shape == (16, 3, 8, 8)
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(images, small[step][0])
        assert torch.equal(images, torch.cat([ranks[r][step][0] for r in (0, 1)]))
        assert torch.equal(images, torch.cat([micro[2 * step + i][0] for i in (0, 1)]))
        assert torch.equal(labels, torch.cat([ranks[r][step][1] for r in (0, 1)]))
        assert step < 2 or torch.equal(images, rest[step - 2][0])


@pytest.mark.parametrize("augment", ["none", "basic", "autoaugment", "randaugment_inc"])
@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_the_same_images_wherever_they_are_augmented(small_data, monkeypatch, augment, crop):
    """Order, labels, augmentation and normalisation of loader processes and of the device."""
    ways = [batches(small_data, monkeypatch, device=d, augment=augment, crop=crop) for d in ("cpu", "gpu")]
    for (a, b), (c, d) in zip(*ways, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)
        assert torch.equal(b, d)


def test_repeated_images_are_augmented_in_different_ways(small_data, monkeypatch):
    """Each image twice in a batch, never beside itself (mixing pairs neighbours), as many steps as without."""
    plain = batches(small_data, monkeypatch, augment="none", random_erasing=0.0, repeats=2)
    assert len(plain) == 4
    for images, labels in plain:
        assert torch.equal(images[:8], images[8:]) and torch.equal(labels[:8], labels[8:])
        assert len(images[:8].unique(dim=0)) == 8
    for images, _ in batches(small_data, monkeypatch, repeats=2):
        assert (images[:8] != images[8:]).flatten(1).any(1).all()
    with pytest.raises(ConfigError, match="data.batch_size 16 is not divisible by data.repeats 3"):
        RunConfig().with_values({"data.batch_size": 16, "data.repeats": 3}).resolve()


def test_draws_differ_by_seed_epoch_and_step():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = [make_augment(augment="autoaugment", random_erasing=0.5, seed=s).draw(e, t, 64) for s, e, t in keys]
    assert len({d.boxes.tobytes() + d.codes.tobytes() + d.erased.tobytes() for d in draws}) == 4
