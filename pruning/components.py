"""What can be cut from a Mamba block, in one table: which tensors, along which axis, and what has to go with it.

Two layers. A *group* is a set of slices that only make sense together: unit i of it is slice i of each of its parts,
and removing a unit from all parts at once leaves a smaller model that computes what the zeroed one computed. A
*component* is what a user names: the weights it covers, one by one (granularity `element`), and the groups that cut it
as a whole. Parts that a block does not have are ignored, so another mixer is an entry here and nothing else.

docs/PRUNING.md draws the block and its groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, cast

from torch import Tensor, nn

from mamba.errors import ConfigError
from mamba.layers import MambaBlock

ELEMENT = "element"


@dataclass(frozen=True)
class Part:
    """The slices of one tensor of a block along one axis, or those of one named segment of its rows."""

    tensor: str
    axis: int
    segment: str | None = None
    """Of a fused projection: which of its parts (`MambaBlock.segments`)."""
    scored: bool = True
    """Whether its values say how much a unit matters."""


@dataclass(frozen=True)
class Group:
    """Slices that are cut together."""

    unit: str
    """What one unit is, for messages and tables."""
    parts: tuple[Part, ...]
    order: Literal["score", "first"] = "score"
    """Which units go: the least important ones, or always the first ones (the earliest taps of a convolution)."""


@dataclass(frozen=True)
class Component:
    """Something a user can name to be cut."""

    covers: tuple[Part, ...] = ()
    """Weights that granularity `element` zeroes one by one; the axis says where a segment lies."""
    groups: dict[str, str] = field(default_factory=dict)
    """Granularity -> group."""
    replacements: tuple[str, ...] = ()
    """Granularities that rewrite the weights instead of removing some (pruning/replace.py)."""
    structured: str | None = None
    """The granularity meant where a smaller model is asked for and none is named."""
    advised: tuple[float, float] = (0.0, 0.0)
    """Rates worth trying, from the project's analysis of Mamba's components; expectations, not measurements."""
    refused: str | None = None
    """Why it is never cut by itself."""

    @property
    def granularities(self) -> tuple[str, ...]:
        return ((ELEMENT,) if self.covers else ()) + tuple(self.groups) + self.replacements


GROUPS: dict[str, Group] = {
    "d_inner": Group(
        "channel",
        (
            Part("ssm.in_proj.weight", 0, "x"),
            Part("ssm.in_proj.weight", 0, "z"),
            Part("ssm.conv1d.weight", 0),
            Part("ssm.conv1d.bias", 0),
            Part("ssm.pointwise.weight", 0),
            Part("ssm.pointwise.weight", 1),
            Part("ssm.x_proj.weight", 1),
            Part("ssm.x_proj.weight", 0, "delta"),
            Part("ssm.dt_proj.weight", 0),
            Part("ssm.A_log", 0, scored=False),  # log of a decay rate: its size says nothing about importance
            Part("ssm.D", 0),
            Part("ssm.delta_bias", 0, scored=False),
            Part("ssm.out_proj.weight", 1),
        ),
    ),
    "d_state": Group(
        "state",
        (
            Part("ssm.A_log", 1, scored=False),
            Part("ssm.x_proj.weight", 0, "B"),
            Part("ssm.x_proj.weight", 0, "C"),
        ),
    ),
    "dt_rank": Group("rank", (Part("ssm.x_proj.weight", 0, "dt"), Part("ssm.dt_proj.weight", 1))),
    "d_conv": Group("tap", (Part("ssm.conv1d.weight", 2),), order="first"),
    "out_channels": Group("output channel", (Part("ssm.out_proj.weight", 0), Part("ssm.out_index", 0, scored=False))),
    "mlp_hidden": Group("neuron", (Part("mlp.fc1.weight", 0), Part("mlp.fc1.bias", 0), Part("mlp.fc2.weight", 1))),
}

BLOCK = "block"
"""The granularity's and group's name for whole blocks: one unit a block, every parameter of it."""

COMPONENTS: dict[str, Component] = {
    "linear_out": Component(
        covers=(Part("ssm.out_proj.weight", 0),),
        groups={"channel": "d_inner", "output": "out_channels"},
        structured="channel",
        advised=(0.6, 0.8),
    ),
    "mlp": Component(
        covers=(Part("mlp.fc1.weight", 0), Part("mlp.fc2.weight", 0)),
        groups={"neuron": "mlp_hidden"},
        structured="neuron",
        advised=(0.6, 0.8),
    ),
    "linear_gate": Component(
        covers=(Part("ssm.in_proj.weight", 0, "z"),),
        groups={"channel": "d_inner"},
        structured="channel",
        advised=(0.5, 0.7),
    ),
    "linear_in": Component(
        covers=(Part("ssm.in_proj.weight", 0),),
        groups={"expand": "d_inner"},
        structured="expand",
        advised=(0.25, 0.5),
    ),
    "conv1d": Component(
        covers=(Part("ssm.conv1d.weight", 0),),
        groups={"width": "d_conv", "channel": "d_inner"},
        replacements=("separable",),
        structured="width",
        advised=(0.3, 0.5),
    ),
    "linear_B_C": Component(
        covers=(Part("ssm.x_proj.weight", 0, "B"), Part("ssm.x_proj.weight", 0, "C")),
        groups={"state": "d_state"},
        replacements=("shared",),
        structured="state",
        advised=(0.3, 0.5),
    ),
    "linear_delta": Component(
        covers=(
            Part("ssm.x_proj.weight", 0, "delta"),
            Part("ssm.x_proj.weight", 0, "dt"),
            Part("ssm.dt_proj.weight", 0),
        ),
        groups={"rank": "dt_rank"},
        replacements=("low_rank",),
        structured="low_rank",
        advised=(0.2, 0.4),
    ),
    BLOCK: Component(groups={"depth": BLOCK}, structured="depth", advised=(0.0, 0.33)),
    "A_log": Component(
        refused="it holds the decay rates of the recurrence; under 1 % of the parameters, and its rows and columns go "
        "with linear_in:expand (channels) and linear_B_C:state (states)"
    ),
    "D": Component(
        refused="one skip gain a channel, under 0.1 % of the parameters; it goes with its channel, as in "
        "linear_in:expand"
    ),
}


def blocks_of(model: nn.Module) -> list[MambaBlock]:
    """The blocks of a Mamba model, in order.

    Raises:
        ConfigError: the model is not one of ours.
    """
    if not is_mamba_model(model):
        raise ConfigError(f"{type(model).__name__} is not a Mamba model of this package: it has no blocks to prune")
    return cast(list[MambaBlock], list(cast(nn.ModuleList, model.blocks)))


def is_mamba_model(model: nn.Module) -> bool:
    """Whether `model` consists of blocks whose tensors this table knows."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return False
    known = {part.tensor for group in GROUPS.values() for part in group.parts if part.tensor.startswith("ssm.")}
    return all(known & {name for name, _ in block.named_parameters()} for block in blocks)


