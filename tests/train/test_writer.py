"""Checkpoints written by a thread: as the run was when they were asked for, and nothing lost at its end."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from mamba.errors import CheckpointError, ForgeError
from mamba.runs import checkpoint as ckpt
from mamba.train import state
from mamba.train.distributed import Process, local_process
from mamba.train.trainer import Trainer
from mamba.train.writer import WAITING, Copies, Writer


@pytest.fixture
def held(monkeypatch):
    """Writing waits until it is let go."""
    gate = threading.Event()
    write = ckpt.write_content

    def wait_first(*args):
        assert gate.wait(20)
        return write(*args)

    monkeypatch.setattr(ckpt, "write_content", wait_first)
    return gate


@pytest.fixture
def trainer(small_config, small_data, tmp_path):
    made = Trainer(small_config(), local_process(), tmp_path, small_data)
    made.train_epoch()
    yield made
    made.close()


def test_what_is_written_is_what_was_there_when_it_was_asked_for(trainer, tmp_path, held):
    """However far training has gone by the time that it is written."""
    weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    moments = [s["exp_avg"].clone() for s in trainer.optimizer.state.values()]
    random = torch.get_rng_state()
    folder = state.save(trainer)
    trainer.epoch, trainer.step = 1, 0
    trainer.train_epoch()
    trainer.metrics["val/accuracy"] = 12.0
    assert ckpt.newest_checkpoint(tmp_path) is None, "resume sees only what is complete"
    held.set()
    state.finish_writing(trainer)
    assert ckpt.newest_checkpoint(tmp_path) == folder
    kept = ckpt.read_tensors(folder / ckpt.WEIGHTS)
    assert kept.keys() == weights.keys() and all(torch.equal(kept[k], weights[k]) for k in weights)
    after = trainer.model.state_dict()
    assert any(not torch.equal(kept[k], after[k]) for k in kept), "training went on"
    training = ckpt.load_training_state(folder)
    found = [s["exp_avg"] for s in training["optimizer"]["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(found, moments, strict=True))
    assert training["epoch"] == 0 and torch.equal(training["rng"][0]["cpu"], random)
    assert "val/accuracy" not in ckpt.read_description(folder)["metrics"]


def test_training_does_not_wait_for_the_disk(trainer, held):
    began = time.perf_counter()
    state.save(trainer)
    trainer.epoch, trainer.step = 1, 0
    trainer.train_epoch()
    assert not held.is_set() and time.perf_counter() - began < 15
    held.set()


def test_a_run_ends_with_all_of_it_written(small_fit, tmp_path, monkeypatch):
    write = ckpt.write_content
    before = set(threading.enumerate())
    monkeypatch.setattr(ckpt, "write_content", lambda *args: (time.sleep(0.3), write(*args)))
    result = small_fit(optim__epochs=2)
    run = tmp_path / "run"
    assert ckpt.newest_checkpoint(run).name == "step-00000008" and result["tested"]["epoch"] > 0
    assert [t.name for t in set(threading.enumerate()) - before if t.name == "checkpoints"] == []
    names = sorted(f.name for f in (run / "checkpoints").iterdir())
    assert [name.partition("-")[0] for name in names] == ["best", "step"], "older ones are gone, and nothing is half"


def test_an_error_of_training_leaves_no_half_checkpoint(small_fit, small_data, tmp_path, monkeypatch):
    class Failing(Process):
        def report(self, metrics, checkpoint):
            raise RuntimeError("stopped here")

    write = ckpt.write_content
    monkeypatch.setattr(ckpt, "write_content", lambda *args: (time.sleep(0.3), write(*args)))
    monkeypatch.setattr("mamba.train.distributed.local_process", Failing)
    with pytest.raises(RuntimeError, match="stopped here"):
        small_fit()
    assert ckpt.newest_checkpoint(tmp_path / "run").name == "step-00000004"


def test_what_could_not_be_written_is_told_on_all_ranks(trainer, monkeypatch):
    """By the next checkpoint, or at the end."""

    def full(*_):
        raise CheckpointError("no space")

    monkeypatch.setattr(ckpt, "write_content", full)
    told = []
    monkeypatch.setattr(trainer.process, "broadcast", lambda value: told.append(value) or value)
    state.save(trainer)
    with pytest.raises(ForgeError, match="no space") as error:
        state.finish_writing(trainer)
    assert error.value.every_rank and told == [None, "no space"]
    with pytest.raises(ForgeError, match="no space"):
        state.write_checkpoint(trainer, "best-00001", None)


def test_after_a_failure_nothing_is_done_and_nothing_waits():
    writer, done = Writer(), []

    def fail():
        raise CheckpointError("first")

    for job in (fail, *[lambda: done.append(1)] * (WAITING + 2)):
        writer.submit(job)
    assert writer.finish() == "first" and done == []
    writer.close()
    assert Writer().finish() is None, "of a rank that writes nothing"


def test_an_error_that_is_none_of_ours_keeps_its_traceback():
    writer = Writer()
    writer.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.finish()
    writer.close()


@pytest.mark.gpu
def test_copies_of_a_gpu_are_of_the_moment_though_the_tensor_changes_at_once():
    tensor = torch.zeros(1 << 24, device="cuda")
    copies = Copies()
    tree = copies.of({"a": [tensor], "b": 3})
    copies.begun()
    for _ in range(50):
        tensor += 1
    copies.wait()
    assert tree["a"][0].is_pinned() and float(tree["a"][0].abs().max()) == 0 and tree["b"] == 3
