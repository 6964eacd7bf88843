"""The models that ours are compared with."""

from __future__ import annotations

import torch

from benchmarks import others
from benchmarks.side_by_side import facts, scanning


def test_both_ways_of_attention_are_torchvisions():
    """Outputs and gradients, from the same weights."""
    from torchvision.models import VisionTransformer  # a slow import, and every process reads this file

    torch.manual_seed(0)
    models = [others.vit_small(5, 16, fused, toy=True) for fused in (True, False)]
    plain = VisionTransformer(16, 2, 2, 6, 24, 96, num_classes=5)
    state = {name: torch.randn_like(t) * 0.2 for name, t in plain.state_dict().items()}
    images, found = torch.randn(2, 3, 16, 16), []
    for model in (plain, *models):
        model.load_state_dict(state)
        model.train()
        out = model(images)
        out.square().sum().backward()
        found.append((out, dict(model.named_parameters())))
    for out, parameters in found[1:]:
        torch.testing.assert_close(out, found[0][0])
        for name, p in parameters.items():
            torch.testing.assert_close(p.grad, found[0][1][name].grad, rtol=1e-3, atol=1e-4)


def test_sizes_are_the_published_ones():
    """DeiT-S: 22 M parameters, 4.6 G multiply-accumulates at 224; ResNet-50: 25.6 M and 4.1 G; 1.3 G at 32 pixels with
    10 classes, as usual for CIFAR."""
    vit = facts(lambda: others.vit_small(1000, 224))
    assert vit["params"] == 22_050_664 and vit["tokens"] == 197 and abs(vit["macs"] / 4.6e9 - 1) < 0.01
    resnet = facts(lambda: others.resnet50_small(1000, 224))
    assert resnet["params"] == 25_557_032 and abs(resnet["macs"] / 4.1e9 - 1) < 0.01
    small = facts(lambda: others.resnet50_small(10, 32))
    assert small["params"] == 23_520_842 and abs(small["macs"] / 1.3e9 - 1) < 0.01


def test_every_parameter_is_in_one_group():
    model = others.vit_small(5, 16, toy=True)
    decayed, kept = others.groups(model, 0.05)
    assert sum(len(g["params"]) for g in (decayed, kept)) == len(list(model.parameters()))
    assert decayed["weight_decay"] == 0.05 and kept["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"])
    assert any(p is model.encoder.pos_embedding for p in kept["params"])


def test_the_scan_comes_back():
    import mamba.models.ssm

    ours = mamba.models.ssm.selective_scan
    with scanning("loop"):
        assert mamba.models.ssm.selective_scan is not ours
    assert mamba.models.ssm.selective_scan is ours
