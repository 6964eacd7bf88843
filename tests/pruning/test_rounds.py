"""Rounds in this process: densities, rewinding bit for bit, and going on after a stop at any point."""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from itertools import pairwise

import pytest
import torch

from mamba.errors import CheckpointError, ConfigError, FolderError
from mamba.models.model import count_parameters
from mamba.runs import checkpoint as ckpt
from mamba.runs.files import read_sealed, write_sealed
from mamba.runs.folder import finished_result, request_stop
from mamba.train.distributed import local_process
from mamba.train.hooks import TrainHook
from mamba.train.trainer import fit
from pruning import load_masks, load_record, measure, prune_mamba_unstructured, refill_masks
from pruning.masks import FILE
from pruning.refill import prune_survivors
from pruning.report import before_after_table, rounds_figure, rounds_table
from pruning.rounds import (
    SURVIVORS,
    UNITS,
    Engine,
    accuracy_of,
    calibration_batches,
    check_rounds,
    expand,
    hooks_for,
    run_rounds,
)
from pruning.shrink import shrink
from tests.conftest import make_small_config


class Series:
    """A folder of rounds, trained here, measured without timing."""

    def __init__(self, config, folder, data):
        self.config, self.folder, self.data = config, folder, data
        self.trained, self.said = [], []
        folder.mkdir(parents=True)

    def train(self, config, folder):
        done = finished_result(folder)
        if done is None:
            (folder / "STOP").unlink(missing_ok=True)
            self.trained.append(folder.name)
            done = fit(config, local_process(), folder, self.data, hooks_for(config))
        return done

    def measure(self, config, path):
        model, _ = ckpt.load_model(path)
        masks = ckpt.find_checkpoint(path) / "masks.safetensors"
        if masks.exists():
            model = shrink(model, load_masks(masks)).model
        accuracy = measure.accuracy(model, self.data, self.data.val)
        return {**measure.size(model), "val/accuracy": accuracy, "bench/images_per_s": 1.0, "bench/latency_ms": 1.0}

    def run(self):
        return run_rounds(self.config, self.folder, self.data, Engine(self.train, self.measure, self.said.append))

    def begin_with(self, round_zero):
        """The dense training, which is another series' too."""
        shutil.copytree(round_zero, self.folder / "round-00")
        (self.folder / "round-00" / "row.json").unlink()

    def stop_before(self, name):
        """Run until a round is prepared, and is about to be trained."""
        train = self.train

        def until(config, folder):
            if folder.name == name:
                raise KeyboardInterrupt
            return train(config, folder)

        self.train = until
        with pytest.raises(KeyboardInterrupt):
            self.run()
        self.train = train

    def start(self, number):
        here = self.folder if number == 0 else self.folder / f"round-{number:02d}"
        return ckpt.load_model(here / "start", "raw")[0]


SETTLED = {"optim__epochs": 3, "prune__rounds": 3, "prune__rate": 0.4, "model__drop_path": 0.0}


@pytest.fixture
def series(small_config, small_data, tmp_path):
    def make(name="series", **values):
        config = small_config(name=name, **{**SETTLED, **values})
        return Series(config, tmp_path / "runs" / name, small_data)

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_data):
    """method -> (a series of three rounds, trained once for all tests that only look at it, its rows)."""

    @cache
    def make(method):
        root = tmp_path_factory.mktemp(method)
        config = make_small_config(root / "runs", name="series", prune__method=method, **SETTLED)
        s = Series(config, root / "runs" / "series", small_data)
        return s, s.run()

    return make


