"""From masks to smaller tensors: units that the masks take whole leave the model, its optimizer and its average.

The smaller model computes what the masked one computed. Which slices of which tensor belong together is said by
`pruning.components.GROUPS` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mamba.errors import ConfigError
from mamba.models.block import MambaBlock
from mamba.models.model import MambaModel
from mamba.models.ssm import BlockShape
from mamba.ops.update import is_known
from mamba.ops.update.muon import Muon
from mamba.train.ema import ModelEma
from mamba.train.optim import matrix_parts
from pruning.components import (
    GROUPS,
    STEM_PREFIX,
    block_prefix,
    named_blocks,
    parts_of,
    stem_layers,
    tensors_of,
    units_of,
)
from pruning.masks import Masks, apply_mask_mamba, block_gone, check_masks, gone_units
from pruning.record import Record

Kept = dict[int, Tensor]
"""Axis -> the indices that stay along it."""


@dataclass(frozen=True)
class Slices:
    """Where each tensor of a smaller model lies in the larger one: its name there, and the indices along each axis."""

    entries: dict[str, tuple[str, Kept]]

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """The part that stays of the larger model's tensor that became `name`; a copy."""
        for axis, index in self.entries[name][1].items():
            tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor.clone()

    def put(self, name: str, tensor: Tensor, into: Tensor) -> None:
        """The inverse: write the smaller model's tensor to its place in the larger one's."""
        kept = self.entries[name][1]
        if not kept:
            into.copy_(tensor)
            return
        axes = [kept.get(a, torch.arange(n)).to(into.device) for a, n in enumerate(into.shape)]
        into[torch.meshgrid(*axes, indexing="ij")] = tensor.to(into)

    def take_all(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the larger model's tensors that stay, sliced and under their new names."""
        return {new: self.take(new, tensors[old]) for new, (old, _) in self.entries.items() if old in tensors}


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` returns."""

    model: MambaModel
    masks: Masks
    """What is left of the masks: single weights within the units that stay. Empty where all was taken whole."""
    slices: Slices
    record: Record | None = None
    """What was cut, layer by layer; None of `shrink` alone, which does not know what was asked for."""


def shrink(model: MambaModel, masks: Mapping[str, Tensor]) -> Shrunk:
    """Remove every unit that `masks` takes whole, and every block; the argument is left as it is.

    A layer keeps at least one unit of each group, and a model one block, zeroed. Of a convolution's taps only the
    earliest can go: a gap between taps stays as zeros.

    Raises:
        ConfigError: masks that do not fit the model.
    """
    check_masks(model, masks)
    blocks = named_blocks(model)
    gone_blocks = [prefix for prefix, block in blocks if block_gone(masks, prefix, block)][: len(blocks) - 1]
    state = model.state_dict()
    in_stem, channels = _kept_of_stem(masks, model)
    entries: dict[str, tuple[str, Kept]] = {n: (n, in_stem.get(n, {})) for n in outside_blocks(model)}
    shapes: list[BlockShape] = []
    for prefix, block in blocks:
        if prefix in gone_blocks:
            continue
        new_prefix = block_prefix(model, len(shapes))
        kept, shape = _kept(masks, prefix, block)
        mixer = block.token_mixer
        if shape.out_channels is not None and mixer.out_index is None:
            index, rows = f"{block.mixer_name}.out_index", kept[f"{block.mixer_name}.out_proj.weight"]
            state[prefix + index] = torch.arange(mixer.out_proj.weight.shape[0], device=model.head.weight.device)
            entries[new_prefix + index] = (prefix + index, {0: rows[0]})
        for name in tensors_of(block):
            if prefix + name in state:
                entries[new_prefix + name] = (prefix + name, kept.get(name, {}))
        shapes.append(shape)
    slices = Slices(entries)
    smaller = rebuild(model, shapes, channels)
    smaller.load_state_dict(slices.take_all(state))
    left = {name: keep for name, keep in slices.take_all(masks).items() if not keep.all()}
    apply_mask_mamba(smaller, left)
    return Shrunk(smaller, left, slices)


def outside_blocks(model: MambaModel) -> list[str]:
    """Names in the state dict of what no cut of blocks changes: stem, positions, class tokens, last norm, head."""
    return [name for name in model.state_dict() if not name.startswith(f"{model.stack_name}.")]


def rebuild(model: MambaModel, shapes: list[BlockShape], stem_channels: tuple[int, ...] | None = None) -> MambaModel:
    """A model of other block shapes, and of other inner widths of its stem if given, with new weights, on the same
    device, in the same mode; random state untouched."""
    own = model.architecture
    channels = own.stem_channels if stem_channels is None else stem_channels
    with torch.random.fork_rng(devices=[]):
        other = MambaModel(replace(own, blocks=tuple(shapes), stem_channels=channels))
    return other.to(model.head.weight.device, model.head.weight.dtype).train(model.training)


def shrink_ema(ema: ModelEma[MambaModel], shrunk: Shrunk) -> ModelEma[MambaModel]:
    """The average of the smaller model, where it stood.

    Raises:
        ConfigError: a replacement rewrote tensors, whose average nobody knows.
    """
    _check_heirs(shrunk)
    smaller = ModelEma(shrunk.model, ema.decay)
    smaller.model.load_state_dict(shrunk.slices.take_all(_with_indices(ema.model, shrunk)))
    apply_mask_mamba(smaller.model, shrunk.masks)
    smaller.updates.copy_(ema.updates)
    return smaller


def shrink_optimizer(optimizer: torch.optim.AdamW, model: MambaModel, shrunk: Shrunk) -> torch.optim.AdamW:
    """An optimizer of the smaller model with the larger one's groups, rates and moments.

    AdamW goes on as with masks. Muon's steps grow with the square root of a matrix's longer side, so they get smaller.

    Args:
        optimizer: of `model`.
        model: the larger model.
        shrunk: what `shrink` made of it.

    Raises:
        ConfigError: a replacement rewrote tensors, whose moments nobody knows; or an optimizer of another kind.
    """
    _check_heirs(shrunk)
    if not is_known(optimizer):
        raise ConfigError(f"an optimizer of {type(optimizer).__name__} cannot be made smaller; valid: AdamW, Muon")
    larger = dict(model.named_parameters())
    smaller = dict(shrunk.model.named_parameters())
    heir: dict[Tensor, tuple[str, nn.Parameter]] = {
        larger[old]: (new, smaller[new]) for new, (old, _) in shrunk.slices.entries.items() if old in larger
    }
    groups = []
    for group in optimizer.param_groups:
        left = [heir[p][1] for p in group["params"] if p in heir]
        if left:
            groups.append({**group, "params": left})
    result: torch.optim.AdamW
    if isinstance(optimizer, Muon):
        result = Muon(groups, matrix_parts(shrunk.model), momentum=optimizer.momentum)
    else:
        result = torch.optim.AdamW(groups, fused=optimizer.defaults["fused"])
    for parameter, values in optimizer.state.items():
        if parameter in heir:
            new, mine = heir[parameter]
            result.state[mine] = {
                key: shrunk.slices.take(new, value) if value.shape == parameter.shape else value.clone()
                for key, value in values.items()
            }
    return result


def _check_heirs(shrunk: Shrunk) -> None:
    new = [name for name in shrunk.model.state_dict() if name not in shrunk.slices.entries]
    if new:
        raise ConfigError(f"{new[0]} was rewritten by a replacement: there is no state of the larger model to slice")


def _kept(masks: Mapping[str, Tensor], prefix: str, block: MambaBlock) -> tuple[dict[str, Kept], BlockShape]:
    """Tensor of the block -> what stays along each axis, and the shape that results."""
    drop: dict[str, dict[int, Tensor]] = {}
    counts: dict[str, int] = {}
    for name, group in GROUPS.items():
        parts = parts_of(block, group)
        gone = gone_units(masks, prefix, parts)
        if group.order == "first":  # only a run from the first unit on
            gone = gone.cumprod(0).bool()
        if len(gone) and gone.all():
            gone[-1] = False
        if not gone.any():
            continue
        counts[name] = units_of(block, group) - int(gone.sum())
        for part, tensor, span in parts:
            along = drop.setdefault(part.tensor, {})
            mark = along.setdefault(part.axis, torch.zeros(tensor.shape[part.axis], dtype=torch.bool))
            mark[span] |= gone
    kept = {
        tensor: {axis: (~mark).nonzero().squeeze(1) for axis, mark in axes.items()} for tensor, axes in drop.items()
    }
    return kept, replace(block.shape, **counts)  # type: ignore[arg-type]


def _kept_of_stem(masks: Mapping[str, Tensor], model: MambaModel) -> tuple[dict[str, Kept], tuple[int, ...]]:
    """Tensor of the stem, by its full name -> what stays along each axis, and the inner widths that result."""
    kept: dict[str, Kept] = {}
    channels: list[int] = []
    for parts in stem_layers(model):
        gone = gone_units(masks, STEM_PREFIX, parts)
        if gone.all():
            gone[-1] = False
        channels.append(int((~gone).sum()))
        for part, _, _ in parts if gone.any() else []:
            kept.setdefault(STEM_PREFIX + part.tensor, {})[part.axis] = (~gone).nonzero().squeeze(1)
    return kept, tuple(channels)


def _with_indices(model: MambaModel, shrunk: Shrunk) -> dict[str, Tensor]:
    """A larger model's state, with the whole index where the smaller model has one and it has none."""
    state = model.state_dict()
    for old, _ in shrunk.slices.entries.values():
        if old not in state:
            state[old] = torch.arange(model.architecture.d_model, device=model.head.weight.device)
    return state
