"""Augmentation: the right distribution, targets that add up, partners that do not depend on sharding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mamba.data.augment import BatchMix, SampleTransform, tta_views


def normalise(images):
    return images.float().permute(0, 3, 1, 2) / 255


def test_basic_crops_with_padding_and_flips():
    """Each output is the padded image at one of 9 x 9 offsets, half of them mirrored, all offsets used."""
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, (32, 32, 3), dtype=np.uint8)
    n = 1500
    out = SampleTransform("basic", 0.0, 32)(np.repeat(image[None], n, 0), np.arange(n), normalise)
    out = (out * 255).round().byte().permute(0, 2, 3, 1).numpy()
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    crops = {}
    for y in range(9):
        for x in range(9):
            crop = padded[y : y + 32, x : x + 32]
            crops[crop.tobytes()] = (y, x, False)
            crops[crop[:, ::-1].tobytes()] = (y, x, True)
    found = [crops[o.tobytes()] for o in out]
    assert len({f[:2] for f in found}) == 81
    assert 0.45 < np.mean([f[2] for f in found]) < 0.55


def test_erasing_rate_and_value():
    out = SampleTransform("none", 0.25, 16)(np.full((800, 16, 16, 3), 255, np.uint8), np.arange(800), normalise)
    erased = (out == 0).flatten(1).any(1)
    assert 0.2 < float(erased.float().mean()) < 0.3
    share = (out[erased] == 0).float().mean((1, 2, 3))
    assert float(share.min()) > 0.0 and float(share.max()) < 0.36


@pytest.mark.parametrize("augment", ["randaugment", "autoaugment"])
def test_policies_change_images_and_follow_their_seeds(augment):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    transform = SampleTransform(augment, 0.0, 32)
    a, b = transform(images, np.arange(40), normalise), transform(images, np.arange(40), normalise)
    assert torch.equal(a, b)
    reordered = transform(images[::-1].copy(), np.arange(40)[::-1], normalise).flip(0)
    assert torch.equal(a, reordered)
    c = transform(images, np.arange(40) + 1000, normalise)
    assert (a != c).flatten(1).any(1).float().mean() > 0.9


def test_policies_are_the_documented_ones():
    randaugment = SampleTransform("randaugment", 0.0, 32).image.transforms[-1]
    assert (randaugment.num_ops, randaugment.magnitude) == (2, 9)
    autoaugment = SampleTransform("autoaugment", 0.0, 32).image.transforms[-1]
    assert autoaugment.policy.value == "cifar10"


def test_mixing_differs_by_seed_epoch_and_step():
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    targets = [BatchMix(0.8, 0.0, 1.0, 4, seed)(images, labels, epoch, step)[1] for seed, epoch, step in keys]
    assert len({t.numpy().tobytes() for t in targets}) == 4


def mixed(mixup, cutmix, prob=1.0, n=8, step=0):
    images = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 3, 16, 16).contiguous()
    labels = torch.arange(n)
    return BatchMix(mixup, cutmix, prob, n, seed=0)(images, labels, epoch=0, step=step)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("n", [8, 7])
def test_targets_are_the_true_mixture(mixup, cutmix, n):
    for step in range(20):
        images, targets = mixed(mixup, cutmix, n=n, step=step)
        torch.testing.assert_close(targets.sum(1), torch.ones(n))
        # image i is the constant i, so its mean is the mixture of the labels by area or by weight
        torch.testing.assert_close(images.mean((1, 2, 3)), targets @ torch.arange(n, dtype=torch.float32))
        partners = [(t > 0).nonzero().flatten().tolist() for t in targets]
        assert all(p in ([i], sorted([i, i ^ 1])) for i, p in enumerate(partners))


def test_part_of_the_batches_is_mixed_by_both_kinds():
    kinds = []
    for step in range(400):
        images, targets = mixed(0.8, 1.0, prob=0.5, step=step)
        if (targets.max(1).values == 1).all():
            kinds.append("none")
        else:
            kinds.append("cutmix" if len(images[1].unique()) == 2 else "mixup")
    share = {k: kinds.count(k) / 400 for k in ("none", "mixup", "cutmix")}
    assert 0.4 < share["none"] < 0.6 and share["mixup"] > 0.15 and share["cutmix"] > 0.15


def test_mixing_does_not_depend_on_sharding():
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    mix = BatchMix(0.8, 1.0, 1.0, 8, seed=3)
    for step in range(6):
        whole = mix(images, labels, 1, step)
        halves = [mix(images[i : i + 4], labels[i : i + 4], 1, step) for i in (0, 4)]
        assert torch.equal(whole[0], torch.cat([h[0] for h in halves]))
        assert torch.equal(whole[1], torch.cat([h[1] for h in halves]))


def test_views_are_distinct_flips_and_shifts():
    images = torch.randn(2, 3, 16, 16)
    views = tta_views(images, 10)
    assert len(views) == 10 and torch.equal(views[0], images) and torch.equal(views[1], images.flip(-1))
    assert torch.equal(views[2][..., 2:], images[..., :-2])  # shifted right by an eighth
    assert len({v.numpy().tobytes() for v in views}) == 10
    assert [len(tta_views(images, n)) for n in (1, 2, 5)] == [1, 2, 5]
