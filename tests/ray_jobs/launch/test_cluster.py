"""Connecting to Ray without Ray: whose cluster, what a start that fails says, what Ctrl-C does meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mamba.errors import ConfigError, TrainingError
from ray_jobs.launch import cluster
from ray_jobs.launch.cluster import Running
from ray_jobs.launch.waiting import Wait, told


@pytest.fixture
def calls(monkeypatch):
    """Ray's init and shutdown, recorded instead of done."""
    made = []
    monkeypatch.setattr("ray.init", lambda **options: made.append(options))
    monkeypatch.setattr("ray.shutdown", lambda: made.append("shutdown"))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    monkeypatch.setattr(cluster, "running_clusters", list)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return made


def test_another_users_cluster_is_left_alone_unless_it_is_named(calls, monkeypatch):
    others = [Running("10.0.0.1:6379", 54321)]
    monkeypatch.setattr(cluster, "running_clusters", lambda: others)
    said = []
    with cluster.connected(said.append) as connected:
        assert connected == cluster.Cluster(4, 1, "a local cluster")
    assert calls[0]["address"] == "local" and calls[-1] == "shutdown"
    assert "user 54321's Ray cluster at 10.0.0.1:6379 is left alone (RAY_ADDRESS=10.0.0.1:6379 joins" in said[0]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with cluster.connected(said.append) as connected:
        assert connected.where == "the running cluster at 10.0.0.1:6379 of user 54321"
    assert calls[-2]["address"] == "10.0.0.1:6379"


def test_ones_own_cluster_is_joined_and_said(calls, monkeypatch, tmp_path):
    mine = [Running("10.0.0.1:6379", os.getuid()), Running("10.0.0.1:5555", os.getuid())]  # the second: a command's own
    monkeypatch.setattr(cluster, "running_clusters", lambda: mine)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")
    said = []
    with cluster.connected(said.append) as connected:
        assert connected.where.startswith("the running cluster at 10.0.0.1:6379 of ")
    assert calls[0]["address"] == "10.0.0.1:6379" and "joining your Ray cluster at 10.0.0.1:6379" in said[0]
    (tmp_path / "ray" / "ray_current_cluster").unlink()
    with cluster.connected(said.append):
        pass
    assert calls[-2]["address"] == "local"


def test_clusters_are_found_by_their_raylets(tmp_path):
    for pid, words in (("7", ["/x/raylet", "--gcs-address=1.2.3.4:6379"]), ("8", ["/x/gcs_server"]), ("9", [""])):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes("\0".join(words).encode())
    assert cluster.running_clusters(tmp_path) == [Running("1.2.3.4:6379", os.getuid())]
    assert cluster.running_clusters(tmp_path / "nowhere") == []


@pytest.mark.parametrize("error", [Exception("The current node timed out during startup.\nmore"), SystemExit(1)])
def test_a_start_that_fails_is_one_sentence(calls, monkeypatch, error):
    def fail(**_):
        raise error

    monkeypatch.setattr("ray.init", fail)
    with (
        pytest.raises(TrainingError, match="Ray could not be started on this machine") as raised,
        cluster.connected(print),
    ):
        pass
    assert len(str(raised.value).splitlines()) == 1
    monkeypatch.setenv("RAY_ADDRESS", "10.9.9.9:1")
    monkeypatch.setattr("ray.init", lambda **_: (_ for _ in ()).throw(ConnectionError("no one there")))
    with pytest.raises(ConfigError, match="RAY_ADDRESS 10.9.9.9:1 cannot be reached"), cluster.connected(print):
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_ctrl_c_while_ray_starts_ends_in_order(calls, monkeypatch, fails):
    """Held until Ray has started, and then nothing is left; an error that it caused is not shown instead."""
    before = signal.getsignal(signal.SIGINT)

    def init(**_):
        signal.raise_signal(signal.SIGINT)
        calls.append("started")
        if fails:
            raise RuntimeError("a traceback that nobody wants to see")

    monkeypatch.setattr("ray.init", init)
    said = []
    with pytest.raises(KeyboardInterrupt), cluster.connected(said.append):
        pytest.fail("the block ran")
    assert calls == ["started", "shutdown"] and signal.getsignal(signal.SIGINT) is before
    assert any("SIGINT: ending once Ray has started" in line for line in said)


def test_a_second_ctrl_c_ends_at_once(calls, monkeypatch):
    def init(**_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        calls.append("started")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(KeyboardInterrupt), cluster.connected(print):
        pass
    assert "started" not in calls


def test_a_dead_cluster_ends_the_command_in_a_sentence():
    code = (
        "import subprocess, threading, time\n"
        "from ray_jobs.launch.cluster import _watch\n"
        "from ray_jobs.launch.ending import continued_by\n"
        "vital = [(n, subprocess.Popen(['sleep', '60'])) for n in ('gcs_server', 'raylet')]\n"
        "threading.Thread(target=_watch, args=(vital, print, threading.Event()), daemon=True).start()\n"
        "vital[0][1].kill()\n"
        "with continued_by('python ray_jobs/train.py --resume runs/a/b'):\n"
        "    time.sleep(50)\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Ray's gcs_server (process" in done.stdout and "has died" in done.stdout
    assert "continue from the last checkpoint with\n  python ray_jobs/train.py --resume runs/a/b" in done.stdout
    assert time.monotonic() - began < 40


def test_waits_are_told_of():
    said, lasts = [], [True]
    wait = Wait("the workers", lambda: lasts[0], every=0.02)
    ends = time.monotonic() + 5
    while len(said) < 2 and time.monotonic() < ends:
        wait.look(said.append)
        time.sleep(0.005)
    assert said[0].startswith("waiting for the workers, 0 s so far") and len(said) == 2
    lasts[0] = False
    wait.look(said.append)
    assert len(said) == 2
    with told("Ray to start", said.append, every=0.02):
        time.sleep(0.2)
    assert said[-1].startswith("waiting for Ray to start") and threading.active_count() < 50


def test_what_a_dying_raylet_wrote_is_not_printed(monkeypatch):
    import ray._private.worker as worker

    printed = []
    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, **_: printed.append(data["lines"]))
    cluster._without_state_dumps()
    cluster._without_state_dumps()
    worker.print_to_stdstream({"lines": ["Raylet is terminated. [state-dump] " * 99]}, ignore_prefix=False)
    worker.print_to_stdstream({"lines": ["a task failed"]}, ignore_prefix=False)
    assert printed == [["a task failed"]]


def test_a_local_cluster_has_the_cpus_that_a_scheduler_gave(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert cluster._allotted() == 2
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert cluster._allotted() is None, "Ray knows the limits of a container, the affinity does not"
