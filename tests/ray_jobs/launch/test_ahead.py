"""Ray started beside other work, without Ray."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from mamba.errors import ConfigError, ForgeError
from ray_jobs.launch import cluster
from ray_jobs.launch.ahead import begun, plausible


@pytest.fixture
def ray(monkeypatch):
    """A start of Ray that takes until it is let go; what happened, in order."""

    class Ray:
        started, happened, fails = threading.Event(), [], None

    made = Ray()

    def connect(announce):
        made.started.wait(10)
        if made.fails:
            raise made.fails
        made.happened.append(("started", threading.current_thread()))
        return "a local cluster", True

    def end():
        made.happened.append(("ended", threading.current_thread()))

    monkeypatch.setattr(cluster, "_connect", connect)
    monkeypatch.setattr(cluster, "_processes", list)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr("ray.shutdown", end)
    return made


def test_the_block_runs_while_ray_starts_and_connecting_in_it_waits(small_config, ray):
    with begun(small_config(scaling__num_workers=1), print):
        assert not ray.happened, "the block began before Ray had started"
        threading.Timer(0.05, ray.started.set).start()
        with cluster.connected(print) as found:
            assert found.private and found.cpus == 4
        assert [what for what, _ in ray.happened] == ["started"], "the connection is the block's"
    assert [what for what, _ in ray.happened] == ["started", "ended"]
    (_, begin), (_, end) = ray.happened
    assert begin is end, "processes of a local cluster die with the thread that started them"
    assert cluster.ahead is None


def test_an_error_is_said_before_ray_has_ended(small_config, ray, capsys):
    said = []

    def end_of_start():
        said.append(capsys.readouterr().err)
        ray.started.set()

    threading.Timer(0.3, end_of_start).start()
    with pytest.raises(ConfigError), begun(small_config(scaling__num_workers=1), print):
        raise ConfigError("no such data")
    assert said == ["error: no such data\n"] and [what for what, _ in ray.happened] == ["started", "ended"]


def test_a_start_that_fails_is_raised_where_it_is_waited_for(small_config, ray):
    ray.fails = ForgeError("Ray could not be started")
    ray.started.set()
    config = small_config(scaling__num_workers=1)
    with pytest.raises(ForgeError, match="could not be started"), begun(config, print), cluster.connected(print):
        pytest.fail("connected")


def test_nothing_is_started_for_what_will_be_refused(small_config, ray, tmp_path):
    fine = small_config(scaling__num_workers=1)
    assert plausible(fine)
    (tmp_path / "runs" / "there" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "there" / "one" / "config.yaml").touch()
    for values in (
        {"data.dataset": "folder", "data.root": tmp_path / "none", "data.img_size": 8},
        {"distill.teacher": tmp_path / "none"},
        {"data.batch_size": 16, "scaling.num_workers": 3},
        {"name": "there", "trial": "one"},
        {"scaling.num_workers": 0},
    ):
        with begun(fine.with_values(values), print):
            pass
    assert not ray.happened


def test_cluster_and_ahead_know_no_torch():
    """So that Ray starts while torch is imported."""
    code = "import sys, ray_jobs.launch.ahead; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
