"""What can be cut from a Mamba block, in one table: which tensors, along which axis, and what has to go with it.

Two layers. A *group* is a set of slices that only make sense together: unit i of it is slice i of each of its parts,
and removing a unit from all parts at once leaves a smaller model that computes what the zeroed one computed. A
*component* is what a user names: the weights it covers, one by one (granularity `element`), and the groups that cut it
as a whole. Parts that a block does not have are ignored, so another mixer is an entry here and nothing else.

Tensors are listed by their names within the mixer or the MLP, whatever those are called in a block. A mixer of several
scans has tensors of each, named with the scan's suffix (`mamba.models.ssm.MIXERS`); a unit is cut from all of them.

docs/PRUNING.md draws the block and its groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Literal, cast

from torch import Tensor, nn

from mamba.errors import ConfigError
from mamba.models.block import MambaBlock
from mamba.models.model import MambaModel

ELEMENT = "element"


@dataclass(frozen=True)
class Part:
    """The slices of one tensor along one axis, or those of one named segment of it."""

    tensor: str
    """In the table, its name within the mixer or the MLP (`each`); of a part that was found, within the block."""
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


def each(*parts: tuple[str, int] | tuple[str, int, str], scored: bool = True) -> tuple[Part, ...]:
    """(tensor, axis) or (tensor, axis, segment), of which a mixer has one for each of its scans; `{}` stands for the
    scan's suffix, which `find_all` fills in: none for the first, `_b` for the reversed."""
    return tuple(Part(name, axis, segment[0] if segment else None, scored) for name, axis, *segment in parts)


GROUPS: dict[str, Group] = {
    "d_inner": Group(
        "channel",
        each(
            ("in_proj.weight", 0, "x{}"),
            ("in_proj.weight", 0, "z{}"),
            ("conv1d{}.weight", 0),
            ("conv1d{}.bias", 0),
            ("pointwise{}.weight", 0),
            ("pointwise{}.weight", 1),
            ("x_proj{}.weight", 1),
            ("x_proj{}.weight", 0, "delta"),
            ("dt_proj{}.weight", 0),
            ("D{}", 0),
            ("out_proj.weight", 1, "y{}"),
        )
        # logs of decay rates and of time steps: their size says nothing about importance
        + each(("A{}_log", 0), ("dt_proj{}.bias", 0), ("delta_bias{}", 0), scored=False),
    ),
    "d_state": Group(
        "state",
        each(("x_proj{}.weight", 0, "B"), ("x_proj{}.weight", 0, "C")) + each(("A{}_log", 1), scored=False),
    ),
    "dt_rank": Group("rank", each(("x_proj{}.weight", 0, "dt"), ("dt_proj{}.weight", 1))),
    "d_conv": Group("tap", each(("conv1d{}.weight", 2)), order="first"),
    "out_channels": Group("output channel", (Part("out_proj.weight", 0), Part("out_index", 0, scored=False))),
    "mlp_hidden": Group("neuron", (Part("fc1.weight", 0), Part("fc1.bias", 0), Part("fc2.weight", 1))),
}

BLOCK = "block"
"""The granularity's and group's name for whole blocks: one unit a block, every parameter of it."""
STEM = "stem"
"""The component's and group's name for the inner channels of a stem of convolutions; its last convolution makes the
residual stream, whose width no cut changes, and patches have no inner channels."""
STEM_PREFIX = "patch_embed."

