"""Signs of life: which process a run that stands still is waiting for."""

from __future__ import annotations

import json

import pytest

from mamba.train import heartbeat
from mamba.train.distributed import Process
from mamba.train.heartbeat import FOLDER, SILENT_S, STALL_S, Heartbeat, Watch


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: Clock.now)
    return Clock


def run_of_two(folder):
    ranks = [Heartbeat(folder, Process(rank, 2)) for rank in range(2)]
    for rank in ranks:
        rank.enter("training epoch 2 of 3")
        rank._write()
    return ranks


def pass_time(clock, seconds, *alive):
    """Beat after beat."""
    for _ in range(round(seconds)):
        clock.now += 1
        for rank in alive:
            rank._write()


def test_a_process_that_waits_for_its_data_is_named_once(tmp_path, clock):
    watch, ranks = Watch(tmp_path), run_of_two(tmp_path)
    ranks[0].steps = 5
    ranks[1].steps, ranks[1].reading = 4, True
    assert watch.look() is None
    pass_time(clock, STALL_S - 2, *ranks)
    assert watch.look() is None
    pass_time(clock, 4, *ranks)
    assert watch.look() is None, "what was written since the first look begins the minute"
    pass_time(clock, STALL_S, *ranks)
    said = watch.look()
    assert (
        said is not None
        and said.endswith(" s, worker 1 of 2: training epoch 2 of 3, waiting for a batch")
        and said.startswith("no step for 6")
    )
    pass_time(clock, STALL_S, *ranks)
    assert watch.look() is None


def test_steps_end_a_standstill_and_the_next_one_is_told_again(tmp_path, clock):
    watch, ranks = Watch(tmp_path), run_of_two(tmp_path)
    watch.look()
    for step in range(3):
        pass_time(clock, STALL_S - 1, *ranks)
        ranks[0].steps = step + 1
        ranks[0]._write()
        assert watch.look() is None
    pass_time(clock, STALL_S, *ranks)
    assert watch.look() is not None
    ranks[0].steps += 1
    ranks[0]._write()
    assert watch.look() is None
    pass_time(clock, STALL_S, *ranks)
    assert watch.look() is not None


def test_a_process_that_does_not_answer_is_named(tmp_path, clock):
    """Stopped or gone: the other one, which is in the same step, is not to blame."""
    watch, ranks = Watch(tmp_path), run_of_two(tmp_path)
    watch.look()
    pass_time(clock, STALL_S - SILENT_S - 1, *ranks)
    watch.look()
    pass_time(clock, SILENT_S + 2, ranks[0])
    assert watch.look() == "no step for 61 s, worker 1 of 2: does not answer"


def test_alone_there_is_no_worker_to_name(tmp_path, clock):
    alone = Heartbeat(tmp_path, Process())
    alone.enter("validating epoch 1")
    alone._write()
    watch = Watch(tmp_path)
    assert watch.doing() is None, "what a killed run left is no sign of life"
    alone._write()
    watch.look()
    pass_time(clock, STALL_S, alone)
    assert watch.look() == "no step for 60 s, validating epoch 1"
    assert watch.doing() == "validating epoch 1"


def test_a_damaged_sign_is_not_read(tmp_path):
    watch = Watch(tmp_path)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "rank-0.json").write_text('{"steps": 1')
    (tmp_path / FOLDER / "rank-x.json").write_text("{}")
    assert watch.look() is None and watch.doing() is None


def test_a_run_says_what_it_is_doing_and_leaves_nothing(small_fit, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(Heartbeat, "enter", lambda self, phase: said.append(phase))
    small_fit(optim__epochs=2, checkpoint__every=2)
    assert said == [
        *("making the model", "training epoch 1 of 2, its first steps", "training epoch 1 of 2", "validating epoch 1"),
        *("training epoch 2 of 2", "validating epoch 2"),
        *("saving a checkpoint", "writing the last checkpoint", "testing"),
    ]
    assert not (tmp_path / "run" / FOLDER).exists()


def test_the_thread_writes_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.005)
    path = tmp_path / FOLDER / "rank-0.json"

    def wait_for(phase):
        for _ in range(2000):
            if path.exists() and json.loads(path.read_text())["doing"] == phase:
                return True
            heartbeat.time.sleep(0.002)
        return False

    with Heartbeat(tmp_path, Process()) as alive:
        assert wait_for("reading the data")
        alive.enter("testing")
        assert wait_for("testing")
    assert not path.parent.exists()


def test_a_link_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "rank-0.json").write_text("mine")
    (tmp_path / FOLDER).symlink_to(elsewhere)
    Heartbeat(tmp_path, Process())._write()
    Watch(tmp_path)
    assert (elsewhere / "rank-0.json").read_text() == "mine"
