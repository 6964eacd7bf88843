"""Refill: from a mask of single weights to whole units (Coarsening the Granularity, ICML 2022,
https://arxiv.org/abs/2202.04736), and the global magnitude pruning that gives it its masks.

A layer is here a coupled matrix: row i holds all the projection weights of unit i, a channel of the mixer (its rows of
in_proj, its column of out_proj) or a neuron of the MLP (its row of fc1, its column of fc2). C rows, fan-in F.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mamba.config.choices import Registry
from mamba.errors import ConfigError
from mamba.models.block import MambaBlock
from pruning.components import GROUPS, Part, each, find_all, named_blocks, parts_of
from pruning.importance import SCORES, Batches, element_scores
from pruning.masks import Masks, gone_units, unit_masks
from pruning.penalty import groups_of
from pruning.record import Record, highest_gone, unit_rows, weight_rows
from pruning.select import lowest

MATRICES: dict[str, tuple[Part, ...]] = {
    "d_inner": each(("in_proj.weight", 0, "x{}"), ("in_proj.weight", 0, "z{}"), ("out_proj.weight", 1, "y{}")),
    "mlp_hidden": (Part("fc1.weight", 0), Part("fc2.weight", 1)),
}
"""The weights that are pruned one by one and that make up a unit's row, by group."""


@dataclass(frozen=True)
class RefillScore:
    """By what the units that stay are chosen."""

    elements: str
    """A key of `pruning.importance.SCORES`: what a weight is worth."""
    of_unit: Callable[[Tensor, Tensor], Tensor] = lambda values, remain: values.sum(1)
    """Both (units, fan-in): the weights' values, and 1 where a weight survives -> (units,)."""

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration batches."""
        return SCORES[self.elements].calibrated


REFILL_SCORES = Registry(
    "prune.score",
    {
        "remain": RefillScore("l1", lambda values, remain: remain.sum(1)),
        "magnitude": RefillScore("l1", lambda values, remain: (values * remain).sum(1)),
        "l1": RefillScore("l1"),
        "l2": RefillScore("l2"),
        "saliency": RefillScore("taylor"),
        "random": RefillScore("random"),
    },
)


def weights_of(model: nn.Module, target: str) -> dict[str, nn.Parameter]:
    """Full name -> parameter, of all that is pruned weight by weight for a target; of `both`, what the model has.

    Raises:
        ConfigError: an unknown target, or one of which the model has nothing.
    """
    parts = [part for group in groups_of(target) for part in MATRICES[group]]
    weights = {
        prefix + part.tensor: cast(nn.Parameter, tensor)
        for prefix, block in named_blocks(model)
        for part, tensor, _ in find_all(block, parts)
    }
    if not weights:
        raise ConfigError(f"target '{target}' is nothing that this model has; valid: ssm")
    return weights


def targets_of(model: nn.Module, target: str) -> list[str]:
    """`ssm` and `mlp`, as far as a target means them and the model has them."""
    blocks = [block for _, block in named_blocks(model)]
    groups = {"ssm": "d_inner", "mlp": "mlp_hidden"}
    wanted = {name: group for name, group in groups.items() if group in groups_of(target)}
    return [n for n, g in wanted.items() if any(find_all(block, MATRICES[g]) for block in blocks)]


@torch.no_grad()
def prune_survivors(model: nn.Module, masks: Mapping[str, Tensor], target: str, keep: float) -> Masks:
    """Global magnitude pruning of a target's weights down to a share of all of them.

    Args:
        model: its weights are ranked by magnitude.
        masks: what survives so far; {} at first. A weight that is gone never comes back.
        target: ssm, mlp or both.
        keep: share of all the target's weights that survives: exactly round(keep n) of n.

    Returns:
        masks of the target's weights.

    Raises:
        ConfigError: more is to be kept than survives.
    """
    weights = weights_of(model, target)
    alive = torch.cat([masks[n].flatten().cpu() if n in masks else torch.ones(p.numel()) for n, p in weights.items()])
    alive = alive.bool()
    scores = torch.cat([p.detach().abs().flatten().float().cpu() for p in weights.values()])
    scores[~alive] = -1.0  # below any magnitude: gone first
    cut = len(scores) - round(keep * len(scores))
    if cut < int((~alive).sum()):
        raise ConfigError(f"keep {keep:g} is more than what survives ({float(alive.float().mean()):g})")
    left = ~lowest(scores, cut)
    parts = left.split([p.numel() for p in weights.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(weights.items(), parts, strict=True)}


def record_of_round(
    model: nn.Module,
    dense: nn.Module,
    before: Mapping[str, Tensor],
    survivors: Mapping[str, Tensor],
    units: Mapping[str, Tensor],
    target: str,
    apart: bool = False,
) -> Record:
    """What a round has cut since the dense model: the weights that survive global pruning, and the units that stay.

    Args:
        model: the trained model that was pruned, in the dense model's shape: its magnitudes give the thresholds.
        dense: the dense model.
        before: survivors of the round before; empty at first.
        survivors: survivors of this round.
        units: its unit masks; empty where weights go one by one.
        target: ssm, mlp or both.
        apart: channels' and neurons' weights were ranked apart, so that each has a threshold of its own.
    """
    rows, thresholds, parts = [], {}, targets_of(dense, target)
    for part in parts:
        (group,) = groups_of(part)
        rows += weight_rows(dense, f"{part}:element", MATRICES[group], survivors, {})
        if units:
            rows += unit_rows(dense, f"{part}:{GROUPS[group].unit}", group, units, {})
        weights = weights_of(model, part if apart else target)
        stay = [survivors[name] for name in weights]
        there = [before.get(name, torch.ones_like(keep)) for name, keep in zip(weights, stay, strict=True)]
        highest = highest_gone([p.detach().abs() for p in weights.values()], stay, there)
        if highest is not None:
            thresholds[f"{part}:element"] = highest
    return Record(tuple(rows), thresholds)


def units_to_keep(remaining: int, units: int, fan_in: int, fillback_rate: float) -> int:
    """n = floor(sum(m) / F + (C - sum(m) / F) fillback_rate), at least 1: the paper's rule."""
    full = remaining / fan_in
    return min(units, max(1, math.floor(full + (units - full) * fillback_rate + 1e-9)))


