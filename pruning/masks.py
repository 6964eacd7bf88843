"""Masks: full parameter name -> boolean tensor of the parameter's shape, true where the weight stays.

Plain dictionaries, so that they compose (`combine`), travel as safetensors, and can be looked at. A parameter without a
mask is whole. Structured masks are masks like any other: `pruning.shrink` finds the units that they take whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mamba.errors import CheckpointError, ConfigError
from mamba.runs.checkpoint import check_content
from mamba.runs.files import replacing
from mamba.train.ema import ModelEma
from mamba.train.hooks import TrainHook
from pruning.components import (
    BLOCK,
    COMPONENTS,
    GROUPS,
    STEM,
    STEM_PREFIX,
    Found,
    covered,
    find_all,
    named_blocks,
    parts_of,
    stem_layers,
)

Masks = dict[str, Tensor]
FILE = "masks.safetensors"
"""The masks' name in a checkpoint folder."""


def combine(*masks: Mapping[str, Tensor]) -> Masks:
    """What stays under all of the masks."""
    result: Masks = {}
    for one in masks:
        for name, keep in one.items():
            result[name] = result[name] & keep.to(result[name].device) if name in result else keep.clone()
    return result


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Raises ConfigError where a mask names no parameter of the model or has another shape."""
    parameters = dict(model.named_parameters())
    for name, keep in masks.items():
        if name not in parameters:
            raise ConfigError(f"the masks name '{name}', which is no parameter of this model")
        if keep.shape != parameters[name].shape or keep.dtype != torch.bool:
            raise ConfigError(
                f"the mask of '{name}' is {keep.dtype} of shape {tuple(keep.shape)}; valid: torch.bool of shape "
                f"{tuple(parameters[name].shape)}"
            )


@torch.no_grad()
def apply_mask_mamba(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero the cut weights, in place. Applying twice changes nothing more.

    Raises:
        ConfigError: a mask that does not fit; nothing was changed then.
    """
    check_masks(model, masks)
    parameters = dict(model.named_parameters())
    for name, keep in masks.items():
        # not a product: 0 x inf is not 0
        parameters[name].masked_fill_(~keep.to(parameters[name].device), 0.0)


def extract_mask_mamba(model: nn.Module) -> Masks:
    """Read masks off a model's zeros: the weights that components cover, and the rest of each unit that is gone.

    Biases, norms, A_log and D may be zero without being cut; they count as cut only where all the weights of their unit
    are. A weight that is zero by chance is taken for cut. Parameters without a zero get no mask.
    """
    masks: Masks = {}
    covers = [part for component in COMPONENTS.values() for part in component.covers]
    for prefix, block in named_blocks(model):
        own = {part.tensor: p for part, p, _ in find_all(block, covers)}
        masks |= {prefix + name: p.detach() != 0 for name, p in own.items() if bool((p == 0).any())}
    read = dict(masks)
    for prefix, block in named_blocks(model):
        weights = {part.tensor for part, _, _ in find_all(block, covers)}
        for group in GROUPS.values():
            parts = parts_of(block, group)
            gone = gone_units(read, prefix, [p for p in parts if p[0].tensor in weights])
            _cut(masks, prefix, parts, gone)
        if all(prefix + name in read and not read[prefix + name].any() for name in weights):
            masks |= {prefix + name: torch.zeros_like(p, dtype=torch.bool) for name, p in block.named_parameters()}
    for parts in stem_layers(model):
        weights_of = [found for found in parts if found[1].ndim > 1]
        zeros = {STEM_PREFIX + part.tensor: tensor.detach() != 0 for part, tensor, _ in weights_of}
        _cut(masks, STEM_PREFIX, parts, gone_units(zeros, STEM_PREFIX, weights_of))
    return masks


def gone_units(masks: Mapping[str, Tensor], prefix: str, parts: Sequence[Found]) -> Tensor:
    """Which units of a group the masks take whole, in every parameter among `parts` (as `parts_of` gives them)."""
    gone: Tensor | None = None
    for part, tensor, span in parts:
        if not isinstance(tensor, nn.Parameter):
            continue
        keep = masks.get(prefix + part.tensor)
        if keep is None:
            return torch.zeros(span.stop - span.start, dtype=torch.bool)
        rest = [axis for axis in range(keep.ndim) if axis != part.axis]
        here = ~(keep.any(rest) if rest else keep)[span].cpu()
        gone = here if gone is None else gone & here
    return torch.zeros(0, dtype=torch.bool) if gone is None else gone


def block_gone(masks: Mapping[str, Tensor], prefix: str, block: nn.Module) -> bool:
    """Whether the masks take every parameter of a block."""
    names = [prefix + name for name, _ in block.named_parameters()]
    return all(name in masks and not masks[name].any() for name in names)


