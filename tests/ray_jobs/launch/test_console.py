"""A plain log is never silent for long: where a run is, what it does without steps, each thing after Ctrl-C."""

from __future__ import annotations

import pytest

from mamba.runs.files import write_json
from mamba.runs.folder import PROGRESS, request_stop
from mamba.train.distributed import Process
from mamba.train.heartbeat import Heartbeat
from ray_jobs.launch import console
from ray_jobs.launch.console import QUIET_S, Display, duration


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run in a folder, its display, and a clock that moves when told to; `pass_time` returns what was said."""

    class Run:
        now = 100.0
        alive: Heartbeat
        display: Display

        def pass_time(self, seconds, steps=0, doing=None):
            if doing:
                self.alive.enter(doing)
            said = []
            self.display.console.print = lambda text, **_: said.append(text)
            for _ in range(int(seconds * 2)):
                self.now += 0.5
                self.alive.steps += steps
                self.alive._write()
                if steps:
                    position = {"epoch": 0, "epochs": 2, "step": self.alive.steps, "steps_per_epoch": 100}
                    write_json(tmp_path / PROGRESS, {**position, "loss": 1.5, "images_per_s": 640})
                self.display._watch()
                self.display._break_silence()
            return said

    made = Run()
    monkeypatch.setattr(console.time, "monotonic", lambda: made.now)
    made.display, made.alive = Display(tmp_path), Heartbeat(tmp_path, Process())
    return made


def test_what_a_run_does_before_its_first_step_is_said_and_since_when(run):
    assert run.pass_time(QUIET_S - 1, doing="reading the data") == []
    said = run.pass_time(QUIET_S * 2)
    assert said[0].startswith("reading the data, ") and said[0].endswith(" s so far") and len(said) == 2
    (said,) = run.pass_time(QUIET_S, doing="training epoch 1 of 2, its first steps")
    assert said.startswith("training epoch 1 of 2, its first steps, ")


def test_a_long_epoch_says_its_steps_and_when_the_run_will_be_over(run):
    said = run.pass_time(2 * QUIET_S, steps=1, doing="training epoch 1 of 2")
    assert len(said) == 2
    # 180 steps are left, of which two are made a second
    assert said[1] == "epoch 1/2  step 20/100  loss 1.5000  640 images/s  about 2 min left"
    run.display.say("epoch 1/2 ...")
    assert run.pass_time(QUIET_S - 1, steps=1) == [], "something was said just now"


def test_each_thing_after_ctrl_c_is_said_once(run, tmp_path):
    run.pass_time(2, steps=1, doing="training epoch 1 of 2")
    request_stop(tmp_path)
    assert run.pass_time(1, steps=1) == ["stopping: training epoch 1 of 2"]
    assert run.pass_time(1, doing="saving a checkpoint") == ["stopping: saving a checkpoint"]
    assert run.pass_time(1, doing="writing the last checkpoint") == ["stopping: writing the last checkpoint"]


@pytest.mark.parametrize("seconds, text", [(3, "3 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text