@pytest.mark.parametrize("method", ["magnitude", "refill", "rsst"])
def test_rounds_prune_what_they_say(finished, method):
    s, rows = finished(method)
    assert [r["density"] for r in rows] == pytest.approx([0.6**k for k in range(4)], abs=1e-3)
    assert s.trained == ["round-00", "round-01", "round-02", "round-03"]
    params = [r["params"] for r in rows]
    if method == "magnitude":
        nonzero = [r["nonzero"] for r in rows]
        assert all(a > b for a, b in pairwise(nonzero)) and params[1] == params[0]
    else:
        assert all(a > b for a, b in pairwise(params)), "no unit went"
    for row in rows:
        result = json.loads((s.folder / f"round-{row['round']:02d}" / "result.json").read_text())
        assert row["val_accuracy"] == pytest.approx(result["metrics"]["val/best_accuracy"]), (
            "not the model that was kept"
        )
    tested = [row["test_accuracy"] for row in rows]
    assert tested == [None, None, None, result["metrics"]["test/accuracy"]], "no round is chosen by the test set"
    assert all("validation" in line and "test" not in line for line in s.said)
    lines = (s.folder / "rounds.csv").read_text().splitlines()
    assert lines[0].startswith("round,density,params") and len(lines) == 5
    assert rounds_figure(s.folder, rows).stat().st_size > 1000
    assert rounds_table(rows).row_count == 4
    for k in (1, 3):
        record = load_record(s.folder / f"round-{k:02d}")
        weights = [record.total(f"{part}:element") for part in ("ssm", "mlp")]
        assert sum(w.kept for w in weights) / sum(w.before for w in weights) == pytest.approx(rows[k]["density"])
        if method != "magnitude":
            model = ckpt.load_model(s.folder / f"round-{k:02d}")[0]
            units = zip(record.of("mlp:neuron").values(), record.of("ssm:channel").values(), strict=True)
            shapes = [(b.mlp_hidden, b.d_inner) for b in model.architecture.blocks]
            assert method == "rsst" or [(a.kept, b.kept) for a, b in units] == shapes
    assert list(hooks_for(s.config.with_values({"prune.round": 3}), folder=s.folder / "round-03")[-1].pictures())


def test_rounds_that_an_earlier_version_measured_are_shown_by_their_test_accuracy(tmp_path):
    row = {"round": 0, "density": 1.0, "params": 9, "nonzero": 9, "macs": 9, "images_per_s": 1.0, "latency_ms": 1.0}
    old = [{**row, "test_accuracy": 97.0}]
    assert accuracy_of(old[0]) == (97.0, "test") and rounds_table(old).columns[5].header == "test accuracy"
    new = [{**row, "val_accuracy": 96.0, "test_accuracy": 97.0}]
    assert accuracy_of(new[0]) == (96.0, "validation")
    assert rounds_table(new).columns[5].header == "validation accuracy"


def test_refill_and_rsst_leave_equally_many_units(finished):
    """At the same density the two differ in how units go, not in how many: their comparison is at equal parameters."""
    sizes = {method: [row["params"] for row in finished(method)[1]] for method in ("refill", "rsst")}
    assert sizes["refill"][0] == sizes["rsst"][0]
    assert sizes["refill"][1] == pytest.approx(sizes["rsst"][1], rel=0.01)


@pytest.mark.parametrize("epoch", [0, 2])
def test_rewound_weights_are_bit_equal_to_the_saved_ones(series, finished, epoch):
    if epoch:
        s = series(prune__method="refill", prune__rewind_epoch=epoch, prune__rounds=2)
        s.stop_before("round-02")
    else:
        s = finished("refill")[0]
    saved = ckpt.load_model(s.folder / ("rewind" if epoch else "start"), "raw")[0]
    kept = copy.deepcopy(saved.state_dict())
    if epoch:
        assert not torch.equal(saved.head.weight, s.start(0).head.weight), "rewound to the initial weights"
    for number in (1, 2) if epoch else (1, 2, 3):
        units = load_masks(s.folder / f"round-{number:02d}" / "start" / UNITS)
        slices = shrink(saved, units).slices
        again = s.start(number).state_dict()
        for name, tensor in slices.take_all(kept).items():
            assert torch.equal(again[name], tensor), name
    assert all(torch.equal(v, kept[k]) for k, v in saved.state_dict().items())


def test_round_zero_is_the_plain_run(finished, small_data, tmp_path):
    s = finished("refill")[0]
    plain = s.config.with_values({"prune.method": "none"})
    fit(plain, local_process(), tmp_path / "plain", small_data)
    a, b = (ckpt.load_model(ckpt.newest_checkpoint(p), "raw")[0] for p in (s.folder / "round-00", tmp_path / "plain"))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_stopped_series_goes_on_at_its_round_and_epoch(series, finished, monkeypatch):
    monkeypatch.setattr("mamba.train.monitor.LOG_EVERY_S", 0)  # a stop is seen at the next step
    expected = finished("rsst")[1]
    s = series("parts", prune__method="rsst")
    train = s.train

    def interrupted(config, folder):
        if folder.name == "round-02" and not folder.joinpath("checkpoints").exists():
            stop = TrainHook()
            stop.end_epoch = lambda epoch: request_stop(folder) or {}
            return fit(config, local_process(), folder, s.data, [*hooks_for(config), stop])
        return train(config, folder)

    s.train = interrupted
    assert s.run() is None
    assert s.trained == ["round-00", "round-01"]
    state = ckpt.load_training_state(ckpt.newest_checkpoint(s.folder / "round-02"))
    assert state["epoch"] == 1 and state["unvalidated"], "stopped before its first epoch was validated"
    rows = s.run()
    assert s.trained == ["round-00", "round-01", "round-02", "round-03"]
    same = ("round", "density", "params", "nonzero", "val_accuracy", "test_accuracy")
    assert [[r[k] for k in same] for r in rows] == [[r[k] for k in same] for r in expected]
    trained = list(s.trained)
    assert s.run() == rows and s.trained == trained, "a finished series trained again"