COMPONENTS: dict[str, Component] = {
    "linear_out": Component(
        covers=(Part("out_proj.weight", 0),),
        groups={"channel": "d_inner", "output": "out_channels"},
        structured="channel",
        advised=(0.6, 0.8),
    ),
    "mlp": Component(
        covers=(Part("fc1.weight", 0), Part("fc2.weight", 0)),
        groups={"neuron": "mlp_hidden"},
        structured="neuron",
        advised=(0.6, 0.8),
    ),
    "linear_gate": Component(
        covers=each(("in_proj.weight", 0, "z{}")),
        groups={"channel": "d_inner"},
        structured="channel",
        advised=(0.5, 0.7),
    ),
    "linear_in": Component(
        covers=(Part("in_proj.weight", 0),),
        groups={"expand": "d_inner"},
        structured="expand",
        advised=(0.25, 0.5),
    ),
    "conv1d": Component(
        covers=each(("conv1d{}.weight", 0)),
        groups={"width": "d_conv", "channel": "d_inner"},
        replacements=("separable",),
        structured="width",
        advised=(0.3, 0.5),
    ),
    "linear_B_C": Component(
        covers=each(("x_proj{}.weight", 0, "B"), ("x_proj{}.weight", 0, "C")),
        groups={"state": "d_state"},
        replacements=("shared",),
        structured="state",
        advised=(0.3, 0.5),
    ),
    "linear_delta": Component(
        covers=each(
            ("x_proj{}.weight", 0, "delta"),
            ("x_proj{}.weight", 0, "dt"),
            ("dt_proj{}.weight", 0),
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
    STEM: Component(groups={"channel": STEM}, structured="channel"),
    "head": Component(
        refused="attention pooling's score and the classifier read the residual stream, whose width no cut changes, "
        "and the classifier writes the classes"
    ),
    "embeddings": Component(
        refused="positions and class tokens have the width of the residual stream, which no cut changes"
    ),
    "norm": Component(refused="the norms' gains have the width of the residual stream, which no cut changes"),
}


def blocks_of(model: nn.Module) -> list[MambaBlock]:
    """The blocks of a Mamba model, in order.

    Raises:
        ConfigError: the model is not one of ours.
    """
    if not is_mamba_model(model):
        raise ConfigError(f"{type(model).__name__} is not a Mamba model of this package: it has no blocks to prune")
    return list(cast(MambaModel, model).stack)


def named_blocks(model: nn.Module) -> list[tuple[str, MambaBlock]]:
    """The blocks, each with what its parameters' full names begin with: `blocks.0.`, or `layers.0.` of a Vim.

    Raises:
        ConfigError: the model is not one of ours.
    """
    blocks = blocks_of(model)
    return [(block_prefix(cast(MambaModel, model), i), block) for i, block in enumerate(blocks)]


def block_prefix(model: MambaModel, index: int) -> str:
    return f"{model.stack_name}.{index}."


def is_mamba_model(model: nn.Module) -> bool:
    """Whether `model` is one of this package, of any mixer and any names, with blocks that this table knows."""
    return isinstance(model, MambaModel) and len(model.stack) > 0


Found = tuple[Part, Tensor, slice]
"""A part under its tensor's name in a certain block, the tensor, and the range of its units along the part's axis."""


def find_all(block: MambaBlock, parts: Sequence[Part]) -> list[Found]:
    """Those of some parts of the table that a block has."""
    tensors, segments = tensors_of(block), block.segments()
    found: list[Found] = []
    for part in _of_scans([path.suffix for path in block.token_mixer.paths], parts):
        for name in (f"{block.mixer_name}.{part.tensor}", f"mlp.{part.tensor}"):
            if name not in tensors:
                continue
            here = replace(part, tensor=name)
            if part.segment is None:
                found.append((here, tensors[name], slice(0, tensors[name].shape[part.axis])))
            elif part.segment in segments[name]:
                order = list(segments[name])
                start = sum(segments[name][before] for before in order[: order.index(part.segment)])
                found.append((here, tensors[name], slice(start, start + segments[name][part.segment])))
    return found


def _of_scans(suffixes: Sequence[str], parts: Sequence[Part]) -> Iterator[Part]:
    """Those that a mixer has for each of its scans so often, scan after scan; the others once."""
    for suffix in suffixes:
        for part in parts:
            tensor, segment = part.tensor.format(suffix), part.segment and part.segment.format(suffix)
            if suffix == suffixes[0] or (tensor, segment) != (part.tensor, part.segment):
                yield replace(part, tensor=tensor, segment=segment)


def parts_of(block: MambaBlock, group: Group) -> list[Found]:
    """The parts of a group that this block has."""
    return find_all(block, group.parts)


def tensors_of(block: MambaBlock) -> dict[str, Tensor]:
    """A block's parameters and buffers by their names within it."""
    return dict(block.named_parameters()) | dict(block.named_buffers())


def stem_layers(model: nn.Module) -> list[list[Found]]:
    """Of each convolution of a model's stem but the last, what goes with an output channel of it, by names within the
    stem; none for patches.

    Raises:
        ConfigError: the model is not one of ours.
    """
    blocks_of(model)
    stem = cast(MambaModel, model).patch_embed
    tensors = dict(stem.named_parameters()) | dict(stem.named_buffers())
    layers: list[list[Found]] = []
    while f"conv{len(layers) + 2}.weight" in tensors:
        i = len(layers) + 1
        parts = [Part(f"conv{i}.weight", 0), Part(f"norm{i}.weight", 0), Part(f"norm{i}.bias", 0)]
        parts += [Part(f"norm{i}.running_{what}", 0, scored=False) for what in ("mean", "var")]
        parts += [Part(f"conv{i + 1}.weight", 1)]
        width = tensors[parts[0].tensor].shape[0]
        layers.append([(part, tensors[part.tensor], slice(0, width)) for part in parts if part.tensor in tensors])
    return layers


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
    if component == STEM:
        for parts in stem_layers(model) if layers is None else []:
            for part, tensor, rows in parts:
                if part.axis == 0 and part.tensor.startswith("conv"):
                    yield STEM_PREFIX + part.tensor, tensor, rows
        return
    for i, (prefix, block) in enumerate(named_blocks(model)):
        if layers is not None and i not in layers:
            continue
        if component == BLOCK:
            for name, parameter in block.named_parameters():
                yield prefix + name, parameter, slice(None)
        for part, tensor, rows in find_all(block, COMPONENTS[component].covers):
            yield prefix + part.tensor, tensor, rows
