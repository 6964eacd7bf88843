"""A smaller Mamba of chosen widths and depth, started from the most important parts of a larger one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from mamba.errors import ConfigError
from mamba.models.model import Architecture, MambaModel
from mamba.models.ssm import MIXERS, BlockShape
from pruning.components import BLOCK, GROUPS, blocks_of, named_blocks, units_of
from pruning.importance import Batches, element_scores, unit_scores
from pruning.masks import combine, unit_masks
from pruning.record import ALL, Record, Row
from pruning.select import lowest
from pruning.shrink import rebuild, shrink

WIDTHS = ("d_inner", "d_state", "d_conv", "mlp_hidden")
"""The groups whose widths a smaller model chooses."""


def build_mamba_lite(
    model: MambaModel,
    expand: float = 1.0,
    d_conv: int = 2,
    d_state: int = 8,
    mlp_ratio: float = 2.0,
    depth: int | None = None,
) -> MambaModel:
    """A new model with `model`'s input, width and head, and narrower blocks; its weights are new.

    Args:
        model: the larger model; of mamba_small the defaults leave about a fifth of the parameters.
        expand, d_conv, d_state, mlp_ratio, depth: as in `ModelConfig`; none may exceed the larger model's. Depth None:
            two thirds of the larger model's, 16 of 24.

    Raises:
        ConfigError: a value that is larger than the model's own, or that leaves nothing.
    """
    d_model, own = model.architecture.d_model, model.architecture.blocks[0]
    depth = max(1, round(2 * len(model.stack) / 3)) if depth is None else depth
    shape = BlockShape(
        int(expand * d_model),
        d_state,
        d_conv,
        int(mlp_ratio * d_model) if own.mlp_hidden else 0,
        dt_rank=own.dt_rank if own.learned_dt_bias else None,
        mixer=own.mixer,
        learned_dt_bias=own.learned_dt_bias,
    )
    _check_fits(model, shape, depth)
    directions = MIXERS[own.mixer].directions
    return rebuild(model, [replace(shape, direction=directions[i % len(directions)]) for i in range(depth)])


def transfer_pruned_weights(
    model: MambaModel, lite: MambaModel, score: str = "l1", calibration: Batches | None = None
) -> list[int]:
    """Give a smaller model the larger one's most important blocks, and in them its most important units, in place. Each
    block brings its direction along.

    Args:
        model: the trained model; not changed.
        lite: uniform blocks, none wider than the model's (`build_mamba_lite`).
        score, calibration: as in `element_scores`; a block's importance is the sum over its weights.

    Returns:
        the blocks that were taken, by their place in the larger model.

    Raises:
        ConfigError: the smaller model is larger somewhere, or of another width or head.
    """
    ours, theirs = model.architecture, lite.architecture
    if len({_plain(block) for block in theirs.blocks}) != 1 or replace(ours, blocks=(), drop_path=0.0) != replace(
        theirs, blocks=(), drop_path=0.0
    ):
        raise ConfigError("the smaller model must have uniform blocks and the larger one's input, d_model and classes")
    shape, depth = theirs.blocks[0], len(theirs.blocks)
    _check_fits(model, shape, depth)
    elements = element_scores(model, score, calibration)
    per_block = torch.cat([s.cpu() for s in unit_scores(model, BLOCK, elements, score)])
    taken = ~lowest(per_block, len(per_block) - depth)
    masks = unit_masks(model, BLOCK, [stays[None] for stays in taken])
    for group in WIDTHS:
        width = getattr(shape, group)
        if not width:  # no MLP, here as there
            continue
        scores = unit_scores(model, group, elements, score)
        keep: list[Tensor | None] = [~lowest(s.double().cpu(), len(s) - width) for s in scores]
        masks = combine(masks, unit_masks(model, group, keep))
    smaller = shrink(model, masks).model
    assert [_plain(b) for b in smaller.architecture.blocks] == [_plain(b) for b in theirs.blocks]
    for block, own in zip(lite.stack, smaller.stack, strict=True):
        block.token_mixer.direction = own.token_mixer.direction
    lite.transposition = smaller.transposition
    lite.load_state_dict(smaller.state_dict())
    return [i for i, stays in enumerate(taken.tolist()) if stays]


def record_of_lite(model: MambaModel, lite: MambaModel, taken: Sequence[int]) -> Record:
    """What a smaller model has of each block of the larger one: blocks, and in each the units of its groups.

    Args:
        model, lite, taken: as `transfer_pruned_weights` takes and gives them.
    """
    rows = [Row(ALL, f"{BLOCK}:depth", "block", len(model.stack), len(taken))]
    heirs = dict(zip(taken, lite.stack, strict=True))
    for group in WIDTHS:
        for i, (prefix, block) in enumerate(named_blocks(model)):
            before, kept = units_of(block, GROUPS[group]), units_of(heirs[i], GROUPS[group]) if i in heirs else 0
            if before:
                rows.append(Row(prefix.rstrip("."), group, GROUPS[group].unit, before, kept))
    return Record(tuple(rows))


def _plain(shape: BlockShape) -> BlockShape:
    """The widths, whatever the direction."""
    return replace(shape, direction="forward")


def _check_fits(model: nn.Module, shape: BlockShape, depth: int) -> None:
    blocks = blocks_of(model)
    if not 1 <= depth <= len(blocks):
        raise ConfigError(f"depth {depth} does not fit a model of {len(blocks)} blocks; valid: 1 to {len(blocks)}")
    for field in ("out_channels", "dt_rank", "shared_bc", "separable_conv"):
        if any(getattr(b.shape, field) != getattr(shape, field) for b in blocks):
            raise ConfigError(f"the model was cut already ({field}), which a plain smaller model cannot take over")
    for field in WIDTHS:
        width, most = getattr(shape, field), min(getattr(b.shape, field) for b in blocks)
        if not min(1, most) <= width <= most:
            raise ConfigError(f"{field} {width} does not fit the model; valid: {min(1, most)} to {most}")


def describe(architecture: Architecture) -> str:
    """One line: depth and the range of each width."""
    shapes = [asdict(b) for b in architecture.blocks]
    words = [f"{len(shapes)} blocks"]
    for field in WIDTHS:
        low, high = min(s[field] for s in shapes), max(s[field] for s in shapes)
        words.append(f"{field} {low}" if low == high else f"{field} {low} to {high}")
    return ", ".join(words)
