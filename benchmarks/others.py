"""Other models than ours, from torchvision's classes: what the side-by-side tables and the accuracies compare with.

DeiT-S and ViT-S are one network (https://arxiv.org/abs/2012.12877: DeiT is a way to train it; its distilled form has a
second token, which is left out here): it is called vit_small and stands for both. They have no `Architecture`, so they
are no `model.name`: they cannot be cut, resumed or exported.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet, VisionTransformer, resnet50
from torchvision.models.resnet import Bottleneck

OTHERS = ("vit_small", "resnet50")


def vit_small(classes: int, side: int, fused: bool = True, toy: bool = False) -> VisionTransformer:
    """12 layers, width 384, 6 heads: DeiT-S and ViT-S. Patches of 16 pixels, of side / 8 below 128 (64 tokens at 32).

    fused: torch's scaled_dot_product_attention; else two matrix products with a softmax in between, which keeps
    (batch, heads, tokens, tokens) numbers a layer, as the first implementations did. toy: a tiny one.
    """
    patch = 16 if side >= 128 else side // 8
    depth, width = (2, 24) if toy else (12, 384)
    model = VisionTransformer(side, patch, depth, 6, width, 4 * width, num_classes=classes)
    for layer in model.encoder.layers:
        layer.self_attention = Attention(layer.self_attention, fused)
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # torchvision starts from 0
    return model


def resnet50_small(classes: int, side: int, toy: bool = False) -> nn.Module:
    """ResNet-50; below 64 pixels as usual for CIFAR: a 3x3 convolution of stride 1 first, and no pooling behind it.
    toy: one narrow block a stage."""
    if toy:
        model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=classes, width_per_group=8)
    else:
        model = resnet50(num_classes=classes)
    if side < 64:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    model.register_forward_pre_hook(channels_last)
    model.image_size = side  # as torchvision's transformers say it
    return model


def channels_last(model: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """The memory order that convolutions are fast in; weights stay as our fused update wants them."""
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


class Attention(nn.Module):
    """Self-attention with the parameters of torch's module, in its place. (batch, tokens, width) -> the same, None."""

    def __init__(self, module: nn.MultiheadAttention, fused: bool) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = module.in_proj_weight, module.in_proj_bias
        self.out_proj, self.heads, self.fused = module.out_proj, module.num_heads, fused

    def forward(self, x: Tensor, key: Tensor, value: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        batch, tokens, width = x.shape
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = projected.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1).to(v.dtype) @ v
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, width)), None


def has_mamba_ssm() -> bool:
    return importlib.util.find_spec("mamba_ssm") is not None


def other(name: str, classes: int, side: int, fused: bool = True, toy: bool = False) -> nn.Module:
    return vit_small(classes, side, fused, toy) if name == "vit_small" else resnet50_small(classes, side, toy)


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """As our optimizer has them without layer decay: matrices and convolutions decay, vectors, positions and class
    tokens do not."""
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in model.named_parameters():
        parts[p.ndim > 1 and name not in ("class_token", "encoder.pos_embedding")].append(p)
    return [
        {"params": params, "name": "model", "lr_scale": 1.0, "weight_decay": weight_decay if decayed else 0.0}
        for decayed, params in parts.items()
        if params
    ]
