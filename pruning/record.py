"""What a cut did, layer by layer: the units of each kind before, those that stay, and, where all layers were ranked
together, the score at which they were divided.

Written as cut.json beside the model that a cut left (`save_record`), read by `load_record`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mamba.errors import FolderError
from mamba.runs.files import read_sealed, write_sealed
from pruning.components import (
    BLOCK,
    COMPONENTS,
    ELEMENT,
    GROUPS,
    STEM,
    STEM_PREFIX,
    Part,
    find_all,
    named_blocks,
    parts_of,
    stem_layers,
)
from pruning.masks import block_gone, gone_units

FILE = "cut.json"
ALL = "all blocks"
"""The layer of a row that is no layer's."""


@dataclass(frozen=True)
class Row:
    """What went of one kind of unit in one layer."""

    layer: str
    """`blocks.0`, `patch_embed.conv1`, or `all blocks`, where the units are the blocks."""
    what: str
    """What cut it, as it was asked for: `mlp:neuron`, `linear_gate:element`; of rounds the target, `ssm:channel`."""
    unit: str
    """neuron, channel, state, ...; `weight` of granularity element and of replacements."""
    before: int
    kept: int

    @property
    def share(self) -> float:
        """Percent that is kept."""
        return 100 * self.kept / self.before

    @property
    def sparsity(self) -> float:
        """Percent that went."""
        return 100 - self.share


@dataclass(frozen=True)
class Record:
    """What one call of pruning did."""

    rows: tuple[Row, ...] = ()
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Of each cut whose units were ranked over all layers together: the highest score of a unit that went. With a floor
    a layer may keep units below it."""

    @property
    def whats(self) -> tuple[str, ...]:
        """What was cut, in order, each once."""
        return tuple(dict.fromkeys(row.what for row in self.rows))

    def of(self, what: str) -> dict[str, Row]:
        """Layer -> row of one cut."""
        return {row.layer: row for row in self.rows if row.what == what}

    def total(self, what: str) -> Row:
        """One cut over all its layers."""
        some = list(self.of(what).values())
        return replace(some[0], layer=ALL, before=sum(r.before for r in some), kept=sum(r.kept for r in some))

    def with_replaced(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        after: nn.Module,
        left: Mapping[str, Tensor],
        cuts: Sequence[tuple[str, str]],
        layers: Sequence[int] | None = None,
    ) -> Record:
        """Rows of replacements besides: the weights of their components before and after.

        Args:
            model: what was cut, as in `record_of`; `masks` are its.
            after: what it became, without the blocks that the masks take whole; `left` are its masks.
            cuts: (component, granularity).
            layers: blocks of `model` that were cut; None: all.
        """
        rows = list(self.rows)
        stay = [p.rstrip(".") for p, b in named_blocks(model) if not block_gone(masks, p, b)]
        heirs = dict(zip((p.rstrip(".") for p, _ in named_blocks(after)), stay, strict=True))
        for name, granularity in cuts:
            what, covers = f"{name}:{granularity}", COMPONENTS[name].covers
            kept = {heirs[row.layer]: row.before for row in weight_rows(after, what, covers, left, left)}
            old = weight_rows(model, what, covers, {}, {}, layers)
            rows += [replace(row, kept=kept.get(row.layer, 0)) for row in old]
        return replace(self, rows=tuple(rows))


def save_record(folder: Path, record: Record | None) -> None:
    """Write cut.json; nothing where there is no record. Raises FolderError where it cannot be written."""
    if record is not None:
        rows = [{**asdict(row), "share": round(row.share, 4)} for row in record.rows]
        write_sealed(folder / FILE, {"rows": rows, "thresholds": dict(record.thresholds)})


def load_record(folder: str | Path) -> Record | None:
    """What `save_record` wrote; None where a folder has none.

    Raises:
        FolderError: it is damaged or was changed.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    tree = read_sealed(path)
    try:
        rows = [{key: row[key] for key in Row.__dataclass_fields__} for row in tree["rows"]]
        counts = [row[key] for row in rows for key in ("before", "kept")]
        if not all(type(count) is int for count in counts) or not all(r["kept"] >= 0 and r["before"] > 0 for r in rows):
            raise ValueError
        return Record(tuple(Row(**row) for row in rows), {k: float(v) for k, v in tree["thresholds"].items()})
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FolderError(f"{path} is damaged: it is not what a cut wrote") from None