def test_a_trained_model_can_be_pruned_without_training_it_again(series, small_fit, tmp_path):
    small_fit(optim__epochs=2)
    dense, _ = ckpt.load_model(tmp_path / "run")
    s = series(prune__method="refill", prune__rounds=1, model__checkpoint=tmp_path / "run")
    rows = s.run()
    assert s.trained == ["round-01"] and rows[0]["params"] == count_parameters(dense)
    assert torch.equal(s.start(0).head.weight, dense.head.weight)
    assert torch.equal(s.start(1).head.weight, dense.head.weight)


def test_survivors_only_ever_get_fewer(finished):
    s = finished("magnitude")[0]
    masks = [load_masks(s.folder / f"round-{k:02d}" / "start" / SURVIVORS) for k in (1, 2, 3)]
    for before, after in pairwise(masks):
        assert all(not bool((after[n] & ~before[n]).any()) for n in after)
    final, _ = ckpt.load_model(s.folder / "round-03")
    parameters = dict(final.named_parameters())
    assert all(bool((parameters[n][~keep] == 0).all()) for n, keep in masks[-1].items())


@pytest.mark.parametrize(
    "values, words",
    [
        ({"prune__rewind_epoch": 3}, "prune.rewind_epoch 3 is not before the end of optim.epochs 3"),
        ({"prune__method": "rsst", "prune__grow_fraction": 1.0}, "leaves no epoch after the cut"),
        ({"prune__rate": 1.0}, "prune.rate: should be less than 1"),
        ({"prune__method": "refil"}, "prune.method: should be 'none', 'magnitude', 'refill' or 'rsst'"),
    ],
)
def test_what_cannot_run_is_refused(small_config, values, words):
    with pytest.raises(ConfigError, match=words):
        small_config(**values)


def test_measurements_of_a_model(small_data, small_fit, tmp_path):
    small_fit()
    model, _ = ckpt.load_model(tmp_path / "run")
    size = measure.size(model)
    assert size["model/params"] == count_parameters(model) and size["model/sparsity"] == 0
    assert size["model/macs"] == model.architecture.macs()
    speed = measure.speed(model, batch_size=8, seconds=0.05)
    assert speed["bench/images_per_s"] > 0 and speed["bench/latency_ms"] > 0
    held = sum(p.nbytes for p in model.parameters()) / 2**20
    assert speed["bench/peak_memory_mib"] >= held
    speed.pop("bench/peak_memory_mib")  # where a system does not say it
    table = before_after_table({**size, **speed, "test/accuracy": 90.0}, {**size, **speed, "test/accuracy": 45.0})
    assert "not measured" in list(table.columns[1].cells) and "0.500" in list(table.columns[3].cells)


@pytest.mark.parametrize("score, fillback", [("saliency", 0.25), ("l2", 0.0), ("random", 0.1)])
def test_a_round_refills_as_its_config_says(series, finished, score, fillback):
    """Units of round 2 by hand, from the last raw weights of round 1 at their places in the dense model."""
    s = series(prune__method="refill", prune__score=score, prune__fillback_rate=fillback, prune__rounds=2)
    s.begin_with(finished("refill")[0].folder / "round-00")
    s.stop_before("round-02")
    first = s.folder / "round-01"
    units = load_masks(first / "start" / UNITS)
    dense = ckpt.load_model(s.folder / "start", "raw")[0]
    trained = expand(ckpt.load_model(ckpt.newest_checkpoint(first), "raw")[0], dense, shrink(dense, units).slices)
    gone = ~units["blocks.0.mlp.fc1.bias"]
    assert bool(gone.any()) and bool((trained.blocks[0].mlp.fc1.weight[gone] == 0).all())
    survivors = prune_survivors(trained, load_masks(first / "start" / SURVIVORS), "both", 0.6**2)
    batches = calibration_batches(s.data, s.config.seed)
    expected = refill_masks(trained, survivors, "both", fillback, score, batches, s.config.seed + 2, units)
    found = load_masks(s.folder / "round-02" / "start" / UNITS)
    assert all(torch.equal(found[n], m) for n, m in expected.items())
    assert all(not bool((found[n] & ~units[n]).any()) for n in units if n in found), "a unit came back"


