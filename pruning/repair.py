"""Repair of what a cut broke, without training: the last linear map of each branch is fitted again.

A cut takes inputs away from `out_proj` and `fc2`. Least squares on calibration images lets the inputs that are left
stand in for those that went: with a cut branch's inputs X (tokens x inputs), the change of the residual stream that
would bring it to where the dense model's is after this branch, Y (tokens x outputs), and the weights that were left, W,

    W' = argmin |X W'^T - Y|^2 + ridge mean(diag X^T X) |W' - W|^2

Branch after branch, so that each one is fitted to what the repaired ones before it put into the stream; the last branch
in front of blocks that went stands in for them too. Weights that a mask zeroes stay zero.

Sources: Optimal Brain Surgeon (Hassibi & Stork 1993) for the idea; layer-wise least squares as in Optimal Brain
Compression (https://arxiv.org/abs/2208.11580) and SparseGPT (https://arxiv.org/abs/2301.00774).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mamba.models.block import MambaBlock
from mamba.models.model import MambaModel
from pruning.components import named_blocks
from pruning.importance import Batches
from pruning.shrink import Shrunk

RIDGE = 0.01
"""How strongly fitted weights are drawn to those that were left, in units of the inputs' mean square."""
ROWS_AT_ONCE = 16
"""Rows of a matrix that are fitted together where each has zeros of its own."""


class Branch(NamedTuple):
    """A branch of a block: `last` writes to the residual stream."""

    last: nn.Linear
    reader: nn.Module
    """Reads the stream in front of the branch: its norm."""
    follower: nn.Module
    """What shows the stream behind it: the next norm as its input, or the block itself as its output."""


@torch.no_grad()
def repair(model: MambaModel, cut: Shrunk, batches: Batches, ridge: float = RIDGE) -> None:
    """Fit every `out_proj` and `fc2` of a cut model again, in place.

    Args:
        model: the dense model that was cut; it is not changed.
        cut: what `pruning.cut.cut` made of it, masked or smaller, on the same device; its masks still hold afterwards.
        batches: normalised training images (n, channels, side, side) with labels, which are not looked at. A list: it
            is read once for each branch. Tokens should outnumber the inputs of a map many times.
        ridge: how strongly the new weights are drawn to the old ones; above 0.
    """
    own, device = cut.model, model.head.weight.device
    modes = model.training, own.training
    model.eval(), own.eval()
    images = [x.to(device) for x, _ in batches]
    heirs = {_block_of(new): _block_of(old) for new, (old, _) in cut.slices.entries.items()}
    dense = dict(named_blocks(model))
    ends = _ends(dense, set(heirs.values()))
    for prefix, block in named_blocks(own):
        original = _branches(dense[heirs[prefix]])
        original[-1] = original[-1]._replace(follower=ends[heirs[prefix]])
        for branch, there in zip(_branches(block), original, strict=False):
            index = block.token_mixer.out_index if branch.last is block.token_mixer.out_proj else None
            gram, moment = _accumulate(model, own, there, branch, index, images)
            name = f"{prefix}{_name_in(block, branch.last)}.weight"
            _fit(branch.last, gram, moment, cut.masks.get(name), ridge)
    model.train(modes[0]), own.train(modes[1])


def _block_of(name: str) -> str:
    """`blocks.3.` of `blocks.3.mlp.fc1.weight`."""
    return ".".join(name.split(".")[:2]) + "."


def _ends(dense: dict[str, MambaBlock], kept: set[str]) -> dict[str, MambaBlock]:
    """Of each block that stays, the last of the blocks behind it that went: it has to stand in for them too."""
    ends: dict[str, MambaBlock] = {}
    last = ""
    for prefix, block in dense.items():
        last = prefix if prefix in kept else last
        ends[last] = block
    return ends


def _name_in(block: MambaBlock, module: nn.Module) -> str:
    return next(name for name, own in block.named_modules() if own is module)


def _branches(block: MambaBlock) -> list[Branch]:
    first = getattr(block, block.norm_name)
    mixer = block.token_mixer.out_proj
    if block.mlp is None or block.norm2 is None:
        return [Branch(mixer, first, block)]
    return [Branch(mixer, first, block.norm2), Branch(block.mlp.fc2, block.norm2, block)]


class _Seen(Exception):
    """The forward pass has shown all that was wanted."""


def _accumulate(
    model: MambaModel, own: MambaModel, there: Branch, here: Branch, index: Tensor | None, images: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """X^T X and X^T Y over all images, in float64; a column of ones behind X where the map has a bias.

    X: the inputs of `here.last`; Y: the dense stream behind the branch less the cut model's in front of it, of the
    outputs `index`.
    """
    gram = moment = torch.zeros(())
    for x in images:
        seen = _look(model, x, {"after": there.follower})
        seen |= _look(own, x, {"before": here.reader, "inputs": here.last})
        wanted = (seen["after"] - seen["before"]).flatten(0, -2).double()
        given = seen["inputs"].flatten(0, -2).double()
        if here.last.bias is not None:
            given = torch.cat((given, given.new_ones(len(given), 1)), dim=1)
        gram = gram.to(given) + given.T @ given
        moment = moment.to(given) + given.T @ (wanted if index is None else wanted[:, index])
    return gram, moment


def _look(model: MambaModel, images: Tensor, wanted: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What modules read in a forward pass, or, of a whole block, what it returns. The pass ends when all was seen."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for key, module in wanted.items():

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None = None, key: str = key) -> None:
            seen[key] = inputs[0] if output is None else output
            if len(seen) == len(wanted):
                raise _Seen

        register = module.register_forward_hook if isinstance(module, MambaBlock) else module.register_forward_pre_hook
        hooks.append(register(keep))
    try:
        model(images)
    except _Seen:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _fit(layer: nn.Linear, gram: Tensor, moment: Tensor, keep: Tensor | None, ridge: float) -> None:
    """Write the ridge solution into a linear map; where `keep` is false its weights stay zero."""
    weights = layer.weight.double()
    if layer.bias is not None:
        weights = torch.cat((weights, layer.bias.double()[:, None]), dim=1)
    strength = ridge * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    right = moment.T + strength * weights  # (outputs, inputs)
    if keep is None or bool(keep.all()):
        fitted = torch.cholesky_solve(right.T, torch.linalg.cholesky(gram + strength * eye)).T
    else:
        free = torch.ones_like(weights, dtype=torch.bool)
        free[:, : keep.shape[1]] = keep.to(free.device)
        fitted = torch.zeros_like(weights)
        for rows in torch.arange(len(free), device=free.device).split(ROWS_AT_ONCE):
            inside = free[rows]
            systems = torch.where(inside[:, :, None] & inside[:, None, :], gram + strength * eye, eye)
            factors = torch.linalg.cholesky(systems)
            fitted[rows] = torch.cholesky_solve((right[rows] * inside)[..., None], factors)[..., 0]
    inputs = layer.weight.shape[1]
    layer.weight.copy_(fitted[:, :inputs])
    if layer.bias is not None:
        layer.bias.copy_(fitted[:, inputs])