def unit_masks(model: nn.Module, group: str, keep: Sequence[Tensor | None]) -> Masks:
    """Masks that take whole units: one keep-mask over the group's units a block (of `stem`, a convolution), or None to
    leave it alone."""
    masks: Masks = {}
    if group == STEM:
        for parts, kept in zip(stem_layers(model), keep, strict=True):
            if kept is not None:
                _cut(masks, STEM_PREFIX, parts, ~kept.cpu())
        return masks
    for (prefix, block), kept in zip(named_blocks(model), keep, strict=True):
        if kept is None:
            continue
        if group != BLOCK:
            _cut(masks, prefix, parts_of(block, GROUPS[group]), ~kept.cpu())
        elif not kept.any():
            masks |= {prefix + name: torch.zeros_like(p, dtype=torch.bool) for name, p in block.named_parameters()}
    return masks


def _cut(masks: Masks, prefix: str, parts: Sequence[Found], gone: Tensor) -> None:
    """Clear the slices of these units in the masks of their parameters."""
    index = gone.nonzero().squeeze(1)
    if not len(index):
        return
    for part, tensor, span in parts:
        if isinstance(tensor, nn.Parameter):
            keep = masks.setdefault(prefix + part.tensor, torch.ones_like(tensor, dtype=torch.bool))
            keep.index_fill_(part.axis, (span.start + index).to(keep.device), False)


def check_sparsity_mamba(model: nn.Module, per_layer: bool = False) -> dict[str, float]:
    """Percent of zeros: `total` over all prunable weights, and of each component, or of each parameter.

    Args:
        model: a Mamba model, masked or not. In a shrunk model what is gone is not there to be counted.
        per_layer: by full parameter name instead of by component.
    """
    zeros: dict[str, int] = {}
    sizes: dict[str, int] = {}
    seen: set[str] = set()

    def add(key: str, values: Tensor) -> None:
        zeros[key] = zeros.get(key, 0) + int((values == 0).sum())
        sizes[key] = sizes.get(key, 0) + values.numel()

    for component in COMPONENTS:
        if not COMPONENTS[component].covers:
            continue
        for name, parameter, rows in covered(model, component):
            if not per_layer:
                add(component, parameter.detach()[rows])
            if name not in seen:  # the gate's rows are part of in_proj
                seen.add(name)
                add("total", parameter.detach())
                if per_layer:
                    add(name, parameter.detach())
    return {key: 100 * zeros[key] / sizes[key] for key in sizes}


def save_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks as safetensors, whole or not at all, readable as the umask says; raises FolderError where they cannot
    be written."""
    with replacing(Path(path)) as file:
        file.write(save({name: keep.cpu().contiguous() for name, keep in masks.items()}))


def load_masks(path: Path) -> Masks:
    """Read what `save_masks` wrote; raises CheckpointError where it is missing or damaged."""
    check_content(path)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: there are no masks there") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error})") from None


class MaskHook(TrainHook):
    """Keeps cut weights at zero while a model trains: their gradients, and with them AdamW's moments, its decay's
    effect and the average's values."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)
        self.pairs: list[tuple[nn.Parameter, Tensor]] = []

    def attach(self, model: nn.Module, ema: ModelEma | None, optimizer: torch.optim.Optimizer, seed: int) -> None:
        check_masks(model, self.masks)
        parameters = dict(model.named_parameters())
        self.model, self.ema, self.optimizer = model, ema, optimizer
        self.pairs = [(parameters[n], keep.to(parameters[n])) for n, keep in self.masks.items()]
        self.enforce()

    @torch.no_grad()
    def cut(self, masks: Mapping[str, Tensor]) -> None:
        """Take more away while training goes on. Host code: the tensors that `gradients` reads are changed in place."""
        known = {name: scale for name, (_, scale) in zip(self.masks, self.pairs, strict=True)}
        missing = [name for name in masks if name not in known]
        if missing:
            raise ConfigError(f"the hook holds no mask of '{missing[0]}' that more could be cut from")
        self.masks = combine(self.masks, masks)
        for name, scale in known.items():
            scale.copy_(self.masks[name])
        self.enforce()

    @torch.no_grad()
    def enforce(self) -> None:
        """Zero what is cut in weights, average and optimizer state."""
        apply_mask_mamba(self.model, self.masks)
        if self.ema:
            apply_mask_mamba(self.ema.model, self.masks)
        for parameter, scale in self.pairs:
            for value in self.optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.mul_(scale)

    @torch.no_grad()
    def gradients(self) -> None:
        pairs = [(p.grad, scale) for p, scale in self.pairs if p.grad is not None]
        if pairs:
            torch._foreach_mul_(*map(list, zip(*pairs, strict=True)))

    def files(self) -> dict[str, dict[str, Tensor]]:
        return {FILE: self.masks}