def test_rsst_keeps_as_many_weights_as_refill(finished):
    s, rows = finished("rsst")
    assert all(row["nonzero"] == pytest.approx(row["params"], rel=1e-3) for row in rows), "holes in units that stay"
    smaller, _ = ckpt.load_model(s.folder / "round-02" / "pruned")
    assert count_parameters(smaller) == rows[2]["params"] < rows[0]["params"]


def test_hooks_carry_the_config(finished, small_config, tmp_path):
    start = shutil.copytree(finished("rsst")[0].folder / "round-01" / "start", tmp_path / "start")
    config = small_config(
        model__checkpoint=start, prune__method="rsst", prune__round=1, prune__schedule="x3", prune__exponent=2.0,
        prune__ceiling=0.7, penalty__kind="l1", penalty__strength=0.5, penalty__exponent=3.0,
    )  # fmt: skip
    penalty, hook = hooks_for(config)
    assert (penalty.base, penalty.exponent, penalty.norm) == (0.5, 3.0, "l1")
    assert (hook.schedule, hook.exponent, hook.ceiling, hook.grow_epochs) == ("x3", 2.0, 0.7, 2)
    survivors = load_masks(start / SURVIVORS)
    assert all(torch.equal(hook.masks[n] & ~hook.stay[n], m & ~hook.stay[n]) for n, m in survivors.items())
    (start / "stay.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"stay.safetensors is missing"):
        hooks_for(config)


def test_a_series_needs_nothing_but_its_folder(series, small_fit, tmp_path):
    small_fit(optim__epochs=1)
    s = series(prune__method="refill", prune__rounds=2, model__checkpoint=tmp_path / "run")
    measure_once = s.measure

    def interrupted(config, path):
        if "round-02" in str(path):
            raise KeyboardInterrupt
        return measure_once(config, path)

    s.measure = interrupted
    with pytest.raises(KeyboardInterrupt):
        s.run()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    s.measure = measure_once
    assert len(s.run()) == 3


def test_what_is_missing_or_damaged_is_said(series, finished):
    s = series(prune__method="refill")
    shutil.copytree(finished("refill")[0].folder, s.folder, dirs_exist_ok=True)
    (s.folder / "round-01" / "row.json").write_text("{")
    with pytest.raises(FolderError, match=r"row.json is damaged"):
        s.run()
    rows = [s.folder / f"round-0{k}" / "row.json" for k in (0, 1)]
    shutil.copy(rows[0], rows[1])
    with pytest.raises(FolderError, match=r"round-01/row.json is that of round 0: a copy"):
        s.run()
    write_sealed(rows[1], {**read_sealed(rows[0]), "round": 1})
    with pytest.raises(FolderError, match=r"row.json is of a model of .* parameters, and that of .*pruned has"):
        s.run()
    write_sealed(rows[1], {"round": 1})
    with pytest.raises(FolderError, match=r"row.json is damaged \(it holds no density\)"):
        s.run()
    rows[1].unlink()
    (s.folder / "round-01" / "start").rename(s.folder / "away")
    (s.folder / "round-01" / "result.json").unlink()
    (s.folder / "round-00" / "checkpoints").rename(s.folder / "gone")
    with pytest.raises(CheckpointError, match=r"round-00/checkpoints is missing"):
        s.run()


def test_a_stop_after_the_last_step_is_heard(series):
    s = series(prune__method="refill", prune__rounds=2)
    train = s.train

    def late(config, folder):
        result = train(config, folder)
        if folder.name == "round-01" and not (s.folder / "asked").exists():
            (s.folder / "asked").touch()
            request_stop(folder)
        return result

    s.train = late
    assert s.run() is None and s.trained == ["round-00", "round-01"]
    assert len(s.run()) == 3 and s.trained == ["round-00", "round-01", "round-02"]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"prune__method": "none"}, "prunes nothing"),
        ({"prune__rewind_epoch": 1}, "does not go with a trained model"),
        ({}, "holds masks of single weights"),
    ],
)
def test_series_that_cannot_be(small_config, small_fit, tmp_path, values, words):
    small_fit(optim__epochs=1)
    model, description = ckpt.load_model(tmp_path / "run")
    masks = {FILE: prune_mamba_unstructured(model, {"mlp": 0.5})}
    description = {**description, "weights": "raw"}
    start = ckpt.save_checkpoint(tmp_path / "masked", model, None, description, None, masks)
    with pytest.raises(ConfigError, match=words):
        check_rounds(small_config(model__checkpoint=start, **{"prune__method": "refill", **values}))
