"""How much a weight matters, by five criteria; what a unit matters is the sum over its whole coupled group.

    l1      |w|                                       Han et al. 2015, Li et al. 2017
    l2      w^2, a unit's as the root of the sum      Li et al. 2017
    taylor  |w dL/dw|, first-order change of the loss Molchanov et al. 2019
    wanda   |w| times the root mean square of its input feature     Sun et al. 2023
    random  uniform in (0, 1)                         the baseline that any criterion must beat

taylor and wanda need calibration batches: `calibration`, an iterable of (images, labels), taken from training data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba.config.choices import Registry
from mamba.errors import ConfigError
from mamba.models.model import MambaModel
from pruning.components import BLOCK, GROUPS, STEM, STEM_PREFIX, Found, named_blocks, parts_of, stem_layers, units_of

Batches = Iterable[tuple[Tensor, Tensor]]
Parameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Score:
    """A criterion of importance."""

    elements: Callable[[nn.Module, Parameters, Batches | None, int], dict[str, Tensor]]
    """Model, parameters of its blocks by full name, calibration batches, seed -> a score of every element."""
    calibrated: bool = False
    """Whether it needs calibration batches."""
    of_unit: Callable[[Tensor], Tensor] = torch.clone
    """The sums over the elements of units -> the units' scores."""


def element_scores(
    model: nn.Module, score: str = "l1", calibration: Batches | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """A score of every element of every parameter that can be cut, those of the blocks and of a stem of convolutions,
    by full name; float32, on the model's device.

    The model is not changed. l2 gives squares, so that sums over elements are sums of squares.

    Raises:
        ConfigError: an unknown score, or one that needs calibration batches and got none.
    """
    if score not in SCORES:
        raise ConfigError(f"unknown score '{score}'; valid: {', '.join(SCORES)}")
    if SCORES[score].calibrated and calibration is None:
        raise ConfigError(f"score '{score}' needs calibration batches (images and labels of the training set)")
    parameters = {prefix + name: p for prefix, block in named_blocks(model) for name, p in block.named_parameters()}
    for parts in stem_layers(model):
        parameters |= {STEM_PREFIX + part.tensor: p for part, p, _ in parts if isinstance(p, nn.Parameter)}
    with torch.no_grad():
        if score in SCORES.shipped:
            found = SCORES[score].elements(model, parameters, calibration, seed)
        else:
            found = _of_added(model, score, parameters, calibration, seed)
    for name, values in found.items():
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite()).sum())
            raise ConfigError(
                f"score '{score}': {bad} of {values.numel()} values of {name} are NaN or infinite: nothing can be "
                "ranked by them"
            )
    return found


def _of_added(
    model: nn.Module, score: str, parameters: Parameters, calibration: Batches | None, seed: int
) -> dict[str, Tensor]:
    """What a score that was added from outside gives; raises ConfigError where it is no number for each weight, or
    the model is not what it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = model.training
    found = SCORES[score].elements(model, parameters, calibration, seed)
    if not isinstance(found, dict):
        raise ConfigError(f"score '{score}' gives a {type(found).__name__}; valid: a dictionary of tensors by name")
    for name, parameter in parameters.items():
        values = found.get(name)
        if not isinstance(values, Tensor) or values.shape != parameter.shape:
            shape = tuple(values.shape) if isinstance(values, Tensor) else "absent"
            raise ConfigError(
                f"score '{score}': the values of {name} are {shape}; valid: one for each weight, "
                f"{tuple(parameter.shape)}"
            )
    if model.training != training or any(
        not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()
    ):
        raise ConfigError(f"score '{score}' changes the model that it ranks; it must leave it as it is")
    return {name: found[name].float() for name in parameters}


def unit_scores(model: nn.Module, group: str, elements: dict[str, Tensor], score: str = "l1") -> list[Tensor]:
    """Per block, the score of each unit of a group: element scores summed over all its scored parts. Where the first
    units are the ones to go (taps), a unit's score is its place.

    Returns:
        one tensor of shape (units,) a block; for `block` one of shape (1,); for `stem` one for each convolution but
        the last.
    """
    if group == STEM:
        in_stem = [_unit_sums(parts, STEM_PREFIX, elements) for parts in stem_layers(model)]
        return [_of_unit(score, sums) for sums in in_stem]
    per_block = []
    for prefix, block in named_blocks(model):
        if group == BLOCK:
            total = torch.stack([elements[prefix + name].sum() for name, _ in block.named_parameters()]).sum()
            sums = total[None]
        elif GROUPS[group].order == "first":
            per_block.append(torch.arange(units_of(block, GROUPS[group]), dtype=torch.float64))
            continue
        else:
            sums = _unit_sums(parts_of(block, GROUPS[group]), prefix, elements)
        per_block.append(_of_unit(score, sums))
    return per_block


def _of_unit(score: str, sums: Tensor) -> Tensor:
    """Units' scores; raises ConfigError where they are not one finite number a unit."""
    found = SCORES[score].of_unit(sums)
    if found.shape != sums.shape or not bool(found.isfinite().all()):
        raise ConfigError(
            f"score '{score}': of {len(sums)} units it gives {tuple(found.shape)} values, "
            f"{int((~found.isfinite()).sum())} of them NaN or infinite; valid: one finite number a unit"
        )
    return found


