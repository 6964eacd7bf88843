"""The training loop: it learns, it resumes bit for bit, it survives what is not finite, it counts exactly."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mamba.config.versions import FORMAT
from mamba.data.images import ImageData, ImageSet
from mamba.data.views import ONE, Views
from mamba.errors import ForgeError, TrainingError
from mamba.models.model import Architecture, MambaModel
from mamba.models.ssm import BlockShape
from mamba.runs import checkpoint as ckpt
from mamba.runs.files import read_sealed
from mamba.runs.folder import epochs_of, request_stop
from mamba.train.compilation import COMPILE_FROM_IMAGES, compile_blocks, share_compile_cache, should_compile
from mamba.train.distributed import Process, local_process
from mamba.train.evaluate import Score
from mamba.train.gradients import FlatGradients
from mamba.train.hooks import TrainHook
from mamba.train.record import can_record
from mamba.train.state import finish_writing, save, write_checkpoint
from mamba.train.trainer import Trainer, fit, initial_model
from mamba.train.writer import Writer
from tests.conftest import make_small_config


def weights(folder):
    return load_file(ckpt.newest_checkpoint(folder) / "model.safetensors")


def ema_weights(folder):
    return load_file(ckpt.newest_checkpoint(folder) / "ema.safetensors")


def assert_same_run(a, b):
    for load in (weights, ema_weights):
        one, two = load(a), load(b)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (a, b)]
    timed = {"train/images_per_s", "train/data_wait_percent", "train/peak_memory_mib"}
    assert [{k: v for k, v in m.items() if k not in timed} for m in lines[0]] == [
        {k: v for k, v in m.items() if k not in timed} for m in lines[1]
    ]


def interrupt_after(monkeypatch, steps):
    """Make a run behave as if it was killed after so many optimizer steps."""
    original, taken = Trainer.train_step, [0]

    def step(self, micro_batches):
        if taken[0] == steps:
            raise KeyboardInterrupt
        taken[0] += 1
        return original(self, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", step)
    return lambda: monkeypatch.setattr(Trainer, "train_step", original)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_data):
    """Runs that nothing interrupted, each made once: settings -> its folder."""
    made = {}

    def run(**settings):
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            fit(make_small_config(made[key] / "runs", **settings), local_process(), made[key], small_data)
        return made[key]

    return run


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_it_learns_and_leaves_everything_in_its_folder(small_fit, tmp_path):
    result = small_fit(optim__epochs=4, optim__lr=2e-2)
    run = tmp_path / "run"
    assert result["metrics"]["test/accuracy"] > 90
    written = read_sealed(run / "result.json")
    assert {"format": FORMAT, **result} == {key: value for key, value in written.items() if key != "config"}
    assert written["config"]["optim.lr"] == 2e-2
    for key in ("train/loss", "train/lr", "train/images_per_s", "val/loss", "val/accuracy", "val/ema_accuracy"):
        assert key in result["metrics"]
    assert result["images"] == {"train": 72, "val": 24, "test": 30}
    assert {"seed", "seconds", "versions", "hardware", "code_revision"} <= result.keys()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    assert [f.name for f in (run / "checkpoints").glob("step-*")] == ["step-00000016"]
    assert len(list((run / "checkpoints").glob("best-*"))) == 1


def test_same_seed_same_run_other_seed_another(small_fit, whole, tmp_path):
    small_fit("run")
    assert_same_run(whole(), tmp_path / "run")
    assert not torch.equal(weights(whole())["head.weight"], weights(whole(seed=1))["head.weight"])


@pytest.mark.parametrize("killed_after", [4, 6, 8, 9])
@pytest.mark.parametrize("every", [1, 2])
def test_a_killed_run_resumes_bit_for_bit(small_fit, whole, tmp_path, monkeypatch, killed_after, every):
    """Killed at an epoch's end or inside one; mixing, drop path, erasing and EMA are all on."""
    settings = {"data__augment": "basic", "data__random_erasing": 0.3, "data__mixup": 0.8}
    reference = whole(**settings)
    settings["checkpoint__every"] = every
    restore = interrupt_after(monkeypatch, killed_after)
    with pytest.raises(KeyboardInterrupt):
        small_fit("run", **settings)
    restore()
    resumed = small_fit("run", **settings)
    assert_same_run(reference, tmp_path / "run")
    expected = result_of(reference)
    assert resumed["metrics"]["test/accuracy"] == expected["metrics"]["test/accuracy"]
    assert resumed["tested"] == expected["tested"]
    bests = [[b.name for b in (folder / "checkpoints").glob("best-*")] for folder in (reference, tmp_path / "run")]
    assert bests[0] == bests[1]


