"""Checkpoints: exact names, atomic replacement, checksums, damage by name, no link followed."""

from __future__ import annotations

import json
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mamba.config.versions import FORMAT
from mamba.errors import CheckpointError
from mamba.models.model import Architecture, MambaModel
from mamba.runs import checkpoint as ckpt
from mamba.runs.start import prepare_resume
from pruning.masks import FILE
from pruning.store import masks_of, save_pruned


@pytest.fixture
def model(small_config):
    torch.manual_seed(0)
    return MambaModel(Architecture.from_config(small_config().model, 3, 8))


def value_in(folder):
    return ckpt.read_description(folder)["epoch"]


def test_only_exact_names_are_checkpoints_and_copies_are_left_alone(model, tmp_path):
    parent = tmp_path / "checkpoints"
    for name in ("step-00000004", "step-00000012", "best-00001", "best-00003"):
        ckpt.save_checkpoint(parent / name, model, None, {"epoch": 1}, None)
    others = ["step-00000004-keep", "best-00003-keep", "step-x", "best-", "best-00009.bak", "notes"]
    for name in others:
        shutil.copytree(parent / "step-00000012", parent / name)
    (parent / "step-00000099").write_text("a file")
    (parent / "best-00099").symlink_to(parent / "best-00001")
    assert ckpt.newest_checkpoint(tmp_path).name == "step-00000012"
    assert ckpt.best_checkpoint(tmp_path).name == "best-00003"
    ckpt.remove_best_after(tmp_path, 2)
    assert ckpt.best_checkpoint(tmp_path).name == "best-00001"
    ckpt.remove_old(tmp_path, "step-*", 1)
    ckpt.remove_old(tmp_path, "best-*", 1)
    assert not (parent / "step-00000004").exists() and all((parent / name / "config.json").exists() for name in others)
    assert (parent / "step-00000099").exists() and (parent / "best-00099").is_symlink()


def test_a_run_goes_on_beside_copies(small_fit, tmp_path):
    small_fit(optim__epochs=2)
    run = tmp_path / "run"
    for folder in (ckpt.newest_checkpoint(run), ckpt.best_checkpoint(run)):
        shutil.copytree(folder, folder.with_name(folder.name + "-keep"))
    copies = sorted((run / "checkpoints").glob("*-keep"))
    (run / "result.json").unlink()
    assert small_fit(optim__epochs=3)["epochs"] == 3
    assert sorted((run / "checkpoints").glob("*-keep")) == copies and all(os.listdir(c) for c in copies)


def test_numbers_count_and_not_spelling(model, tmp_path):
    for name in ("step-99999999", "step-100000000"):
        ckpt.save_checkpoint(tmp_path / "checkpoints" / name, model, None, {}, None)
    assert ckpt.newest_checkpoint(tmp_path).name == "step-100000000"


@pytest.mark.parametrize("killed_at", range(3))
def test_replacing_is_atomic(model, tmp_path, monkeypatch, killed_at):
    """Killed at any of the renames, and before and after: either content is there, complete."""
    folder = tmp_path / "checkpoints" / "step-00000001"
    ckpt.save_checkpoint(folder, model, None, {"epoch": 1}, None)
    rename, calls = Path.rename, []

    def killed(self, target):
        if len(calls) == killed_at:
            raise KeyboardInterrupt  # as a SIGKILL: nothing is tidied up
        calls.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with suppress(KeyboardInterrupt):
        ckpt.save_checkpoint(folder, model, None, {"epoch": 2}, None)
    monkeypatch.undo()
    found = ckpt.newest_checkpoint(tmp_path)
    assert found == folder and value_in(found) == (2 if killed_at == 2 else 1)
    ckpt.load_model(found)
    ckpt.save_checkpoint(folder, model, None, {"epoch": 3}, None)
    assert value_in(ckpt.find_checkpoint(folder)) == 3
    ckpt.remove_old(tmp_path, "step-*", 1)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("file", [ckpt.WEIGHTS, ckpt.EMA_WEIGHTS, ckpt.STATE])
def test_flipped_bytes_are_noticed(small_fit, tmp_path, file):
    small_fit(optim__epochs=1)
    run = tmp_path / "run"
    path = ckpt.newest_checkpoint(run) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file} is truncated or damaged .*checksum"):
        prepare_resume(run)
    (run / "result.json").unlink()
    with pytest.raises(CheckpointError, match=f"{file} is truncated or damaged .*checksum"):
        small_fit(optim__epochs=2)


def test_flipped_bytes_of_masks_are_noticed(model, tmp_path):
    masks = {"head.weight": torch.ones(3, 12, dtype=torch.bool)}
    folder = save_pruned(tmp_path / "one", model, masks, {})
    path = folder / FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{FILE} is truncated or damaged"):
        masks_of(folder)


