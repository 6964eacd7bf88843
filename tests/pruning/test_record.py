"""What a cut says that it did, against cuts that were made by hand."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from mamba.errors import FolderError
from pruning import apply_plan
from pruning.cut import cut
from pruning.masks import combine
from pruning.record import FILE, Record, Row, load_record, record_of, save_record
from pruning.refill import prune_survivors, record_of_round, refill_masks
from pruning.show import cut_figure, cut_picture, cut_table
from tests.pruning.small_models import PLAIN, build


def scaled(model, *sizes):
    """Neurons of block i made as large as sizes[i], so that who goes is known."""
    with torch.no_grad():
        for block, size in zip(model.blocks, sizes, strict=True):
            for name in ("fc1.weight", "fc1.bias", "fc2.weight"):
                tensor = dict(block.mlp.named_parameters())[name]
                tensor.copy_(size * torch.ones_like(tensor))
    return model


def test_units_that_were_cut_by_hand():
    model = scaled(build(), 0.1, 1.0, 2.0)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[:4] = 0.05
        model.blocks[1].mlp.fc1.bias[:4] = 0.05
        model.blocks[1].mlp.fc2.weight[:, :4] = 0.05
    result = cut(model, {"mlp:neuron": 17 / 42}, shrink=True)
    rows = [(r.layer, r.unit, r.before, r.kept) for r in result.record.rows]
    # 13 of block 0 (its floor is 1) and the four small ones of block 1, whose score 21 x 0.05 is below 21 x 0.1
    assert rows == [("blocks.0", "neuron", 14, 1), ("blocks.1", "neuron", 14, 10), ("blocks.2", "neuron", 14, 14)]
    assert [b.mlp_hidden for b in result.model.architecture.blocks] == [1, 10, 14]
    assert result.record.thresholds == {"mlp:neuron": pytest.approx(2.1)}
    total = result.record.total("mlp:neuron")
    assert (total.before, total.kept, total.share) == (42, 25, pytest.approx(100 * 25 / 42))


def test_single_weights_that_were_cut_by_hand():
    model = scaled(build(), 1.0, 2.0, 3.0)
    masked = cut(model, {"mlp": 1 / 3})
    rows = masked.record.of("mlp:element")
    assert [(r.before, r.kept, r.sparsity) for r in rows.values()] == [(280, 0, 100.0), (280, 280, 0), (280, 280, 0)]
    assert masked.record.thresholds == {"mlp:element": 1.0}
    zeros = [int((b.mlp.fc1.weight == 0).sum() + (b.mlp.fc2.weight == 0).sum()) for b in masked.model.blocks]
    assert zeros == [280, 0, 0]
    assert not cut(model, {"mlp": 1 / 3}, scope="layerwise").record.thresholds, "nothing was ranked together"


def test_what_was_gone_before_is_not_counted(model):
    first = cut(model, {"mlp:element": 0.5})
    again = cut(first.model, {"linear_gate:element": 0.5, "mlp:element": 0.75}, masks=first.masks)
    before = [r.kept for r in first.record.rows]
    assert [r.before for r in again.record.of("mlp:element").values()] == before
    assert sum(r.kept for r in again.record.of("mlp:element").values()) == sum(before) // 2


@pytest.mark.parametrize("shrink", [False, True])
def test_the_record_is_what_the_model_has(member, shrink):
    rates = {"linear_out:channel": 0.5, "linear_gate:element": 0.6, "block": 0.34}
    result = cut(member, rates, shrink=shrink)
    channels = [r.kept for r in result.record.of("linear_out:channel").values() if r.kept]
    depth = result.record.total("block:depth")
    assert (depth.before, depth.kept) == (len(member.stack), round(len(member.stack) * 0.66 + 0.01))
    if shrink:
        assert [b.d_inner for b in result.model.architecture.blocks] == channels
        left = combine(result.masks)
        again = record_of(result.model, left, [("linear_gate", "element")], {})
        kept = [r.kept for r in result.record.of("linear_gate:element").values() if r.kept]
        assert [r.kept for r in again.rows] == kept


def test_replacements_say_the_weights_that_are_left(model):
    result = cut(model, {"linear_delta:low_rank": 0.5, "block": 0.34}, shrink=True)
    rows = list(result.record.of("linear_delta:low_rank").values())
    kept = [block.ssm.x_proj.weight[:3].numel() + block.ssm.dt_proj.weight.numel() for block in result.model.blocks]
    assert [r.before for r in rows] == [144] * 3 and [r.kept for r in rows if r.kept] == kept == [72, 72]


def test_one_layer_alone_and_every_plan(model):
    only = cut(model, {"conv1d:width": 0.5}, shrink=True, layers=[1]).record
    assert only.rows == (Row("blocks.1", "conv1d:width", "tap", 4, 2),) and not only.thresholds
    tall = build(*[PLAIN] * 3, d_model=8)
    for name in ("stage1", "stage2"):
        record = apply_plan(tall, name).record
        assert record.rows and all(0 <= r.kept <= r.before for r in record.rows)


def test_rounds_say_survivors_and_units(model):
    first = prune_survivors(model, {}, "both", 0.6)
    survivors = prune_survivors(model, first, "both", 0.36)
    units = refill_masks(model, survivors, "both")
    record = record_of_round(model, model, first, survivors, units, "both")
    weights = [record.total(f"{part}:element") for part in ("ssm", "mlp")]
    assert sum(w.kept for w in weights) == round(0.36 * sum(w.before for w in weights))
    for i, block in enumerate(model.blocks):
        keep = units[f"blocks.{i}.ssm.out_proj.weight"].any(0)
        assert record.of("ssm:channel")[f"blocks.{i}"].kept == int(keep.sum())
        keep = units[f"blocks.{i}.mlp.fc1.weight"].any(1)
        assert record.of("mlp:neuron")[f"blocks.{i}"].kept == int(keep.sum())
        assert record.of("mlp:neuron")[f"blocks.{i}"].before == block.mlp.fc1.weight.shape[0]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    alive = torch.cat([parameters[n][keep].abs() for n, keep in survivors.items()])
    went = torch.cat([parameters[n][first[n] & ~keep].abs() for n, keep in survivors.items()])
    assert record.thresholds["ssm:element"] == record.thresholds["mlp:element"] == pytest.approx(float(went.max()))
    assert float(alive.min()) >= float(went.max())


def test_a_record_is_kept_and_shown(model, tmp_path):
    record = cut(model, {"mlp:neuron": 0.5, "linear_gate:element": 0.6}, shrink=True).record
    save_record(tmp_path, record)
    assert load_record(tmp_path) == record and load_record(tmp_path / "none") is None
    console = Console(width=200)
    with console.capture() as shown:
        console.print(cut_table(record))
    lines = shown.get().splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["blocks.0", "blocks.1", "blocks.2"]
    weights = record.total("linear_gate:element")
    assert (lines[5].split()[2:6], lines[5].split()[6:8]) == (["42", "21", "50.0", "%"], ["360", str(weights.kept)])
    assert "sparsity" in lines[1] and lines[6].startswith("threshold")
    picture = cut_picture(record)
    assert picture.shape[0] == 3 and 0 <= float(picture.min()) < float(picture.max()) <= 1
    assert len(cut_figure(record).axes) == 2
    cut_figure(Record())  # nothing was cut
    text = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(text.replace('"kept": 7', '"kept": 9', 1))
    with pytest.raises(FolderError, match="is damaged or was changed"):
        load_record(tmp_path)
    (tmp_path / FILE).write_text(json.dumps({"rows": [{"layer": "blocks.0"}], "thresholds": {}}))
    with pytest.raises(FolderError, match="is damaged"):
        load_record(tmp_path)