@torch.no_grad()
def refill_masks(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    target: str = "both",
    fillback_rate: float = 0.0,
    score: str = "remain",
    calibration: Batches | None = None,
    seed: int = 0,
    among: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Masks of whole units from masks of single weights: in each layer the best n units stay, as a whole.

    Args:
        model: the trained model whose weights score the units; not changed.
        masks: masks of single weights (`prune_survivors`); a weight without a mask remains.
        target: ssm (channels), mlp (neurons) or both.
        fillback_rate: 0 keeps as many weights as remain; 1 keeps every unit. See `units_to_keep`.
        score: `remain` (weights left in the unit), `magnitude` (their summed size), `l1` and `l2` (of all of the unit's
            weights, gone or not), `saliency` (|w dL/dw| summed; needs calibration), `random`.
        calibration: batches of (images, labels) for `saliency`.
        seed: of `random`.
        among: unit masks of an earlier round: a unit that they take does not come back.

    Returns:
        masks over all parameters of the groups, for `shrink`, `MaskHook` or `GrowingDecay`.

    Raises:
        ConfigError: an unknown target or score, a rate outside of [0, 1], no calibration for `saliency`.
    """
    if score not in REFILL_SCORES:
        raise ConfigError(f"unknown refill score '{score}'; valid: {', '.join(REFILL_SCORES)}")
    if not 0 <= fillback_rate <= 1:
        raise ConfigError(f"fillback_rate must be in [0, 1], got {fillback_rate:g}")
    groups = groups_of(target)
    elements = element_scores(model, REFILL_SCORES[score].elements, calibration, seed)
    result: Masks = {}
    for group in groups:
        keep: list[Tensor | None] = []
        for prefix, block in named_blocks(model):
            if not find_all(block, MATRICES[group]):
                keep.append(None)
                continue
            remain = coupled_matrix(block, group, prefix, masks, missing=1.0)
            values = coupled_matrix(block, group, prefix, elements, missing=0.0)
            units, fan_in = remain.shape
            n = units_to_keep(int(remain.sum()), units, fan_in, fillback_rate)
            unit = REFILL_SCORES[score].of_unit(values, remain)
            if unit.shape != (units,) or not bool(unit.isfinite().all()):
                raise ConfigError(
                    f"refill score '{score}': of {units} units it gives {tuple(unit.shape)} values, "
                    f"{int((~unit.isfinite()).sum())} of them NaN or infinite; valid: one finite number a unit"
                )
            if among:
                gone = gone_units(among, prefix, parts_of(block, GROUPS[group]))
                unit[gone] = -torch.inf
            keep.append(~lowest(unit, len(unit) - n))
        result |= unit_masks(model, group, keep)
    return result


def coupled_matrix(block: MambaBlock, group: str, prefix: str, values: Mapping[str, Tensor], missing: float) -> Tensor:
    """(units, fan-in) of a group's projection weights in a block, as float64, of values given by full name."""
    rows = []
    for part, tensor, span in find_all(block, MATRICES[group]):
        own = values.get(prefix + part.tensor, torch.full(tensor.shape, missing)).double().cpu()
        rows.append(own.movedim(part.axis, 0)[span].flatten(1))
    return torch.cat(rows, 1)