def test_a_changed_description_is_noticed(model, tmp_path):
    """A flipped digit leaves JSON that is valid, and statistics that are wrong."""
    about = {"epoch": 1, "mean": [0.49139968], "classes": ["a", "b"], "metrics": {"val/accuracy": float("nan")}}
    folder = ckpt.save_checkpoint(tmp_path / "one", model, None, about, None)
    path = folder / "config.json"
    assert ckpt.load_model(folder)[1]["mean"] == [0.49139968]
    again = ckpt.save_checkpoint(tmp_path / "two", model, None, ckpt.read_description(folder), None)
    assert ckpt.read_description(again)["mean"] == [0.49139968], "a description that is written again has its own"
    path.write_text(path.read_text().replace("0.49139968", "0.49839968"))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged or was changed \(its checksum"):
        ckpt.load_model(folder)


def test_version_1_has_no_checksums_and_is_read(model, tmp_path):
    folder = ckpt.save_checkpoint(tmp_path / "one", model, None, {"epoch": 1}, None)
    tree = json.loads((folder / "config.json").read_text())
    assert tree.pop("format") == FORMAT and set(tree.pop("checksums")) == {"model.safetensors"}
    del tree["checksum"]
    (folder / "config.json").write_text(json.dumps(tree))
    assert ckpt.load_model(folder)[1]["epoch"] == 1
    (folder / "config.json").write_text(json.dumps({**tree, "format": 99}))
    with pytest.raises(CheckpointError, match=r"config.json has format 99, of a newer version"):
        ckpt.load_model(folder)


def test_a_weight_that_is_not_finite_is_refused_by_name(model, tmp_path):
    folder = ckpt.save_checkpoint(tmp_path / "one", model, None, {}, None)
    tensors = load_file(folder / "model.safetensors")
    tensors["blocks.1.ssm.in_proj.weight"][0, 0] = float("nan")
    tree = json.loads((folder / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors")
    del tree["checksums"], tree["checksum"]
    (folder / "config.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=r"1 of \d+ values of blocks.1.ssm.in_proj.weight are NaN or infinite"):
        ckpt.load_model(folder)


def test_links_are_not_followed(model, tmp_path):
    other = tmp_path / "other"
    ckpt.save_checkpoint(other / "checkpoints" / "step-00000001", model, None, {"epoch": 1}, None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(other / "checkpoints")
    with pytest.raises(CheckpointError, match=r"checkpoints is a link, which is not followed"):
        ckpt.newest_checkpoint(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"checkpoints is a link, which is not followed"):
        ckpt.save_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000001", model, None, {"epoch": 2}, None)
    assert value_in(ckpt.newest_checkpoint(other)) == 1
    inside = tmp_path / "inside" / "checkpoints"
    inside.mkdir(parents=True)
    (inside / "best-00001").symlink_to(other / "checkpoints" / "step-00000001")
    (inside / ".best-00001.partial").symlink_to(other / "checkpoints" / "step-00000001")
    with pytest.raises(CheckpointError, match=r"best-00001 is a link"):
        ckpt.save_checkpoint(inside / "best-00001", model, None, {"epoch": 2}, None)
    assert value_in(ckpt.newest_checkpoint(other)) == 1


def test_whoever_may_read_the_folder_may_read_the_weights(model, tmp_path):
    before = os.umask(0o022)
    try:
        folder = ckpt.save_checkpoint(tmp_path / "one", model, model, {}, {"optimizer": {}})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(f.stat().st_mode) for f in folder.iterdir()} == {0o644} and len(os.listdir(folder)) == 4


def test_a_second_failure_does_not_hide_the_first(model, tmp_path, monkeypatch):
    def full(*_a, **_k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mamba.runs.checkpoint.save", full)
    monkeypatch.setattr("shutil.disk_usage", full)
    with pytest.raises(CheckpointError, match=r"could not be written: No space left on device; earlier .* untouched"):
        ckpt.save_checkpoint(tmp_path / "one", model, None, {}, None)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"architecture": 1}', '{"architecture": {"blocks": [1]}}'])
def test_a_damaged_description_is_one_sentence(model, tmp_path, content):
    folder = ckpt.save_checkpoint(tmp_path / "one", model, None, {}, None)
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config.json (is damaged|does not describe)") as raised:
        ckpt.load_model(folder)
    assert len(str(raised.value).splitlines()) == 1


def test_metrics_that_are_not_finite_are_null_on_disk_and_nan_again(model, tmp_path):
    folder = ckpt.save_checkpoint(tmp_path / "one", model, None, {"metrics": {"train/loss": float("nan")}}, None)
    assert "NaN" not in (folder / "config.json").read_text()
    loss = ckpt.read_description(folder)["metrics"]["train/loss"]
    assert loss != loss


def test_a_folder_that_only_holds_runs_names_what_may_be_meant(model, tmp_path):
    series, trial = tmp_path / "exp" / "series", tmp_path / "exp" / "measured"
    trial.mkdir(parents=True)
    (trial / "trial.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"in it$"):
        ckpt.find_checkpoint(tmp_path / "exp")
    with pytest.raises(CheckpointError, match="it is a trial that keeps no model: .*cut.finetune_epochs"):
        ckpt.find_checkpoint(trial)
    ckpt.save_checkpoint(series / "round-01" / "pruned", model, None, {}, None)
    with pytest.raises(CheckpointError, match=r"did you mean .*series/round-01/pruned\?"):
        ckpt.find_checkpoint(series)
    with pytest.raises(CheckpointError, match=r"1 of its folders hold models: did you mean .*exp/series\?"):
        ckpt.find_checkpoint(tmp_path / "exp")
    ckpt.save_checkpoint(tmp_path / "exp" / "run" / "checkpoints" / "best-00001", model, None, {}, None)
    os.utime(series, (0, 0))
    with pytest.raises(CheckpointError, match=r"2 of its folders hold models: did you mean .*exp/run\?"):
        ckpt.find_checkpoint(tmp_path / "exp")
