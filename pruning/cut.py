"""The cuts a user calls for: by component and rate, as masks, as a masked copy, or as a smaller model.

Every function takes components as keys, `mlp` or with a granularity `mlp:neuron`, and leaves its model as it was. Rates
refer to the model as it is given: two components that cut the same group (linear_out:channel and linear_in:expand both
cut channels) rank its units alike, so the larger rate holds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mamba.errors import ConfigError
from mamba.models.model import MambaModel
from mamba.models.ssm import BlockShape
from pruning.components import (
    BLOCK,
    COMPONENTS,
    ELEMENT,
    GROUPS,
    STEM,
    blocks_of,
    check_rate,
    covered,
    named_blocks,
    parse_target,
    parts_of,
    stem_layers,
    units_of,
)
from pruning.importance import SCORES, Batches, element_scores, unit_scores
from pruning.masks import Masks, apply_mask_mamba, combine, gone_units, unit_masks
from pruning.record import highest_gone, record_of
from pruning.repair import repair
from pruning.replace import REPLACEMENTS, REWRITES
from pruning.select import check_scope, choose_elements, choose_units
from pruning.shrink import Shrunk, Slices, outside_blocks, rebuild
from pruning.shrink import shrink as remove_units


@dataclass(frozen=True)
class How:
    """The choices that all cuts share."""

    scope: str = "global"
    """`global`: a component's units in all blocks are ranked together; `layerwise`: the rate holds in each block."""
    score: str = "l1"
    """l1, l2, taylor, wanda or random (pruning/importance.py)."""
    calibration: Batches | None = None
    """Batches of (images, labels) for taylor, wanda and repair; a list, where several cuts read it."""
    floor: int = 1
    """Units that each layer keeps. Single weights and replacements have no floor."""
    multiple: int = 1
    """What kept widths are rounded to (taps and blocks are not); 8 suits a GPU's matrix units. Above 1 a rate is no
    longer exact."""
    layers: Sequence[int] | None = None
    """Blocks to cut; None: all."""
    seed: int = 0
    """Of score `random`."""
    repair: bool = False
    """Fit the last linear map of each branch again on the calibration images (pruning/repair.py)."""
    masks: Mapping[str, Tensor] | None = None
    """What is cut already and stays cut: its units go along where the model is shrunk."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> How:
        """Raises ConfigError where an option is none."""
        unknown = [name for name in given if name not in cls.__dataclass_fields__]
        if unknown:
            raise ConfigError(f"unknown option '{unknown[0]}'; valid: {', '.join(cls.__dataclass_fields__)}")
        return cls(**given)

    def check(self, model: nn.Module) -> None:
        """Raises ConfigError before anything is computed."""
        check_scope(self.scope)
        if self.floor < 1 or self.multiple < 1:
            raise ConfigError(
                f"floor and multiple must be at least 1, got floor {self.floor} and multiple {self.multiple}"
            )
        depth = len(blocks_of(model))
        if self.layers is not None and not len(self.layers):
            raise ConfigError(f"layers is empty: nothing to cut; valid: blocks from 0 to {depth - 1}, or None for all")
        for layer in self.layers or ():
            if not 0 <= layer < depth:
                raise ConfigError(f"there is no block {layer}; valid: 0 to {depth - 1}")
        if self.repair and self.calibration is None:
            raise ConfigError("repair needs calibration: batches of training images, whose activations it fits")
        if self.score not in SCORES:
            raise ConfigError(f"unknown score '{self.score}'; valid: {', '.join(SCORES)}")


def prune_mamba_unstructured(model: nn.Module, rates: Mapping[str, float], **how: Any) -> Masks:
    """Masks that zero single weights: of each component exactly round(rate n) of the n weights that it covers.

    Args:
        model: a Mamba model; it is not changed.
        rates: component -> rate in [0, 1), as {"mlp": 0.7, "linear_gate": 0.5}.
        **how: fields of `How`: scope, score, calibration, layers, seed.

    Returns:
        full parameter name -> boolean mask of its shape, for `apply_mask_mamba`, `MaskHook`, `save_masks`.

    Raises:
        ConfigError: an unknown or refused component, a rate outside of [0, 1), an unknown scope or score.

    Source: global magnitude pruning, Han et al. 2015 (https://arxiv.org/abs/1506.02626).
    """
    options = How.of(how)
    cuts = _parse(model, rates, options)
    for name, granularity, _ in cuts:
        if granularity != ELEMENT:
            raise ConfigError(f"'{name}:{granularity}' takes whole units; use prune_mamba_structured or prune_multiple")
    return _masks(model, cuts, options)


def prune_mamba_structured(model: MambaModel, rates: Mapping[str, float], **how: Any) -> MambaModel:
    """A smaller model without round(rate n) of each component's n units; what is coupled goes along.

    Args:
        model: a Mamba model; it is not changed.
        rates: component -> rate in [0, 1); `mlp` means `mlp:neuron`, and so on (COMPONENTS[...].structured).
        **how: fields of `How`.

    Returns:
        a new model, on the same device and in the same mode. Its logits are those of the masked model.

    Raises:
        ConfigError: as `prune_mamba_unstructured`; granularity `element`; a rate that leaves a layer less than `floor`.

    Source: coupled groups as in DepGraph (https://arxiv.org/abs/2301.12900), written for the Mamba block by hand.
    """
    for target in rates:
        parse_target(target, structured=True)
    return cut(model, rates, shrink=True, **how).model


def prune_component(
    model: MambaModel, component: str, rate: float, granularity: str | None = None, shrink: bool = False, **how: Any
) -> MambaModel:
    """A pruned copy of a model: one component at one rate.

    Args:
        model: a Mamba model; it is not changed.
        component: a key of COMPONENTS.
        rate: share of its units that goes, in [0, 1).
        granularity: one of the component's; None: `element` (of `block`: depth), and with `shrink` the structured one.
        shrink: remove the units instead of zeroing their weights; the logits are the same.
        **how: fields of `How`.

    Raises:
        ConfigError: as `prune_mamba_structured`.
    """
    if shrink and granularity == ELEMENT:
        raise ConfigError(
            f"'{component}:{ELEMENT}' leaves no whole unit to remove; valid with shrink: "
            f"{', '.join(g for g in COMPONENTS[parse_target(component)[0]].granularities if g != ELEMENT)}"
        )
    return prune_multiple(model, {f"{component}:{granularity}" if granularity else component: rate}, shrink, **how)


def prune_multiple(model: MambaModel, rates: Mapping[str, float], shrink: bool = False, **how: Any) -> MambaModel:
    """A pruned copy of a model: several components at once, scored before any of them is cut, in any order.

    Arguments and errors as `prune_component`; keys may name granularities: {"mlp:neuron": 0.7, "linear_gate": 0.5}.
    """
    return cut(model, rates, shrink, **how).model


def cut(model: MambaModel, rates: Mapping[str, float], shrink: bool = False, **how: Any) -> Shrunk:
    """What `prune_multiple` does, with the masks that hold it in training (`MaskHook`), of a smaller model the map of
    its tensors onto the larger one's, and the record of what was cut in each layer."""
    options = How.of(how)
    cuts = [c for c in _parse(model, rates, options, structured=shrink) if c[2] > 0]
    thresholds: dict[str, float] = {}
    masks = _masks(model, [c for c in cuts if c[1] not in REPLACEMENTS], options, thresholds)
    done = record_of(model, masks, [c[:2] for c in cuts], options.masks, options.layers, thresholds)
    if shrink:
        result = remove_units(model, masks)
    else:
        result = Shrunk(copy.deepcopy(model), masks, Slices({name: (name, {}) for name in model.state_dict()}))
        apply_mask_mamba(result.model, masks)
    replaced = [c for c in cuts if c[1] in REPLACEMENTS]
    for _, granularity, rate in replaced:
        result = _replace(result, granularity, rate, options.layers, shrink)
    if shrink:  # in the old shape a replacement leaves every weight
        names = [(name, granularity) for name, granularity, _ in replaced]
        done = done.with_replaced(model, masks, result.model, result.masks, names, options.layers)
    if options.repair:
        assert options.calibration is not None
        repair(model, result, list(options.calibration))
    return replace(result, record=done)


def check_cut(model: nn.Module, rates: Mapping[str, float], shrink: bool = False, **how: Any) -> None:
    """Refuse what `cut` could not do to a model, whatever its weights are: they may be on `torch.device("meta")`.

    Raises:
        ConfigError: as `cut`, but for what calibration images decide.
    """
    options = How.of(how)
    layers = None if options.layers is None else list(options.layers)
    for name, granularity, rate in _parse(model, rates, options, structured=shrink):
        if rate > 0 and granularity == ELEMENT:
            _places(model, name, layers)
        elif rate > 0 and granularity not in REPLACEMENTS:
            group = COMPONENTS[name].groups[granularity]
            if group == STEM:
                units = [parts[0][2].stop for parts in stem_layers(model)]
            else:
                units = [1 if group == BLOCK else units_of(b, GROUPS[group]) for b in blocks_of(model)]
            _unit_choice(model, group, rate, options, [torch.arange(n) for n in units], layers)


def _parse(
    model: nn.Module, rates: Mapping[str, float], how: How, structured: bool = False
) -> list[tuple[str, str, float]]:
    """(component, granularity, rate) of each key, all checked; raises ConfigError before anything is computed."""
    how.check(model)
    cuts = []
    for target, rate in rates.items():
        # with an explicit granularity `element` may stand beside structured ones: its zeros stay in the smaller model
        name, granularity = parse_target(target, structured=structured and not target.endswith(f":{ELEMENT}"))
        check_rate(target, rate)
        cuts.append((name, granularity, rate))
    for _, replacement, rate in cuts:
        rewritten = REWRITES.get(replacement, ())
        for other, granularity, _ in cuts if rewritten and rate > 0 else ():
            parts = COMPONENTS[other].covers if granularity == ELEMENT else ()
            if granularity == "width" or any(part.tensor in rewritten for part in parts):
                if granularity == "width" and replacement != "separable":
                    continue
                raise ConfigError(
                    f"'{other}:{granularity}' and '{replacement}' both change {rewritten[0].format('')}, and the "
                    "second rewrites it; cut one, then the other"
                )
    return cuts


def _masks(
    model: nn.Module, cuts: Sequence[tuple[str, str, float]], how: How, thresholds: dict[str, float] | None = None
) -> Masks:
    """The masks of some cuts and of what was cut before; where all layers were ranked together, the highest score that
    went is added to `thresholds`."""
    masks: Masks = combine(how.masks or {})
    cuts = [c for c in cuts if c[2] > 0]
    thresholds = {} if thresholds is None else thresholds
    if not cuts:
        return masks
    elements = element_scores(model, how.score, how.calibration, how.seed)
    chosen = None if how.layers is None else list(how.layers)
    for name, granularity, rate in cuts:
        if granularity == ELEMENT:
            places = _places(model, name, chosen)
            own = _element_masks(places, rate, how, elements)
            masks = combine(masks, own)
            scores, stays = [elements[n][rows] for n, _, rows in places], [own[n][rows] for n, _, rows in places]
        else:
            group = COMPONENTS[name].groups[granularity]
            unit_values = unit_scores(model, group, elements, how.score)
            keep = _unit_choice(model, group, rate, how, unit_values, chosen)
            masks = combine(masks, unit_masks(model, group, keep))
            if group in GROUPS and GROUPS[group].order == "first":  # a tap's score is its place
                continue
            units = zip(unit_values, keep, strict=True)
            scores, stays = map(list, zip(*((s, k) for s, k in units if k is not None), strict=True))
        exact = how.multiple == 1 or granularity == ELEMENT
        highest = highest_gone(scores, stays) if exact and (how.scope == "global" or name == BLOCK) else None
        if highest is not None:
            thresholds[f"{name}:{granularity}"] = highest
    return masks


def _places(model: nn.Module, name: str, layers: list[int] | None) -> list[tuple[str, Tensor, slice]]:
    """What a component covers in the blocks to be cut; raises ConfigError where that is nothing."""
    places = list(covered(model, name, layers))
    if not places:
        raise ConfigError(f"no block to be cut has a weight of component '{name}'")
    return places


def _element_masks(
    places: Sequence[tuple[str, Tensor, slice]], rate: float, how: How, elements: dict[str, Tensor]
) -> Masks:
    keeps = choose_elements([elements[full][rows] for full, _, rows in places], rate, how.scope)
    masks: Masks = {}
    for (full, parameter, rows), keep in zip(places, keeps, strict=True):
        mask = masks.setdefault(full, torch.ones_like(parameter, dtype=torch.bool))
        mask[rows] &= keep
    return masks


def _unit_choice(
    model: nn.Module, group: str, rate: float, how: How, scores: list[Tensor], layers: list[int] | None
) -> list[Tensor | None]:
    """Which units of a group stay, block by block, by their scores; None for a block that is left alone."""
    if group == STEM and layers is not None:
        raise ConfigError("layers are blocks, and the stem is none; cut it without")
    depth = len(scores)
    picked = [i for i in range(depth) if (layers is None or i in layers) and len(scores[i])]
    keep: list[Tensor | None] = [None] * depth
    if not picked and group == STEM:
        raise ConfigError("the model's stem has no inner channels: it is patches, or a single convolution")
    if not picked:
        raise ConfigError(f"no block to be cut has a {GROUPS[group].unit}; cut another granularity")
    if group == BLOCK:  # the blocks themselves are the units of one layer
        flat = torch.cat([scores[i] for i in picked])
        for i, stays in zip(picked, choose_units([flat], rate, "global", how.floor, 1, "blocks")[0], strict=True):
            keep[i] = stays[None]
        return keep
    unit = "stem channels" if group == STEM else f"{GROUPS[group].unit}s"
    ranked = [scores[i].cpu() for i in picked]
    multiple = 1 if group != STEM and GROUPS[group].order == "first" else how.multiple
    chosen = choose_units(ranked, rate, how.scope, how.floor, multiple, unit)
    if multiple > 1 and round(rate * sum(map(len, ranked))) and all(bool(keep.all()) for keep in chosen):
        raise ConfigError(f"rounding to multiple {multiple} keeps all {unit}: lower the multiple or raise the rate")
    for i, one in zip(picked, chosen, strict=True):
        keep[i] = one
    return keep


def _replace(before: Shrunk, granularity: str, rate: float, layers: Sequence[int] | None, new_shape: bool) -> Shrunk:
    """Rewrite blocks and rebuild the model around them. What masks take of a channel holds for new tensors too."""
    model = before.model
    shapes: list[BlockShape] = []
    whole = model.state_dict()
    state = {name: whole[name] for name in outside_blocks(model)}
    for i, (prefix, block) in enumerate(named_blocks(model)):
        if layers is not None and i not in layers:
            shape, tensors = block.shape, block.state_dict()
        else:
            shape, tensors = REPLACEMENTS[granularity](block, rate, new_shape)
        shapes.append(shape)
        state |= {prefix + name: tensor for name, tensor in tensors.items()}
    other = rebuild(model, shapes)
    other.load_state_dict(state)
    channels = GROUPS["d_inner"]
    keep = [~gone_units(before.masks, prefix, parts_of(block, channels)) for prefix, block in named_blocks(model)]
    old, new = model.state_dict(), other.state_dict()
    same = {name for name, tensor in new.items() if name in old and old[name].shape == tensor.shape}
    lost = [n for n in before.masks if n not in same and new_shape]
    if lost:
        raise ConfigError(f"'{granularity}' rewrites {lost[0]}, of which single weights are masked; replace it first")
    masks = combine({n: m for n, m in before.masks.items() if n in same}, unit_masks(other, "d_inner", list(keep)))
    apply_mask_mamba(other, masks)
    rewritten = {name for name in new if name.endswith(REWRITES[granularity])}
    entries = {n: place for n, place in before.slices.entries.items() if n in same - rewritten}
    return Shrunk(other, masks, Slices(entries))


def verify_selective_scan_compatibility(model: nn.Module) -> None:
    """Check that in every block all coupled tensors agree on their widths, as the scan demands.

    x, delta, z, A, D need the same d_inner, and A, B, C the same d_state, whatever was cut.

    Raises:
        ConfigError: the block, the tensor, its width, and that of the others.
    """
    for i, block in enumerate(blocks_of(model)):
        for name, group in GROUPS.items():
            expected = getattr(block.shape, name)
            for part, _, span in parts_of(block, group):
                if expected is not None and span.stop - span.start != expected:
                    where = f"{part.tensor}{f' ({part.segment})' if part.segment else ''}"
                    raise ConfigError(
                        f"block {i}: {where} has {span.stop - span.start} {group.unit}s and {name} is {expected}"
                    )
        for tensor, segments in block.segments().items():
            shape = tuple(dict(block.named_parameters())[tensor].shape)
            if sum(segments.values()) not in shape:
                raise ConfigError(f"block {i}: {tensor} is {shape} and its parts {segments} need another width")
