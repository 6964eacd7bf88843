"""Which units or elements go: exactly the asked share, the least important first, and never all of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mamba.errors import ConfigError

SCOPES = ("global", "layerwise")


def check_scope(scope: str) -> None:
    if scope not in SCOPES:
        raise ConfigError(f"unknown scope '{scope}'; valid: {', '.join(SCOPES)}")


def lowest(scores: Tensor, count: int) -> Tensor:
    """A boolean tensor, true at the `count` lowest of a flat tensor of scores; among equals, at the first ones."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count).values
    chosen = scores < threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


def choose_elements(scores: Sequence[Tensor], rate: float, scope: str) -> list[Tensor]:
    """Keep-masks of tensors of element scores, of the same shapes.

    global: round(rate n) of all n elements together go; layerwise: of each tensor by itself. `round` is Python's.
    """
    check_scope(scope)
    if scope == "layerwise":
        return [~lowest(s.flatten(), round(rate * s.numel())).view(s.shape) for s in scores]
    flat = torch.cat([s.flatten() for s in scores])
    cut = lowest(flat, round(rate * len(flat)))
    return [~part.view(s.shape) for part, s in zip(cut.split([s.numel() for s in scores]), scores, strict=True)]


def choose_units(
    scores: Sequence[Tensor], rate: float, scope: str, floor: int = 1, multiple: int = 1, what: str = "units"
) -> list[Tensor]:
    """Keep-masks over the units of each layer.

    Args:
        scores: one flat tensor of unit scores a layer; lengths may differ, also be 0.
        rate: share that goes: exactly round(rate n) of all n units (global) or of each layer's (layerwise).
        floor: units that every layer keeps, its most important ones.
        multiple: what each layer's kept width is then rounded to, nearest and at least once; above 1 the share that
            goes is no longer exact.

    Raises:
        ConfigError: an unknown scope; a rate that leaves a layer less than the floor.
    """
    check_scope(scope)
    if floor < 1 or multiple < 1:
        raise ConfigError(f"floor and multiple must be at least 1, got floor {floor} and multiple {multiple}")
    if scope == "layerwise":
        keep = [_keep(s, round(rate * len(s)), floor, what) for s in scores]
    else:
        protected = [s.double().clone() for s in scores]
        for s in protected:  # the floor's units cannot be chosen
            s[_highest(s, floor)] = torch.inf
        flat = torch.cat(list(protected))
        count, free = round(rate * len(flat)), int((flat < torch.inf).sum())
        if count > free:
            raise ConfigError(
                f"rate {rate:g} takes {count} of {len(flat)} {what} and a floor of {floor} in each layer leaves {free} "
                "to take; lower the rate or the floor"
            )
        keep = [~part for part in lowest(flat, count).split([len(s) for s in scores])]
    if multiple > 1:
        keep = [_round_width(s, k, floor, multiple) for s, k in zip(scores, keep, strict=True)]
    return keep


def _keep(scores: Tensor, count: int, floor: int, what: str) -> Tensor:
    if count and len(scores) - count < floor:
        raise ConfigError(
            f"removing {count} of a layer's {len(scores)} {what} leaves less than the floor of {floor}; lower the rate "
            "or the floor"
        )
    return ~lowest(scores.double(), count)


def _highest(scores: Tensor, count: int) -> Tensor:
    return ~lowest(scores, len(scores) - min(count, len(scores)))


def _round_width(scores: Tensor, keep: Tensor, floor: int, multiple: int) -> Tensor:
    if not len(scores):
        return keep
    least = math.ceil(floor / multiple)
    width = min(len(scores), max(least, round(int(keep.sum()) / multiple)) * multiple)
    return _highest(scores.double(), width)