def find(block: MambaBlock, part: Part) -> tuple[Tensor, slice] | None:
    """A part's tensor and the range of its units along the part's axis; None where the block has no such part."""
    tensor = tensors_of(block).get(part.tensor)
    if tensor is None:
        return None
    if part.segment is None:
        return tensor, slice(0, tensor.shape[part.axis])
    start = 0
    for name, rows in block.segments().get(part.tensor, {}).items():
        if name == part.segment:
            return tensor, slice(start, start + rows)
        start += rows
    return None


def tensors_of(block: MambaBlock) -> dict[str, Tensor]:
    """A block's parameters and buffers by their names within it."""
    return dict(block.named_parameters()) | dict(block.named_buffers())


Found = tuple[Part, Tensor, slice]
"""A part, its tensor in a certain block, and the range of its units along the part's axis."""


def parts_of(block: MambaBlock, group: Group) -> list[Found]:
    """The parts of a group that this block has."""
    found = [(part, find(block, part)) for part in group.parts]
    return [(part, *hit) for part, hit in found if hit is not None]


def units_of(block: MambaBlock, group: Group) -> int:
    """How many units of a group a block has; 0 where it has none of its parts."""
    for _, _, span in parts_of(block, group):
        return span.stop - span.start
    return 0


def parse_target(target: str, *, structured: bool = False) -> tuple[str, str]:
    """`component` or `component:granularity` -> both, checked.

    Args:
        target: as typed, `mlp` or `mlp:neuron`.
        structured: a smaller model is wanted: no granularity named means the structured one, and `element` is refused.

    Raises:
        ConfigError: an unknown or refused component, an unknown granularity; says which are valid.
    """
    name, _, granularity = target.partition(":")
    component = COMPONENTS.get(name)
    cuttable = [n for n, c in COMPONENTS.items() if c.refused is None]
    if component is None:
        raise ConfigError(f"unknown component '{name}'; valid: {', '.join(cuttable)}")
    if component.refused is not None:
        raise ConfigError(f"component '{name}' is not pruned: {component.refused}; valid: {', '.join(cuttable)}")
    valid = tuple(g for g in component.granularities if g != ELEMENT) if structured else component.granularities
    if not granularity:
        granularity = (component.structured if structured or not component.covers else ELEMENT) or ""
    if granularity not in valid:
        raise ConfigError(
            f"component '{name}' cannot be cut by '{granularity}'{' into a smaller model' * structured}; "
            f"valid: {', '.join(valid)}"
        )
    return name, granularity


def check_rate(name: str, rate: float) -> None:
    """Raises ConfigError where a rate is not in [0, 1)."""
    if not isinstance(rate, Real) or isinstance(rate, bool) or not 0 <= rate < 1:
        raise ConfigError(f"the rate of '{name}' must be in [0, 1), got {rate!r}")


def get_prunable_layers(model: nn.Module) -> dict[str, list[str]]:
    """Component -> the full names of the parameters that it covers, block by block (as in `named_parameters`).

    Raises:
        ConfigError: not a Mamba model.
    """
    layers: dict[str, list[str]] = {}
    for name, component in COMPONENTS.items():
        if component.refused is None:
            layers[name] = [full for full, _, _ in covered(model, name)]
    return layers


def covered(model: nn.Module, component: str, layers: list[int] | None = None) -> Iterator[tuple[str, Tensor, slice]]:
    """(full parameter name, parameter, rows) that a component covers, in all blocks or the given ones."""
    for i, block in enumerate(blocks_of(model)):
        if layers is not None and i not in layers:
            continue
        if component == BLOCK:
            for name, parameter in block.named_parameters():
                yield f"blocks.{i}.{name}", parameter, slice(None)
        for part in COMPONENTS[component].covers:
            hit = find(block, part)
            if hit is not None:
                yield f"blocks.{i}.{part.tensor}", hit[0], hit[1]
