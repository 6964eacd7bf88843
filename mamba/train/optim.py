"""Optimizers with layer-wise learning rates: which parameter gets which rate, which is decayed, which is Muon's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from mamba.config.choices import Registry
from mamba.config.schema import OptimConfig
from mamba.errors import ConfigError
from mamba.models.model import MambaModel
from mamba.ops.update.muon import Muon

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


def matrix_parts(model: MambaModel) -> dict[Tensor, list[int]]:
    """What Muon takes: the weights of the blocks' linear maps, each with the rows of the matrices that it fuses (x and
    z of `in_proj`; B, C and delta of `x_proj`). Not A_log, convolutions, embeddings and heads."""
    parts: dict[Tensor, list[int]] = {}
    for block in model.stack:
        fused = block.segments()
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                widths = list(fused.get(f"{name}.weight", {}).values())
                rows = module.weight.shape[0]
                parts[module.weight] = widths if sum(widths) == rows and "out_proj" not in name else [rows]
    return parts


def parameter_groups(
    model: MambaModel, weight_decay: float, layer_decay: float, matrices: Collection[Tensor] = ()
) -> list[dict[str, object]]:
    """Every trainable parameter in exactly one group, by depth, by whether it is decayed and by whether it is Muon's.

    Layer-wise decay as in ELECTRA (https://arxiv.org/abs/2003.10555): with L blocks, `lr_scale` is layer_decay^L for
    embeddings, layer_decay^(L-1-i) for block i, and 1 for norm and head.
    """
    depth = len(model.stack)
    groups: dict[tuple[int, bool, bool], dict[str, object]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decayed, muon = layer_of(name, depth), is_decayed(name, parameter), parameter in matrices
        label = "embed" if layer == 0 else "head" if layer > depth else f"block_{layer - 1:02d}"
        group = groups.setdefault(
            (layer, decayed, muon),
            {
                "params": [],
                "name": label,
                "lr_scale": layer_decay ** max(0, depth - layer),
                "weight_decay": weight_decay if decayed else 0.0,
                **({"muon": muon} if matrices else {}),
            },
        )
        params = group["params"]
        assert isinstance(params, list)
        params.append(parameter)
    return [groups[key] for key in sorted(groups)]


def make_adamw(model: MambaModel, config: OptimConfig) -> torch.optim.AdamW:
    """Fused, so that a step can be skipped on the device itself (its `found_inf`), without asking the host."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def make_muon(model: MambaModel, config: OptimConfig) -> Muon:
    """Muon for the blocks' matrices, AdamW for the rest, at the same rates and decay."""
    parts = matrix_parts(model)
    groups = parameter_groups(model, config.weight_decay, config.layer_decay, set(parts))
    return Muon(groups, parts, config.lr, (config.beta1, config.beta2), config.muon_momentum)


OPTIMIZERS: Registry[Callable[[MambaModel, OptimConfig], torch.optim.Optimizer]] = Registry(
    "optim.optimizer", {"adamw": make_adamw, "muon": make_muon}
)
"""`optim.optimizer`. Those that ship are made of AdamW's groups and state, which pruning shrinks along."""


def make_optimizer(model: MambaModel, config: OptimConfig) -> torch.optim.Optimizer:
    """Raises ConfigError where one that was added does not train every parameter once, at the rates of `optim.*`."""
    optimizer = OPTIMIZERS[config.optimizer](model, config)
    if config.optimizer not in OPTIMIZERS.shipped:
        _check(optimizer, model, f"optim.optimizer '{config.optimizer}'")
    return optimizer


def _check(optimizer: object, model: MambaModel, where: str) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"{where} makes a {type(optimizer).__name__}; valid: a torch.optim.Optimizer")
    lacks = [key for key in ("name", "lr_scale") if any(key not in group for group in optimizer.param_groups)]
    if lacks:
        raise ConfigError(
            f"{where}: its groups lack {' and '.join(lacks)}, by which each gets its learning rate; make them with "
            "mamba.train.optim.parameter_groups"
        )
    taken = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and taken[id(parameter)] != 1:
            raise ConfigError(
                f"{where}: {name} is in {taken[id(parameter)]} of its groups; valid: each parameter in one, as "
                "mamba.train.optim.parameter_groups has them"
            )