def record_of(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    cuts: Iterable[tuple[str, str]],
    before: Mapping[str, Tensor] | None = None,
    layers: Sequence[int] | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> Record:
    """The record of masks over a model.

    Args:
        model: what was cut; not changed.
        masks: what stays, under all that was cut: a weight whose unit went is gone too.
        cuts: (component, granularity), each once; granularities without units of their own are left out.
        before: the masks that there were; what they took is not counted.
        layers: blocks that were cut; None: all.
        thresholds: see `Record`.
    """
    rows: list[Row] = []
    for name, granularity in cuts:
        what, component = f"{name}:{granularity}", COMPONENTS[name]
        if granularity == ELEMENT:
            rows += weight_rows(model, what, component.covers, masks, before or {}, layers)
        elif granularity in component.groups:
            rows += unit_rows(model, what, component.groups[granularity], masks, before or {}, layers)
    return Record(tuple(rows), dict(thresholds or {}))


def unit_rows(
    model: nn.Module,
    what: str,
    group: str,
    masks: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    layers: Sequence[int] | None = None,
) -> list[Row]:
    """A row for each layer that has units of a group."""
    blocks = [(prefix, b) for i, (prefix, b) in enumerate(named_blocks(model)) if layers is None or i in layers]
    if group == BLOCK:
        before_after = [sum(not block_gone(m, prefix, block) for prefix, block in blocks) for m in (before, masks)]
        return [Row(ALL, what, "block", *before_after)]
    if group == STEM:
        places = [(STEM_PREFIX, f"conv{i + 1}", parts) for i, parts in enumerate(stem_layers(model))]
    else:
        places = [(prefix, "", parts_of(block, GROUPS[group])) for prefix, block in blocks]
    unit = "stem channel" if group == STEM else GROUPS[group].unit
    rows = []
    for prefix, name, parts in places:
        counts = [int((~gone_units(m, prefix, parts)).sum()) for m in (before, masks)]
        if counts[0]:
            rows.append(Row(f"{prefix}{name}".rstrip("."), what, unit, *counts))
    return rows


def weight_rows(
    model: nn.Module,
    what: str,
    covers: Sequence[Part],
    masks: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    layers: Sequence[int] | None = None,
) -> list[Row]:
    """A row for each layer that has weights of these parts, every weight counted once."""
    rows = []
    for i, (prefix, block) in enumerate(named_blocks(model)):
        if layers is not None and i not in layers:
            continue
        covered: dict[str, Tensor] = {}
        for part, tensor, span in find_all(block, covers):
            mark = covered.setdefault(prefix + part.tensor, torch.zeros(tensor.shape, dtype=torch.bool))
            mark.narrow(part.axis, span.start, span.stop - span.start).fill_(True)
        counts = [
            sum(int((mark & m[name].cpu()).sum()) if name in m else int(mark.sum()) for name, mark in covered.items())
            for m in (before, masks)
        ]
        if counts[0]:
            rows.append(Row(prefix.rstrip("."), what, "weight", *counts))
    return rows


def highest_gone(
    scores: Sequence[Tensor], keep: Sequence[Tensor], before: Sequence[Tensor] | None = None
) -> float | None:
    """The highest score of what went; None where nothing did.

    Args:
        scores: one tensor a layer.
        keep: masks of their shapes, true where something stays.
        before: what was there at all; None: everything.
    """
    there = [torch.ones_like(k) for k in keep] if before is None else before
    went = [s.cpu()[b.cpu() & ~k.cpu()] for s, k, b in zip(scores, keep, there, strict=True)]
    found = [float(values.max()) for values in went if values.numel()]
    return max(found, default=None)
