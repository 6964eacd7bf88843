"""A node that is lost: the run goes on with the workers that are left, and its losses are those of one worker."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mamba.config.cli import parse_train_args
from mamba.config.schema import RunConfig
from mamba.errors import ConfigError
from ray_jobs.launch.elastic import elastic_trainer, possible_counts
from ray_jobs.train import main
from ray_jobs.tune import main as tune

ROOT = Path(__file__).parent.parent.parent
FAST = [
    *("--model.d-model", "12", "--model.depth", "2", "--model.d-state", "4", "--data.batch-size", "64"),
    *("--optim.warmup-epochs", "1", "--optim.epochs", "12", "--model.drop-path", "0", "--trial", "one"),
]


@pytest.mark.parametrize(
    "batch, least, most, counts",
    [(48, None, 4, (4,)), (48, 1, 8, (1, 2, 3, 4, 6, 8)), (64, 2, 8, (2, 4, 8)), (64, 2, 2, (2,))],
)
def test_only_numbers_that_divide_the_batch_count(small_config, batch, least, most, counts):
    config = small_config(data__batch_size=batch, scaling__min_workers=least)
    assert possible_counts(config, most, gpu=False) == counts


@pytest.mark.parametrize(
    "least, most, said",
    [(3, 2, "min_workers 3 is above the 2 workers"), (3, 4, "min_workers 3 cannot be: data.batch_size 64 is not"),
     (1, 3, "data.batch_size 64 is not divisible")],
)  # fmt: skip
def test_other_ends_of_the_range_are_refused(small_config, least, most, said):
    with pytest.raises(ConfigError, match=said):
        possible_counts(small_config(data__batch_size=64, scaling__min_workers=least), most, gpu=False)


@pytest.mark.parametrize("given", ["1,8", " 1, 8", "[1, 8]", [1, 8], (1, 8)])
def test_a_list_is_the_least_and_the_most(given, tmp_path):
    config = RunConfig().with_values({"scaling.num_workers": given})
    assert (config.scaling.min_workers, config.scaling.num_workers) == (1, 8)
    assert RunConfig(scaling={"num_workers": given}).scaling == config.scaling
    narrower = config.with_values({"scaling.num_workers": [2, 4]})
    assert (narrower.scaling.min_workers, narrower.scaling.num_workers) == (2, 4)
    assert config.with_values({"scaling.num_workers": 4}).scaling.min_workers == 1
    (tmp_path / "c.yaml").write_text(f"scaling:\n  num_workers: {given if isinstance(given, str) else list(given)}\n")
    read = parse_train_args(["--config", str(tmp_path / "c.yaml")]).config
    assert read.scaling == config.scaling == RunConfig.from_yaml(tmp_path / "c.yaml").scaling
    assert "num_workers: 8\n  min_workers: 1\n" in config.to_yaml()


@pytest.mark.parametrize(
    "values, said",
    [({"num_workers": [1, 8], "min_workers": 2}, "has its least in its list, and scaling.min_workers is given"),
     ({"num_workers": [8, 1]}, "scaling.num_workers [8, 1]: valid is a whole number, or the least and the most"),
     ({"num_workers": "0,8"}, "both at least 1"), ({"num_workers": [1, 2, 3]}, "the least and the most"),
     ({"num_workers": "1,x"}, "scaling.num_workers 1,x: valid"), ({"num_workers": [1.5, 2]}, "scaling.num_workers"),
     ({"num_workers": [1, 5000]}, "scaling.num_workers: should be less than or equal to 4096")],
)  # fmt: skip
def test_lists_that_cannot_be(values, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        RunConfig().with_values({f"scaling.{key}": value for key, value in values.items()})
    with pytest.raises(ConfigError, match=re.escape(said)):
        RunConfig(scaling=values)


def test_a_range_that_cannot_be_is_refused_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ray_jobs.launch.ahead.plausible", lambda config: False)
    words = [*FAST, "--scaling.num-workers", "2", "--out", str(tmp_path / "runs")]
    assert main([*words, "--scaling.min-workers", "3"]) == 2
    assert "scaling.min_workers 3 is above the 2 workers" in capsys.readouterr().err
    assert tune(["--space", "quickstart", "--scaling.min-workers", "1", "--out", str(tmp_path / "runs")]) == 2
    assert "no effect in a sweep" in capsys.readouterr().err
    assert tune(["--space", "quickstart", "--scaling.num-workers", "1,2", "--out", str(tmp_path / "runs")]) == 2
    assert "no effect in a sweep" in capsys.readouterr().err
    assert main([*words[:-4], "--scaling.num-workers", "3,4", "--out", str(tmp_path / "runs")]) == 2
    assert "min_workers 3 cannot be: data.batch_size 64 is not divisible by workers" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_policies_take_the_largest_number_there_is_room_for_and_drains_for_no_failures(monkeypatch):
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import WorkerGroupError

    from ray_jobs.launch.tasks import Drained

    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "5")

    taken = {}

    class Asked(elastic_trainer((1, 2, 4))):
        def __init__(self):
            self.scaling_config = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 2})
            self.run_config = RunConfig(failure_config=FailureConfig(max_failures=0))

    base = Asked.__mro__[2]
    original = base._initialize_and_run_controller
    base._initialize_and_run_controller = lambda self, **needs: taken.update(needs)
    try:
        Asked()._initialize_and_run_controller(scaling_policy=None)
    finally:
        base._initialize_and_run_controller = original
    room = lambda *cpus: {str(i): {"CPU": c} for i, c in enumerate(cpus)}  # noqa: E731
    monkeypatch.setattr("ray_jobs.launch.elastic._draining", lambda: {"1"} if len(drained) else set())
    drained = []
    count = taken["scaling_policy"]._count_possible_workers
    assert [count(room(*cpus)) for cpus in [(8,), (4, 2), (2, 2), (3,), (1, 1)]] == [4, 2, 2, 1, 0]
    drained.append("1")
    assert [count(room(*cpus)) for cpus in [(8,), (4, 2), (2, 2)]] == [4, 2, 1], "room on a node that goes away"
    decide = taken["failure_policy"].make_decision
    drain = WorkerGroupError("saved", {0: Drained("saved"), 1: RuntimeError("its neighbour ended")})
    assert [decide(drain).name for _ in range(3)] == ["RETRY"] * 3, "a drain counted as a failure"
    assert decide(WorkerGroupError("died", {0: RuntimeError("died")})).name == "RAISE"
    assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "1"


def drain(address, node):
    """The notice that a cloud gives of a spot machine; it goes away a minute later."""
    ray = str(Path(sys.executable).parent / "ray")
    words = ["--address", address, "--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    words += ["--reason-message", "its time is up", "--deadline-remaining-seconds", "60"]
    done = subprocess.run([ray, "drain-node", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["killed", "drained"])
def test_two_workers_go_on_as_one_where_a_node_is_lost(how, tmp_path, monkeypatch):
    """A node that is drained costs no step, and none of the failures that are allowed."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")  # of a busy machine
    assert main([*FAST, "--scaling.num-workers", "0", "--out", str(tmp_path / "alone")]) == 0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        words = ["--scaling.num-workers", "1,2", "--out", str(tmp_path / "two")]
        words += ["--scaling.max-failures", "0"] if how == "drained" else []
        log = (tmp_path / "log").open("w")
        driver = subprocess.Popen(
            [sys.executable, str(ROOT / "ray_jobs" / "train.py"), *FAST, *words],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            folder = tmp_path / "two" / "quickstart" / "one"
            while len(epochs(folder)) < 2:
                assert driver.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.02)
            before = len(epochs(folder))
            if how == "drained":
                drain(cluster.address, lost)
            else:
                cluster.remove_node(lost, allow_graceful=False)
            assert driver.wait(600) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            driver.kill()
            driver.wait()
    finally:
        cluster.shutdown()
    print((tmp_path / "log").read_text())
    alone, found = epochs(tmp_path / "alone" / "quickstart" / "one"), epochs(folder)
    assert before < 12, "it was over before the node was lost"
    assert ("a machine of this run is about to go away: saved in epoch" in (folder / "train.log").read_text()) == (
        how == "drained"
    )
    assert [e["epoch"] for e in found] == list(range(1, 13))
    result = json.loads((folder / "result.json").read_text())
    assert result["world_size"] == 1, "it ended with two workers"
    for one, two in zip(alone, found, strict=True):
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=2e-3)
        assert two["val/loss"] == pytest.approx(one["val/loss"], rel=5e-3)


def epochs(folder):
    try:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (FileNotFoundError, ValueError):
        return []