def _l1(model: nn.Module, parameters: Parameters, calibration: Batches | None, seed: int) -> dict[str, Tensor]:
    return {name: p.abs().float() for name, p in parameters.items()}


def _l2(model: nn.Module, parameters: Parameters, calibration: Batches | None, seed: int) -> dict[str, Tensor]:
    return {name: p.float().square() for name, p in parameters.items()}


def _random(model: nn.Module, parameters: Parameters, calibration: Batches | None, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator).to(p.device) for n, p in parameters.items()}


def _unit_sums(parts: Sequence[Found], prefix: str, elements: dict[str, Tensor]) -> Tensor:
    """Scores of the units of a group summed over its scored parts; float64."""
    sums = torch.zeros(0)
    for part, tensor, span in parts:
        values = elements.get(prefix + part.tensor)
        if values is None or not part.scored:
            continue
        rest = [axis for axis in range(tensor.ndim) if axis != part.axis]
        values = values.double().sum(rest) if rest else values.double()
        sums = values[span] if not len(sums) else sums + values[span]
    return sums


@torch.enable_grad()
def _taylor(model: nn.Module, parameters: Parameters, calibration: Batches | None, seed: int) -> dict[str, Tensor]:
    assert calibration is not None
    copied = copy.deepcopy(model).eval().requires_grad_(True)
    copied.zero_grad(set_to_none=True)
    for images, labels in calibration:
        F.cross_entropy(copied(images).float(), labels).backward()
    own = dict(copied.named_parameters())
    scores = {}
    for name in parameters:
        gradient = own[name].grad
        if gradient is None:
            raise ConfigError("calibration is empty: score 'taylor' needs at least one batch")
        scores[name] = (own[name].detach() * gradient).abs().float()
    return scores


@torch.no_grad()
def _wanda(model: nn.Module, parameters: Parameters, calibration: Batches | None, seed: int) -> dict[str, Tensor]:
    """Parameters that meet no input feature (biases, A_log, D) score nothing."""
    assert calibration is not None
    squares: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].float()
            x = x.movedim(1, -1) if x.ndim == 4 else x  # features last, as tokens have them
            squares[name] = squares.get(name, 0.0) + x.square().sum(tuple(range(x.ndim - 1)))
            tokens[name] = tokens.get(name, 0) + x.shape[:-1].numel()

        handles.append(module.register_forward_pre_hook(record))

    for prefix, block in named_blocks(model):
        for name, module in block.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv1d)):
                watch(f"{prefix}{name}.weight", module)
    for name, module in cast(MambaModel, model).patch_embed.named_modules():
        if f"{STEM_PREFIX}{name}.weight" in parameters and isinstance(module, nn.Conv2d):
            watch(f"{STEM_PREFIX}{name}.weight", module)
    training = model.training
    try:
        model.eval()
        for images, _ in calibration:
            model(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not squares:
        raise ConfigError("calibration is empty: score 'wanda' needs at least one batch")
    scores = {}
    for name, p in parameters.items():
        if name not in squares:
            scores[name] = torch.zeros_like(p, dtype=torch.float32)
            continue
        rms = (squares[name] / tokens[name]).sqrt()
        # a depthwise convolution's input feature is its output channel's
        shape = (-1, 1, 1) if p.ndim == 3 else (1, -1, *(1,) * (p.ndim - 2))
        scores[name] = p.abs().float() * rms.view(shape)
    return scores


SCORES = Registry(
    "cut.criterion",
    {
        "l1": Score(_l1),
        "l2": Score(_l2, of_unit=torch.sqrt),
        "taylor": Score(_taylor, calibrated=True),
        "wanda": Score(_wanda, calibrated=True),
        "random": Score(_random),
    },
)