@pytest.mark.parametrize(
    "kind",
    [
        {"optim__optimizer": "muon", "optim__schedule": "wsd", "optim__decay_epochs": 1},
        {"data__augment": "randaugment_inc", "data__crop": "resized", "data__mixup": 0.8, "data__mix_off_epochs": 1},
        {"model__mixer": "bidirectional", "model__stem": "conv"},
        {"model__stem": "cct", "model__head": "attention"},
        {"model__mixer": "multiscale", "model__class_token": "double", "model__pos_embed": "both"},
        {"model__name": "vim_tiny", "model__scan_order": "snake"},
    ],
)
def test_every_kind_of_run_trains_and_resumes_bit_for_bit(small_fit, whole, tmp_path, monkeypatch, kind):
    reference = whole(**kind, optim__epochs=2)
    restore = interrupt_after(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        small_fit("run", **kind, optim__epochs=2)
    restore()
    small_fit("run", **kind, optim__epochs=2)
    assert_same_run(reference, tmp_path / "run")
    metrics = result_of(reference)["metrics"]
    assert metrics["train/skipped_steps"] == 0 and math.isfinite(metrics["val/loss"])
    rebuilt, _ = ckpt.load_model(tmp_path / "run")
    assert rebuilt.architecture.macs() == metrics["model/macs"]


@pytest.mark.parametrize("on, world_size, device", [(True, 2, "cuda"), (False, 2, "cuda"), (True, 1, "cuda"),
                                                    (True, 2, "cpu")])  # fmt: skip
def test_batch_norm_is_synchronised_over_gpus_if_asked(small_config, on, world_size, device):
    config = small_config(model__stem="conv", model__sync_batchnorm=on)
    process = Process(0, world_size, world_size, torch.device(device))
    norm = initial_model(config, Path(), 3, 8, process).patch_embed.norm2
    assert isinstance(norm, torch.nn.SyncBatchNorm) == (on and world_size == 2 and device == "cuda")


@pytest.mark.parametrize("stop_at", [1, 5, 8])
def test_a_stop_request_saves_at_that_step_and_resumes_bit_for_bit(small_fit, whole, tmp_path, monkeypatch, stop_at):
    reference = whole()
    monkeypatch.setattr("mamba.train.monitor.LOG_EVERY_S", 0.0)
    original = Trainer.train_step

    def step(self, micro_batches):
        if self.global_step == stop_at - 1:
            request_stop(self.folder)
        return original(self, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", step)
    stopped = small_fit("run")
    monkeypatch.setattr(Trainer, "train_step", original)
    if stop_at % 4:  # at an epoch's last step the epoch is finished first
        assert stopped["status"] == "interrupted"
        assert ckpt.newest_checkpoint(tmp_path / "run").name == f"step-{stop_at:08d}"
    (tmp_path / "run" / "STOP").unlink()
    small_fit("run")
    assert_same_run(reference, tmp_path / "run")


@pytest.mark.parametrize("epoch, which", [(1, 0), (1, 1), (3, 1)])
def test_a_stop_in_validation_is_seen_there_and_resumes_bit_for_bit(
    small_fit, whole, tmp_path, monkeypatch, epoch, which
):
    """It acted at the next training step only: after the whole validation, of raw and averaged weights."""
    reference = whole()
    monkeypatch.setattr("mamba.train.monitor.LOG_EVERY_S", 0.0)
    original, calls = Trainer.evaluate, []

    def evaluate(self, model, split, *rest, **named):
        if split is self.data.val and self.epoch == epoch:
            calls.append(model)
            if len(calls) == which + 1:
                request_stop(self.folder)
        return original(self, model, split, *rest, **named)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    assert small_fit("run")["status"] == "interrupted" and len(calls) == which + 1
    state = ckpt.load_training_state(ckpt.newest_checkpoint(tmp_path / "run"))
    assert (state["epoch"], state["step"], state["unvalidated"]) == (epoch, 0, True)
    monkeypatch.setattr(Trainer, "evaluate", original)
    (tmp_path / "run" / "STOP").unlink()
    small_fit("run")
    assert_same_run(reference, tmp_path / "run")


def test_accumulation_gives_the_same_result_as_the_whole_batch(small_fit, tmp_path):
    settings = {"model__drop_path": 0, "data__cutmix": 1.0, "data__augment": "basic"}
    for name, parts in (("whole", 1), ("parts", 4)):
        (tmp_path / name).mkdir()
        small_fit(name, optim__accumulate=parts, **settings)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-4, atol=2e-5)


def test_a_loss_that_is_not_finite_skips_the_step(small_config, small_data, tmp_path):
    trainer = Trainer(small_config(), local_process(), tmp_path, small_data)
    images, targets = torch.randn(16, 3, 8, 8), torch.full((16, 3), 1 / 3)
    trainer.model.train()
    trainer.train_step([(images, targets)])
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    moments = [s["exp_avg"].clone() for s in trainer.optimizer.state.values()]
    for poison in (float("nan"), float("inf")):
        trainer.train_step([(images * poison, targets)])
        assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
        after = [s["exp_avg"] for s in trainer.optimizer.state.values()]
        assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert trainer.optimizer_step.skipped.tolist() == [2, 2]
    trainer.train_step([(images, targets)])
    assert trainer.optimizer_step.skipped.tolist() == [2, 0]
    assert not torch.equal(trainer.model.head.weight, before["head.weight"])
    assert math.isfinite(trainer.epoch_metrics()["train/loss"])


def test_a_skipped_step_leaves_batch_statistics_alone(small_config, small_data, tmp_path):
    trainer = Trainer(small_config(model__stem="conv"), local_process(), tmp_path, small_data)
    images, targets = torch.randn(16, 3, 8, 8), torch.full((16, 3), 1 / 3)
    trainer.model.train()
    trainer.train_step([(images, targets)])
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train_step([(images * float("nan"), targets)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert all(bool(tensor.isfinite().all()) for tensor in trainer.ema.model.state_dict().values())
    trainer.train_step([(images, targets)])
    after = trainer.model.state_dict()
    assert not torch.equal(after["patch_embed.norm1.running_mean"], before["patch_embed.norm1.running_mean"])
    assert int(after["patch_embed.norm1.num_batches_tracked"]) == 2
    trainer.close()


def test_a_run_that_stays_non_finite_ends_with_its_last_good_checkpoint(small_fit, tmp_path, monkeypatch):
    original = Trainer.train_step

    def step(self, micro_batches):
        if self.epoch >= 1:
            micro_batches = [(images * float("nan"), targets) for images, targets in micro_batches]
        return original(self, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(TrainingError, match=r"not finite in 3 steps in a row .*last good checkpoint: .*step-00000004"):
        small_fit(optim__max_skipped=3)
    assert all(v.isfinite().all() for v in weights(tmp_path / "run").values())


def test_weights_gone_bad_do_not_replace_the_last_good_checkpoint(small_fit, tmp_path, monkeypatch):
    """Huge but finite weights, written just before an epoch ends: every later loss overflows."""
    original = Trainer.train_step

    def step(self, micro_batches):
        result = original(self, micro_batches)
        if self.global_step == 5:
            with torch.no_grad():
                self.model.head.weight.fill_(1e38)
        return result

    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(TrainingError, match=r"last good checkpoint: .*step-00000004"):
        small_fit(optim__max_skipped=5)
    assert weights(tmp_path / "run")["head.weight"].abs().max() < 10


def diverge_from(monkeypatch, step_at):
    """Let the weights be not finite from a step on, as a rate that is far too high leaves them."""
    original = Trainer.train_step

    def step(self, micro_batches):
        if self.global_step == step_at:
            with torch.no_grad():
                self.model.head.weight.fill_(float("nan"))
                if self.ema:
                    self.ema.model.head.weight.fill_(float("nan"))
        return original(self, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", step)


def test_an_epoch_without_a_finite_step_has_no_loss_and_is_never_best(small_fit, tmp_path, monkeypatch):
    """Its model has no accuracy either: an argmax over NaN counts one class as right."""
    diverge_from(monkeypatch, 4)
    result = small_fit()
    first, *others = epochs_of(tmp_path / "run")
    assert math.isfinite(first["train/loss"]) and first["val/accuracy"] > 0
    for line in others:
        for key in ("train/loss", "val/loss", "val/accuracy", "val/ema_accuracy"):
            assert line[key] is None or math.isnan(line[key]), key
    assert result["tested"]["epoch"] == 1
    best = max(first["val/accuracy"], first["val/ema_accuracy"])
    assert [line["val/best_accuracy"] for line in (first, *others)] == [best] * 3
    assert result["metrics"]["val/best_accuracy"] == best and math.isfinite(result["metrics"]["test/accuracy"])


@pytest.mark.parametrize("split", [True, False])
def test_a_run_that_only_diverges_fails_with_the_reason(small_fit, small_data, tmp_path, monkeypatch, split):
    diverge_from(monkeypatch, 2)
    data = small_data if split else replace(small_data, val=None)
    with pytest.raises(TrainingError, match=r"diverged: after 3 epochs no weights .* \(10 optimizer steps were"):
        small_fit(data=data)
    assert not (tmp_path / "run" / "result.json").exists()
    assert ckpt.best_checkpoint(tmp_path / "run") is None


def test_finite_averaged_weights_are_best_where_the_raw_ones_are_not(small_fit, monkeypatch):
    original = Trainer.evaluate

    def evaluate(self, model, split, *rest, **named):
        return Score(math.nan, math.nan) if model is self.model else original(self, model, split, *rest, **named)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    result = small_fit(optim__epochs=1)
    assert result["tested"]["weights"] == "ema" and result["metrics"]["val/best_accuracy"] > 0


def test_a_gradient_that_is_not_finite_is_told_from_a_loss(small_fit, monkeypatch):
    class Explode(TrainHook):
        def attach(self, model, *_):
            self.model = model

        def gradients(self):
            self.model.head.weight.grad.fill_(float("inf"))

    with pytest.raises(TrainingError, match="the gradient was not finite in 3 steps in a row"):
        small_fit(optim__max_skipped=3, hooks=[Explode()])


def test_the_best_accuracy_does_not_come_from_the_log(small_fit, whole, tmp_path, monkeypatch):
    """A run that lost lines of metrics.jsonl ends with the same result: what counts is in the training state."""
    expected = result_of(whole())
    restore = interrupt_after(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        small_fit()
    restore()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    resumed = small_fit()
    assert resumed["metrics"]["val/best_accuracy"] == expected["metrics"]["val/best_accuracy"]
    assert resumed["tested"] == expected["tested"]


def test_epochs_are_reported_by_number(small_config, small_data, tmp_path, monkeypatch):
    """Also by a run that was resumed: who counts reports counts too few."""
    reported = []

    class Reporting(Process):
        def report(self, metrics, checkpoint):
            reported.append((metrics["epoch"], metrics["val/best_accuracy"], checkpoint is not None))

    restore = interrupt_after(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        fit(small_config(), Reporting(), tmp_path, small_data)
    restore()
    fit(small_config(), Reporting(), tmp_path, small_data)
    assert [epoch for epoch, *_ in reported] == [1, 2, 3] and all(saved for *_, saved in reported)


def test_what_fails_in_training_is_told_by_what_it_was(small_config, small_data, tmp_path, monkeypatch):
    """A file of the data that cannot be read is no run folder that cannot be written."""
    original = Trainer.train_step

    def step(self, micro_batches):
        if self.global_step == 2:
            raise FileNotFoundError(2, "No such file or directory", "images/7.png")
        return original(self, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(FileNotFoundError, match="images/7.png"):
        fit(small_config(), local_process(), tmp_path, small_data)


@pytest.mark.parametrize("method", ["add_scalar", "add_image", "flush", "close"])
def test_events_that_cannot_be_written_end_with_one_sentence(small_fit, monkeypatch, method):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    def step(self, micro_batches):
        monkeypatch.setattr("mamba.runs.tensorboard.SummaryWriter." + method, full)
        return original(self, micro_batches)

    original = Trainer.train_step
    if method == "add_image":  # written before the first step
        monkeypatch.setattr("mamba.runs.tensorboard.SummaryWriter.add_image", full)
    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(ForgeError, match=r"run could not be written: No space left on device"):
        small_fit(optim__epochs=1)


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), r"out of GPU memory \(CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), r"out of memory \(DefaultCPU"),
        (MemoryError(), r"out of memory \(MemoryError\); lower data.batch_size"),
    ],
)
@pytest.mark.parametrize("where", ["__init__", "train_step"])
def test_out_of_memory_is_the_same_sentence_wherever(small_fit, monkeypatch, where, error, words):
    def full(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("mamba.train.trainer.Trainer." + where, full)
    with pytest.raises(TrainingError, match=words):
        small_fit()


@pytest.mark.parametrize("cpus, processes", [(1, 0), (4, 3), (64, 16)])
def test_cpus_per_worker_reach_the_loaders(small_config, small_data, tmp_path, cpus, processes):
    config = small_config(scaling__cpus_per_worker=cpus, data__augment="basic")
    trainer = Trainer(config, local_process(), tmp_path, small_data)
    assert trainer.batches.loader.num_workers == processes
    trainer.close()


def test_a_skipped_step_leaves_the_average_alone(small_config, small_data, tmp_path):
    trainer = Trainer(small_config(), local_process(), tmp_path, small_data)
    images, targets = torch.randn(16, 3, 8, 8), torch.full((16, 3), 1 / 3)
    trainer.train_step([(images, targets)])
    before = {k: v.clone() for k, v in trainer.ema.model.state_dict().items()}
    trainer.train_step([(images * float("nan"), targets)])
    assert all(torch.equal(v, before[k]) for k, v in trainer.ema.model.state_dict().items())
    assert trainer.ema.updates == 1


def test_a_changed_training_set_is_refused(small_fit, small_data, tmp_path):
    small_fit(optim__epochs=1)
    fewer = ImageSet(small_data.train.images, small_data.train.labels, small_data.train.index[:40])
    with pytest.raises(
        ForgeError, match="72 training and 24 validation images and there is now a split into 40 training"
    ):
        small_fit(data=replace(small_data, train=fewer))


def test_evaluation_counts_exactly(small_config, small_data, tmp_path):
    trainer = Trainer(small_config(eval__batch_size=7), local_process(), tmp_path, small_data)
    loss, accuracy = trainer.evaluate(trainer.model, small_data.test)
    images = small_data.normalise(torch.from_numpy(small_data.test.images))
    labels = torch.from_numpy(small_data.test.labels)
    with torch.no_grad():
        logits = trainer.model.eval()(images)
    assert accuracy == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()))
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    views_loss, _ = trainer.evaluate(trainer.model, small_data.test, Views(5, True, 1))
    assert views_loss != loss


def test_without_a_validation_split_nothing_is_selected(small_fit, small_data, tmp_path):
    data = replace(small_data, val=None)
    result = small_fit(data=data)
    assert result["tested"] == {"weights": "ema", "epoch": 3, "tta_views": 1}
    assert not list((tmp_path / "run" / "checkpoints").glob("best-*")) and "val/accuracy" not in result["metrics"]
    model, _ = ckpt.load_model(tmp_path / "run")  # the weights that were tested
    assert torch.equal(model.head.weight, ema_weights(tmp_path / "run")["head.weight"])


def test_the_test_set_is_read_once_and_never_selects(small_config, small_data, tmp_path, monkeypatch):
    seen = []
    original = Trainer.evaluate

    def evaluate(self, model, split, *rest, **named):
        seen.append("test" if split is small_data.test else "val")
        return original(self, model, split, *rest, **named)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    fit(small_config(), local_process(), tmp_path, small_data)
    assert seen.count("test") == 1 and seen[-1] == "test" and seen.count("val") == 6


def test_the_best_by_validation_is_what_is_tested(small_fit, tmp_path, monkeypatch):
    scores = iter([50.0, 40.0, 70.0, 80.0, 60.0, 20.0])  # raw and averaged, three epochs
    original = Trainer.evaluate

    def evaluate(self, model, split, *rest, **named):
        loss, accuracy = original(self, model, split, *rest, **named)
        return Score(loss, accuracy if split is self.data.test else next(scores))

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    result = small_fit()
    assert result["tested"] == {"weights": "ema", "epoch": 2, "tta_views": 1}
    model, description = ckpt.load_model(tmp_path / "run")
    assert description["epoch"] == 2
    average = load_file(ckpt.best_checkpoint(tmp_path / "run") / "ema.safetensors")
    assert torch.equal(model.state_dict()["head.weight"], average["head.weight"])


def test_only_the_best_is_kept_and_the_first_of_equals_wins(small_fit, tmp_path, monkeypatch):
    scores = iter([50.0, 50.0, 60.0, 60.0, 60.0, 60.0])
    original = Trainer.evaluate

    def evaluate(self, model, split, *rest, **named):
        loss, accuracy = original(self, model, split, *rest, **named)
        return Score(loss, accuracy if split is self.data.test else next(scores))

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    result = small_fit()
    assert result["tested"] == {"weights": "raw", "epoch": 2, "tta_views": 1}
    assert [f.name for f in (tmp_path / "run" / "checkpoints").glob("best-*")] == ["best-00002"]


def test_resuming_forgets_the_best_of_epochs_that_are_repeated(small_fit, small_config, small_data, tmp_path):
    small_fit(checkpoint__keep=3)
    run = tmp_path / "run"
    steps = sorted((run / "checkpoints").glob("step-*"))
    for folder in steps[1:]:
        shutil.rmtree(folder)
    ckpt.best_checkpoint(run).rename(run / "checkpoints" / "best-00003")
    Trainer(small_config(), local_process(), run, small_data)
    assert ckpt.best_checkpoint(run) is None


def test_the_best_accuracy_is_that_of_weights_that_are_there(small_fit, tmp_path, monkeypatch):
    """The best of a run was gone, or another run's, and its figure stayed: what was tested were other weights."""
    scores = {1: 90.0, 2: 95.0, 3: 80.0}
    original = Trainer.evaluate

    def evaluate(self, model, split, *rest, **named):
        loss, accuracy = original(self, model, split, *rest, **named)
        return Score(loss, accuracy if split is self.data.test else scores[self.epoch] - (model is not self.model))

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    small_fit("other", seed=1)
    for damage in ("gone", "another's"):
        run = tmp_path / damage
        assert small_fit(damage)["metrics"]["val/best_accuracy"] == 95.0
        shutil.rmtree(run / "checkpoints" / "best-00002")
        if damage == "another's":
            shutil.copytree(tmp_path / "other" / "checkpoints" / "best-00002", run / "checkpoints" / "best-00002")
        (run / "result.json").unlink()
        with pytest.warns(UserWarning, match="best-00002 is gone or not this run's"):
            result = small_fit(damage, optim__epochs=3)
        assert result["tested"] == {"weights": "ema", "epoch": 3, "tta_views": 1}
        assert result["metrics"]["val/best_accuracy"] == 79.0


def test_a_best_that_is_taken_away_while_the_run_goes_on(small_fit, tmp_path):
    class Thief(TrainHook):
        def end_epoch(self, epoch):
            if epoch == 2:
                for best in (tmp_path / "run" / "checkpoints").glob("best-*"):
                    shutil.rmtree(best)
            return {}

        def may_be_best(self, epoch):
            return epoch == 0

    result = small_fit(hooks=[Thief()])
    assert result["tested"] == {"weights": "ema", "epoch": 3, "tta_views": 1}
    assert result["metrics"]["val/best_accuracy"] == result["metrics"]["val/ema_accuracy"]


def test_the_last_epoch_is_always_saved(small_fit, tmp_path):
    small_fit(checkpoint__every=5)
    assert ckpt.newest_checkpoint(tmp_path / "run").name == "step-00000012"


def test_state_comes_back_whole(small_config, small_data, tmp_path):
    trainer = Trainer(small_config(), local_process(), tmp_path, small_data)
    trainer.optimizer_step.skipped += torch.tensor([5.0, 2.0])
    trainer.optimizer_step.totals += 3
    trainer.best, trainer.epoch, trainer.step = {"accuracy": 12.0, "epoch": 1, "weights": "ema"}, 1, 2
    write_checkpoint(trainer, "best-00001", None)
    save(trainer)
    finish_writing(trainer)
    again = Trainer(small_config(), local_process(), tmp_path, small_data)
    assert again.optimizer_step.skipped.tolist() == [5, 2] and again.optimizer_step.totals.tolist() == [3, 3]
    assert (again.best, again.epoch, again.step) == (trainer.best, 1, 2)


@pytest.mark.parametrize("clip", [1e-3, None])
def test_gradients_are_clipped_to_the_norm(small_config, small_data, tmp_path, monkeypatch, clip):
    trainer = Trainer(small_config(optim__grad_clip=clip), local_process(), tmp_path, small_data)
    seen = []
    monkeypatch.setattr(
        trainer.optimizer,
        "step",
        lambda *_: seen.append(torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()),
    )
    _, norm = trainer.train_step([(torch.randn(16, 3, 8, 8), torch.eye(3)[torch.arange(16) % 3])])
    assert norm > 0.01  # what is reported is the norm before clipping
    assert float(seen[0]) == pytest.approx(clip if clip else float(norm), rel=1e-3)


def test_label_smoothing_is_in_the_training_loss_and_not_in_validation(small_config, small_data, tmp_path):
    trainer = Trainer(
        small_config(optim__label_smoothing=0.3, model__drop_path=0), local_process(), tmp_path, small_data
    )
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
    logits = trainer.model(images).detach()
    loss, _ = trainer.train_step([(images, torch.eye(3)[labels])])
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("augment, always", [("basic", True), ("basic", False), ("none", True)])
def test_views_are_compared_on_the_validation_split_first(small_fit, monkeypatch, augment, always):
    """The test set is read once, with what validated better or as asked, never with views unlike those of training."""
    views_of = {"val": [], "test": []}
    original = Trainer.evaluate

    def evaluate(self, model, split, views=ONE, counts=None, stop=None):
        views_of["test" if split is self.data.test else "val"].append(views.count)
        return original(self, model, split, views, counts, stop)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    tested = small_fit(eval__tta_views=4, eval__tta_always=always, data__augment=augment)["tested"]
    assert views_of["test"] == [tested["tta_views"]] and tested["tta"]["used"] is (tested["tta_views"] == 4)
    if augment == "none":
        assert tested["tta_views"] == 1 and set(views_of["val"]) == {1}
    else:
        better = tested["tta"]["val/accuracy with views"] > tested["tta"]["val/accuracy"]
        assert views_of["val"][-2:] == [1, 4] and (tested["tta"]["used"] or not better)
        assert tested["tta_views"] == 4 or not always


def test_average_can_be_turned_off(small_fit, tmp_path):
    result = small_fit(ema__enabled=False)
    assert "val/ema_accuracy" not in result["metrics"] and result["tested"]["weights"] == "raw"
    assert not list((tmp_path / "run").rglob("ema.safetensors"))


@pytest.fixture
def compiled_frames(monkeypatch):
    """Let torch.compile run what it traced as it is; what it traced, with nothing left out."""
    frames, compile_in_place = [], torch.nn.Module.compile

    def backend(graph, _inputs):
        frames.append(graph)
        return graph.forward

    options = {"backend": backend, "fullgraph": True}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **mine: compile_in_place(self, **(mine | options)))
    return frames


def test_bf16_and_compile_learn_together(small_fit, compiled_frames):
    result = small_fit(optim__amp="bf16", optim__compile=True, optim__epochs=4, optim__lr=2e-2)
    assert result["amp"] == "bfloat16" and result["compiled"] and compiled_frames
    assert result["metrics"]["test/accuracy"] > 90


def test_compiled_run_keeps_names_and_follows_the_plain_one(small_fit, tmp_path, compiled_frames):
    for name, on in (("plain", False), ("compiled", True)):
        (tmp_path / name).mkdir()
        small_fit(name, optim__compile=on, model__drop_path=0, optim__epochs=2)
        assert bool(compiled_frames) == on
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert a.keys() == b.keys()
    torch.testing.assert_close(a["head.weight"], b["head.weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "setting, images, device, expected",
    [
        (True, 1, "cpu", True),
        (False, COMPILE_FROM_IMAGES, "cuda", False),
        ("auto", COMPILE_FROM_IMAGES, "cuda", True),
        ("auto", COMPILE_FROM_IMAGES - 1, "cuda", False),
        ("auto", COMPILE_FROM_IMAGES, "cpu", False),
    ],
)
def test_which_runs_are_compiled(setting, images, device, expected):
    assert should_compile(setting, images, torch.device(device)) is expected


@pytest.mark.parametrize("hidden, varied", [((48, 48, 48), False), ((48, 36, 48), False), ((48, 36, 24), True)])
def test_blocks_are_compiled_alike(monkeypatch, tmp_path, hidden, varied):
    monkeypatch.setenv("MAMBA_FORGE_CACHE", str(tmp_path))
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    shapes = tuple(BlockShape(24, 4, 4, width) for width in hidden)
    model = MambaModel(Architecture(8, 2, 3, 5, 12, 0.2, shapes))
    unchanged = {"force_parameter_static_shapes": True, "force_nn_module_property_static_shapes": True}
    with torch._dynamo.config.patch(unchanged), torch.fx.experimental._config.patch(use_duck_shape=True):
        compile_blocks(model)
        assert torch._dynamo.config.force_parameter_static_shapes != varied
        assert torch.fx.experimental._config.use_duck_shape != varied
    assert compiled == [(block, {"dynamic": varied}) for block in model.blocks]
    # the first block's rate is 0: it takes the others' way through the code, and still drops nothing
    assert all(block.drop_path.active for block in model.blocks) and model.blocks[0].drop_path.rate == 0
    x = torch.randn(64, 2, 2)
    assert torch.equal(model.blocks[0].drop_path.train()(x), x)
    model = MambaModel(Architecture(8, 2, 3, 5, 12, 0.0, shapes[:1] * 2))
    compile_blocks(model)
    assert not any(block.drop_path.active for block in model.blocks)


def test_the_compile_cache_is_shared_unless_the_user_has_another(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBA_FORGE_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/the/users")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    share_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/the/users"
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton") and (tmp_path / "triton").is_dir()


def test_a_run_is_as_long_as_its_epochs_and_says_whether_it_was_compiled(small_fit, monkeypatch):
    asked, compiled = [], []
    monkeypatch.setattr("mamba.train.trainer.should_compile", lambda *arguments: asked.append(arguments) or True)
    monkeypatch.setattr("mamba.train.trainer.compile_blocks", compiled.append)
    result = small_fit(optim__epochs=2)
    assert asked == [("auto", 2 * 72, torch.device("cpu"))]
    assert len(compiled) == 1 and result["compiled"] is True and result["recorded"] is False


def test_a_compiled_run_evaluates_without_its_graphs(small_fit, monkeypatch):
    stances = []
    original = torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: stances.append(stance) or original(stance))
    monkeypatch.setattr("mamba.train.trainer.compile_blocks", lambda model: None)
    small_fit(optim__compile=True, optim__epochs=1)
    assert stances == ["force_eager"] * 3  # raw and averaged weights on the validation split, then the test


@pytest.mark.parametrize(
    "asked, device, fp16, triton, recorded, warned",
    [
        ("auto", "cuda", False, True, True, False),
        (True, "cuda", False, True, True, False),
        (False, "cuda", False, True, False, False),
        ("auto", "cpu", False, True, False, False),
        ("auto", "cuda", True, True, False, False),
        ("auto", "cuda", False, False, False, False),
        (True, "cuda", True, True, False, True),
        (True, "cuda", False, False, False, True),
    ],
)
def test_which_runs_are_recorded(monkeypatch, recwarn, asked, device, fp16, triton, recorded, warned):
    monkeypatch.setattr("mamba.train.record.HAS_TRITON", triton)
    assert can_record(asked, torch.device(device), fp16) is recorded
    assert any("optim.cuda_graph" in str(w.message) for w in recwarn) == warned
    assert not can_record(asked, torch.device(device), fp16, foreign="SGD"), "it would train as AdamW"


class Doubled(Process):
    """One of two ranks of which the other has the same values, but for running averages, which are 3 larger there, and
    flags, which are `flags` larger. Sums end when they are waited for."""

    averages = 0
    flags: float = 0
    begun = 0

    def begin_sum(self, values):
        self.begun += 1

        def wait():
            larger = 3 if values.numel() == self.averages else self.flags * (values.shape == (2,))
            values.mul_(2).add_(larger)

        return SimpleNamespace(wait=wait)


def as_rank_of(trainer, process):
    """Let a trainer's step average with the other ranks of a process, by the sums that recorded steps use."""
    step = trainer.optimizer_step
    step.process = step.statistics.process = process
    step.gradients = FlatGradients(trainer.model, process)
    return step


def test_batch_statistics_are_averaged_over_ranks(small_config, small_data, tmp_path):
    def stepped(name, process):
        trainer = Trainer(small_config(model__stem="conv"), local_process(), tmp_path / name, small_data)
        trainer.model.train()
        step = trainer.optimizer_step
        if process:
            process.averages = sum(buffer.numel() for buffer in step.statistics.averaged)
            as_rank_of(trainer, process)
        step.take([(images, torch.full((16, 3), 1 / 3))])
        trainer.close()
        return [buffer.clone() for buffer in step.statistics.buffers]

    images = torch.randn(16, 3, 8, 8)
    for alone, averaged in zip(stepped("one", None), stepped("two", Doubled(world_size=2)), strict=True):
        torch.testing.assert_close(averaged, alone + 1.5 if alone.is_floating_point() else alone)


@pytest.mark.parametrize("flag", [0, 1])
def test_gradients_are_summed_during_the_last_backward(small_config, small_data, tmp_path, monkeypatch, flag):
    """As one rank of two with the same images: the update of a lone run, unless the other rank's loss is not finite."""
    monkeypatch.setattr("mamba.train.gradients.BUCKET", 1)
    images = torch.randn(2, 16, 3, 8, 8)
    micro = [(half, torch.full((16, 3), 1 / 3)) for half in images]

    def stepped(name, process):
        trainer = Trainer(small_config(model__drop_path=0.0), local_process(), tmp_path / name, small_data)
        trainer.model.train()
        step = trainer.optimizer_step
        seen = []
        if process:
            as_rank_of(trainer, process)
            loss, wait = step.loss, step.gradients.wait
            step.loss = lambda *a: seen.append(process.begun) or loss(*a)
            step.gradients.wait = lambda: seen.append(process.begun) or wait()
        before = [p.detach().clone() for p in trainer.model.parameters()]
        step.take(micro)
        trainer.close()
        return before, list(trainer.model.parameters()), seen

    process = Doubled(world_size=2)
    process.flags = flag
    before, alone, _ = stepped("one", None)
    _, together, seen = stepped("two", process)
    for start, a, b in zip(before, alone, together, strict=True):
        torch.testing.assert_close(b, start if flag else a)
    assert seen[:2] == [0, 0] and seen[2] == 1 + len(alone)  # at both losses, and before `wait`: flags and gradients


# --- errors ----------------------------------------------------------------------------------------------------------


def test_resuming_another_architecture_is_refused(small_fit, tmp_path):
    small_fit(optim__epochs=1)
    with pytest.raises(ForgeError, match=r"of another architecture: .* is \(1, 16, 12\) there and \(1, 16, 14\)"):
        small_fit(model__d_model=14)


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "training_state.pt"])
def test_a_truncated_checkpoint_is_named(small_fit, tmp_path, file):
    small_fit(optim__epochs=1)
    path = ckpt.newest_checkpoint(tmp_path / "run") / file
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ForgeError, match=f"{file} is truncated or damaged"):
        small_fit(optim__epochs=3)
    path.unlink()
    with pytest.raises(ForgeError, match=f"{file} is missing"):
        small_fit(optim__epochs=3)


def test_no_space_left_ends_with_one_sentence(small_fit, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    small_fit(optim__epochs=1)
    monkeypatch.setattr("mamba.runs.checkpoint.save", full)
    with pytest.raises(ForgeError, match=r"checkpoints/.* could not be written: .*No space left on device"):
        small_fit(optim__epochs=3)
    assert ckpt.newest_checkpoint(tmp_path / "run").name == "step-00000004"  # what was written is still there
    assert not list((tmp_path / "run" / "checkpoints").glob(".*partial"))


def test_a_broken_checkpoint_write_leaves_no_name(small_config, small_data, tmp_path, monkeypatch):
    trainer = Trainer(small_config(), local_process(), tmp_path, small_data)
    monkeypatch.setattr("mamba.runs.checkpoint.to_json", lambda *_a, **_k: (_ for _ in ()).throw(KeyboardInterrupt))
    save(trainer)
    with pytest.raises(KeyboardInterrupt):  # killed just before the rename
        finish_writing(trainer)
    assert ckpt.newest_checkpoint(tmp_path) is None
    trainer.close()
    monkeypatch.undo()
    trainer.writer = Writer()
    save(trainer)
    finish_writing(trainer)
    assert ckpt.newest_checkpoint(tmp_path) is not None


def test_a_model_is_rebuilt_from_its_folder_alone(small_fit, tmp_path):
    small_fit()
    moved = tmp_path / "elsewhere"
    shutil.copytree(ckpt.best_checkpoint(tmp_path / "run"), moved)
    shutil.rmtree(tmp_path / "run")
    model, description = ckpt.load_model(moved, weights="raw")
    assert description["classes"] == ["dark", "grey", "bright"]
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    with pytest.raises(ForgeError, match="there is no .*nowhere; give a checkpoint's folder, or that of a run"):
        ckpt.load_model(tmp_path / "nowhere")
    with pytest.raises(ForgeError, match="neither a checkpoint .* nor a run"):
        ckpt.load_model(tmp_path)
    with pytest.raises(ForgeError, match=r"training_state.pt is missing: this checkpoint can be loaded, but"):
        ckpt.load_training_state(moved)


def test_a_set_with_one_image_left_over_in_a_batch(small_config, small_data, tmp_path):
    """An odd batch: cutmix leaves its last image unmixed."""
    result = fit(
        small_config(data__batch_size=9, data__cutmix=1.0, data__mix_prob=1.0), local_process(), tmp_path, small_data
    )
    assert result["status"] == "finished" and result["metrics"]["train/skipped_steps"] == 0
    assert result["metrics"]["train/loss"] < 1.1


def test_validation_each_second_epoch_and_after_the_last(small_fit, tmp_path):
    small_fit(eval__every=2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["val/accuracy" in m for m in lines] == [False, True, True]


def test_which_classes_are_taken_for_which(small_fit, small_data, tmp_path):
    """Counted on the test set by the weights that were tested; in result.json, and drawn in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = small_fit()
    rows = np.array([line.split() for line in result["by_class"]["confusion"]], int)
    assert rows.sum(1).tolist() == [10, 10, 10]
    assert result["metrics"]["test/accuracy"] == pytest.approx(100 * np.trace(rows) / 30)
    assert "test/top5_accuracy" not in result["metrics"]  # of three classes it says nothing
    model, _ = ckpt.load_model(tmp_path / "run")
    images = small_data.normalise(torch.from_numpy(small_data.test.images))
    said = np.bincount(model(images).argmax(-1).numpy(), minlength=3)
    assert rows.sum(0).tolist() == said.tolist()
    seen = EventAccumulator(str(tmp_path / "run")).Reload()
    assert "test/confusion" in seen.Tags()["images"] and "test/classes" in seen.Tags()["images"]


def test_top5_from_twenty_classes_on(small_fit):
    many = ImageSet.whole(np.random.default_rng(0).integers(0, 255, (80, 8, 8, 3)).astype(np.uint8), np.arange(80) % 20)
    data = ImageData(many, None, many, tuple(f"class {i}" for i in range(20)), (0.5,) * 3, (0.25,) * 3)
    metrics = small_fit(data=data, optim__epochs=1, optim__warmup_epochs=0)["metrics"]
    assert metrics["test/accuracy"] <= metrics["test/top5_accuracy"] <= 100
