"""Policies: torchvision's operations at its frequencies, and timm's RandAugment of increasing severity."""

from __future__ import annotations

import pickle
from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch

from mamba.config.schema import DataConfig
from mamba.data.policies import INCREASING, POLICIES, apply_slot, make_policy
from mamba.errors import ConfigError

TORCHVISION = ["autoaugment", "autoaugment_imagenet", "randaugment"]
MEAN = (0.49, 0.48, 0.45)


def pictures(n, side=32):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def recorded_operations(transform, n, monkeypatch):
    """The operations that torchvision's own transform applies to each of n images."""
    seen = []

    def record(self, image, name, magnitude, **_):
        seen[-1].append((name, magnitude))
        return image

    monkeypatch.setattr(type(transform), "_apply_image_or_video_transform", record)
    image = pictures(1)[0]
    torch.manual_seed(0)
    for _ in range(n):
        seen.append([])
        transform(image)
    return [tuple(s) for s in seen]


def test_the_config_names_every_policy():
    assert set(get_args(DataConfig.model_fields["augment"].annotation)) == {"none", "basic", *POLICIES}


@pytest.mark.parametrize("name", TORCHVISION)
def test_frequencies_are_torchvisions(name, monkeypatch):
    """Each operation with its signed magnitude comes as often, in the same order, as in torchvision."""
    n = 6000
    policy = make_policy(name, 32, MEAN)
    codes, _ = policy.draw(np.random.default_rng(0), 20 * n)
    ours = Counter(tuple(policy.operations[c] for c in row if c or name == "randaugment") for row in codes)
    theirs = Counter(recorded_operations(policy.transform, n, monkeypatch))
    for sequence in set(ours) | set(theirs):
        expected = ours[sequence] / 20
        assert abs(theirs[sequence] - expected) < 5 * (expected + 2) ** 0.5, sequence
    assert len(ours) > 50


def test_torchvisions_policies_are_the_documented_ones():
    transforms = {name: make_policy(name, 32, MEAN).transform for name in TORCHVISION}
    assert (transforms["randaugment"].num_ops, transforms["randaugment"].magnitude) == (2, 9)
    assert [transforms[n].policy.value for n in TORCHVISION[:2]] == ["cifar10", "imagenet"]


@pytest.mark.parametrize("name", POLICIES)
def test_every_operation_on_a_run_equals_it_alone(name):
    """A batch in which each operation occurs several times, against the operation image by image."""
    policy = make_policy(name, 32, MEAN)
    kinds = len(INCREASING) + 1 if name == "randaugment_inc" else len(policy.operations)
    codes = np.repeat(np.arange(kinds), 3)
    arguments = np.zeros(len(codes), np.float32)
    if name == "randaugment_inc":
        drawn, values = policy.draw(np.random.default_rng(0), 4000)
        arguments = np.array([values[drawn == c][i] for c in range(kinds) for i in range(3)], np.float32)
    images = pictures(len(codes))
    images[::3] //= 4  # dark ones, so that contrast and equalisation have something to do
    given = torch.from_numpy(arguments)
    out = apply_slot(policy, images.clone(), codes, given)
    for i, code in enumerate(codes.tolist()):
        want = policy.apply(images[i : i + 1], code, given[i : i + 1]) if code else images[i : i + 1]
        assert torch.equal(out[i : i + 1], want), code


def test_increasing_randaugment_is_timms():
    """Its 15 operations, each drawn with replacement and left out half of the time, at a level around 9."""
    n, side = 200_000, 32
    codes, arguments = make_policy("randaugment_inc", side, MEAN).draw(np.random.default_rng(0), n)
    share = np.bincount(codes.ravel(), minlength=16) / codes.size
    assert len(INCREASING) == 15 and abs(share[0] - 0.5) < 0.005 and np.abs(share[1:] - 0.5 / 15).max() < 0.002
    assert abs((codes == 0).all(1).mean() - 0.25) < 0.005 and (codes[:, 0] == codes[:, 1]).any()
    of = {name: arguments[codes == i + 1] for i, name in enumerate(INCREASING)}
    for name, centre in {"Rotate": 27.0, "ShearX": 0.27, "TranslateY": 0.45 * side * 0.9}.items():
        assert abs(np.abs(of[name]).mean() / centre - 1) < 0.01 and abs((of[name] < 0).mean() - 0.5) < 0.02, name
        assert abs(np.abs(of[name]).std() / centre - 0.5 / 9) < 0.01, name
        assert np.abs(of[name]).max() <= centre / 0.9 + 1e-4, name
    assert set(np.unique(of["Posterize"])) == {0.0, 1.0, 2.0}  # level 7.5 to 10: 1 bit; exactly 10: none
    assert abs(np.median(of["Solarize"]) - 26) <= 1 and abs(np.median(of["SolarizeAdd"]) - 99) <= 1
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        low, high = of[name][of[name] < 1], of[name][of[name] > 1]
        assert abs(low.mean() - 0.19) < 0.01 and abs(high.mean() - 1.81) < 0.01 and low.min() >= 0.1 - 1e-6


def test_level_follows_magnitude():
    policy = make_policy("randaugment_inc", 32, MEAN, magnitude=3.0, deviation=0.0)
    codes, arguments = policy.draw(np.random.default_rng(0), 5000)
    rotate = list(INCREASING).index("Rotate") + 1
    assert np.allclose(np.abs(arguments[codes == rotate]), 9.0)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_can_be_sent_to_loader_processes(name):
    policy = pickle.loads(pickle.dumps(make_policy(name, 32, MEAN)))
    assert policy.draw(np.random.default_rng(0), 4)[0].shape == (4, 2)


@pytest.mark.parametrize(
    ("apply", "told"),
    [
        (lambda images: images[:1], r"makes \(1, 3, 32, 32\) torch.uint8 of images \(4, 3, 32, 32\) torch.uint8"),
        (lambda images: images / 255, r"makes \(4, 3, 32, 32\) torch.float32 of images"),
        (lambda images: None, "makes a NoneType"),
    ],
)
def test_a_policy_gives_as_many_images_of_the_same_kind(apply, told):
    """One image was laid over all of its run, whatever their classes; fractions became black."""

    class Mine:
        def apply(self, images, code, arguments):
            return apply(images)

    with pytest.raises(ConfigError, match=f"data.augment: Mine {told}"):
        apply_slot(Mine(), pictures(4), np.ones(4, np.int64), torch.zeros(4))
