"""AdamW with layer-wise learning rates: which parameter gets which rate, and which is decayed."""

from __future__ import annotations

import torch
from torch import nn

from mamba.config.schema import OptimConfig
from mamba.models.model import MambaModel

EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token", "cls_token_head", "cls_token_tail")


def layer_of(name: str, depth: int) -> int:
    """Depth of a parameter: 0 for embeddings, i + 1 for block i, depth + 1 for the final norm and the head."""
    top, _, rest = name.partition(".")
    if top in EMBEDDINGS:
        return 0
    if top in ("blocks", "layers"):  # ours, and Vision Mamba's published name
        return int(rest.partition(".")[0]) + 1
    return depth + 1


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Weight matrices only: no biases, no norms and no D (vectors), no A_log, A_b_log, ..., no embeddings."""
    return parameter.ndim > 1 and name.split(".")[0] not in EMBEDDINGS and not name.endswith("_log")


def parameter_groups(model: MambaModel, weight_decay: float, layer_decay: float) -> list[dict[str, object]]:
    """Every trainable parameter in exactly one group, by depth and by whether it is decayed.

    Layer-wise decay as in ELECTRA (https://arxiv.org/abs/2003.10555): with L blocks, `lr_scale` is layer_decay^L for
    embeddings, layer_decay^(L-1-i) for block i, and 1 for norm and head.
    """
    depth = len(model.stack)
    groups: dict[tuple[int, bool], dict[str, object]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decayed = layer_of(name, depth), is_decayed(name, parameter)
        label = "embed" if layer == 0 else "head" if layer > depth else f"block_{layer - 1:02d}"
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [],
                "name": label,
                "lr_scale": layer_decay ** max(0, depth - layer),
                "weight_decay": weight_decay if decayed else 0.0,
            },
        )
        params = group["params"]
        assert isinstance(params, list)
        params.append(parameter)
    return [groups[key] for key in sorted(groups)]


def make_optimizer(model: MambaModel, config: OptimConfig) -> torch.optim.AdamW:
    """Fused, so that a step can be skipped on the device itself (its `found_inf`), without asking the host."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
