"""Workers that serve one training after another, without a cluster; and what a group that dies leaves to do."""

from __future__ import annotations

import threading

import pytest
import torch

from mamba.errors import TrainingError
from mamba.runs import checkpoint as ckpt
from mamba.runs.folder import epochs_of, request_stop
from mamba.train.distributed import Process
from mamba.train.hooks import TrainHook
from mamba.train.trainer import Trainer, fit
from ray_jobs.launch import tasks
from ray_jobs.launch.tasks import Channel, serve_tasks
from ray_jobs.launch.workers import Workers


@pytest.fixture
def store(monkeypatch):
    """The cluster's key-value store."""
    content: dict[str, bytes] = {}
    monkeypatch.setattr(Channel, "_put", lambda self, key, value: content.update({key: value}))
    monkeypatch.setattr(Channel, "_get", lambda self, key: content.get(key))
    return content


def weights(folder):
    return ckpt.load_model(ckpt.newest_checkpoint(folder), weights="raw")[0].state_dict()


def test_a_second_run_in_the_same_process_is_as_in_a_fresh_one(small_config, small_data, tmp_path, store, monkeypatch):
    """Nothing of a run is left in its worker: random numbers, settings, weights."""
    monkeypatch.setattr("mamba.train.trainer.load_data", lambda *_: small_data)
    config = small_config(optim__epochs=1, ema__enabled=False)
    (tmp_path / "alone").mkdir()
    alone = fit(config, Process(), tmp_path / "alone", small_data)
    channel = Channel("test")
    worker = threading.Thread(target=serve_tasks, args=(channel, Process()), daemon=True)
    worker.start()
    results = []
    for number, name in enumerate(["first", "second"], start=1):
        (tmp_path / name).mkdir()
        task = {"config": config.model_dump(mode="json"), "folder": str(tmp_path / name)}
        channel.put(number, ("train", task))
        while channel.answered(number) is None:
            assert worker.is_alive()
            worker.join(0.02)
        results.append(channel.answered(number)[0])
    channel.put(3, None)
    worker.join(10)
    assert not worker.is_alive()
    for name, result in zip(["first", "second"], results, strict=True):
        assert result["metrics"]["test/loss"] == alone["metrics"]["test/loss"], name
        for key, value in weights(tmp_path / name).items():
            assert torch.equal(value, weights(tmp_path / "alone")[key]), f"{name}: {key}"


class Group:
    """In the place of a Ray Train run: what happens in each of them, attempt by attempt."""

    def __init__(self, *attempts):
        self.attempts = list(attempts)
        self.started = 0

    def __call__(self, workers):
        attempt = self.attempts[self.started]
        self.started += 1
        try:
            attempt(workers.channel)
        except BaseException as error:
            workers.outcome["error"] = error


def answers(*numbers, then=None):
    def attempt(channel):
        done = 0
        for number in numbers:
            done, task = channel.after(min(done, number - 1))
            assert task is not None and done == number
            channel.answer(number, {"status": "finished", "number": number})
        if then is not None:
            channel.after(done)
            raise then

    return attempt


@pytest.fixture
def group(monkeypatch, store):
    def use(*attempts):
        found = Group(*attempts)
        monkeypatch.setattr(Workers, "_run", lambda self: found(self))
        return found

    return use


def test_one_group_trains_a_series(group, small_config, tmp_path):
    said = []
    started = group(answers(1, 2, 3))
    with Workers(2, False, 1, tmp_path) as workers:
        results = [workers.train(small_config(), tmp_path, said.append) for _ in range(3)]
    assert [r["number"] for r in results] == [1, 2, 3] and started.started == 1


def test_a_group_that_fails_after_an_answer_is_started_again_for_the_next_task(group, small_config, tmp_path):
    """Tries are a task's own: those of the one before do not count."""
    started = group(answers(1, then=RuntimeError("died")), answers(2))
    with Workers(1, False, 1, tmp_path) as workers:
        assert workers.train(small_config(), tmp_path, print)["number"] == 1
        assert workers.train(small_config(), tmp_path, print)["number"] == 2
    assert started.started == 2


def test_a_group_that_fails_before_any_answer_ends_the_run(group, small_config, tmp_path):
    group(answers(1, then=RuntimeError("first")), answers(then=ValueError("what counts")))
    with Workers(1, False, 1, tmp_path) as workers:
        workers.train(small_config(), tmp_path, print)
        with pytest.raises(TrainingError, match="ValueError: what counts|what counts"):
            workers.train(small_config(), tmp_path, print)
    assert "what counts" in (tmp_path / "error.log").read_text()


