"""Mixing: targets that add up, partners that do not depend on sharding, shares of the batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mamba.config.schema import RunConfig
from mamba.data.mix import BatchMix


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


def test_all_batches_are_mixed_where_asked():
    mix = BatchMix(0.8, 1.0, 1.0, 8, seed=0)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    targets = [mix(images, labels, 0, step)[1] for step in range(50)]
    assert sum(bool((t.max(1).values < 1).any()) for t in targets) >= 48  # a cut that fell outside mixes nothing


def test_smoothing_a_mixture_is_timms():
    """Cross-entropy with mixed targets and label smoothing: each label's share is smoothed, as timm's Mixup does."""
    logits, labels = torch.randn(4, 10), torch.tensor([3, 5, 3, 0])
    keep = 0.7
    mixed_targets = keep * F.one_hot(labels, 10) + (1 - keep) * F.one_hot(labels.flip(0), 10)
    smooth = mixed_targets * 0.9 + 0.1 / 10
    want = -(smooth * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(F.cross_entropy(logits, mixed_targets, label_smoothing=0.1), want)


def test_an_end_phase_is_not_mixed():
    values = {"data.mixup": 0.8, "data.mix_prob": 1.0, "data.mix_off_epochs": 2, "optim.epochs": 5}
    mix = BatchMix.from_config(RunConfig().with_values(values), 4)
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    mixed_epochs = [bool((mix(images, labels, epoch, 0)[1].max(1).values < 1).any()) for epoch in range(5)]
    assert mixed_epochs == [True, True, True, False, False]