def test_a_restarted_group_takes_the_task_without_an_answer(store, monkeypatch):
    """And skips one that was answered while the group died."""
    done = []
    monkeypatch.setitem(tasks.KINDS, "note", lambda process, needs: done.append(needs["n"]))
    channel = Channel("test")
    channel.put(4, ("note", {"n": 4}))
    channel.answer(4, "there")
    ended = threading.Thread(target=serve_tasks, args=(channel, Process()), daemon=True)
    ended.start()
    ended.join(0.2)
    assert done == [] and ended.is_alive()
    channel.put(5, ("note", {"n": 5}))
    while channel.answered(5) is None:
        ended.join(0.02)
    channel.put(6, None)
    ended.join(5)
    assert done == [5] and not ended.is_alive()


class RayTrain:
    """In the place of a TorchTrainer: what each attempt raises starts the next, as often as its config allows."""

    attempts = 0

    def __init__(self, serve, train_loop_config, scaling_config, run_config):
        self.channel = Channel(train_loop_config["channel"])
        self.failures = run_config.failure_config.max_failures

    def fit(self):
        for left in reversed(range(1 + self.failures)):
            RayTrain.attempts += 1
            try:
                serve_tasks(self.channel, Process())
                return
            except RuntimeError:
                if not left:
                    raise


@pytest.mark.parametrize("failures", [0, 1])
def test_a_worker_that_dies_in_mid_run_starts_again_from_the_last_checkpoint(
    failures, small_config, small_data, tmp_path, store, monkeypatch
):
    """Bit for bit, no epoch twice, and as often as the config says."""
    config, died = small_config(), []
    (tmp_path / "whole").mkdir()
    fit(config, Process(), tmp_path / "whole", small_data)

    def dying(config, process, folder, hooks=()):
        hook = TrainHook()
        hook.begin_epoch = lambda epoch, epochs: die() if epoch == 2 and not died else None
        return fit(config, process, folder, small_data, [*hooks, hook])

    def die():
        died.append(1)
        raise RuntimeError("killed")

    monkeypatch.setattr(tasks, "fit", dying)
    monkeypatch.setattr("ray_jobs.launch.lean.trainer_class", lambda private: RayTrain)
    monkeypatch.setattr(RayTrain, "attempts", 0)
    folder = tmp_path / "runs" / "small" / "one"
    folder.mkdir(parents=True)
    with Workers(1, False, 1, folder / ".ray", max_failures=failures) as workers:
        if not failures:
            with pytest.raises(TrainingError, match="killed"):
                workers.train(config, folder, print)
            assert [e["epoch"] for e in epochs_of(folder)] == [1, 2] and RayTrain.attempts == 1
            return
        assert workers.train(config, folder, print)["status"] == "finished"
        workers.channel.put(workers.number + 1, None)
    assert RayTrain.attempts == 2 and [e["epoch"] for e in epochs_of(folder)] == [1, 2, 3]
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(value, whole[key]) for key, value in weights(folder).items())


def test_a_machine_that_is_about_to_go_away_costs_no_step(small_config, small_data, tmp_path, monkeypatch):
    """The run saves at once, in mid-epoch, and ends its worker; what comes next goes on there, bit for bit."""
    monkeypatch.setattr("mamba.train.monitor.LOG_EVERY_S", 0)
    config = small_config()
    (tmp_path / "whole").mkdir()
    fit(config, Process(), tmp_path / "whole", small_data)
    taken, step = [], Trainer.train_step

    def counted(self, micro_batches):
        taken.append(self.global_step)
        return step(self, micro_batches)

    class Leaving(Process):
        def leaving(self):
            return len(taken) >= 6

    monkeypatch.setattr(Trainer, "train_step", counted)
    monkeypatch.setattr("mamba.train.trainer.load_data", lambda *_: small_data)
    folder = tmp_path / "one"
    folder.mkdir()
    task = {"config": config.model_dump(mode="json"), "folder": str(folder)}
    with pytest.raises(tasks.Drained, match="saved in epoch 2, after 2 of its steps"):
        tasks.train_task(Leaving(), task)
    assert "about to go away" in (folder / "train.log").read_text()
    assert tasks.train_task(Process(), task)["status"] == "finished"
    assert taken == list(range(12)), "a step was taken twice, or left out"
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(value, whole[key]) for key, value in weights(folder).items())
    (tmp_path / "asked").mkdir()
    request_stop(tmp_path / "asked")
    assert tasks.train_task(Leaving(), {**task, "folder": str(tmp_path / "asked")})["status"] == "interrupted"


def test_errors_of_all_ranks_are_a_sentence(group, small_config, tmp_path):
    def attempt(channel):
        channel.after(0)
        channel.answer(1, {"error": "the loss is not finite"})

    group(attempt)
    with Workers(2, False, 1, tmp_path) as workers, pytest.raises(TrainingError, match="the loss is not finite"):
        workers.train(small_config(), tmp_path, print)
