"""Sweeps killed, stopped and continued; workers and nodes that die: minutes each, and what they left is compared with
what it has to be."""

from __future__ import annotations

import csv
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import optuna
import pytest
import torch
import yaml

from mamba.runs.hparams import HPARAM_METRICS
from ray_jobs.ablate import main as ablate
from ray_jobs.compare import main as compare
from ray_jobs.sweep import experiment, results
from ray_jobs.sweep.results import read_trial
from ray_jobs.sweep.run import compared
from ray_jobs.sweep.shared import Shared
from ray_jobs.sweep.trial import run_trial
from tests.runs.test_tracking import hparams_table, shown_status

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[3]
FAST = [
    *("--model.d-model", "12", "--model.depth", "2", "--model.d-state", "4", "--data.batch-size", "128"),
    *("--optim.warmup-epochs", "1", "--optim.epochs", "3"),
]


@pytest.fixture(autouse=True)
def _a_cluster_of_its_own(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")


def start(script, *words):
    return subprocess.Popen(
        [sys.executable, f"ray_jobs/{script}.py", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def test_an_ablation_killed_and_continued(trained_on_digits, tmp_path, capsys):
    """SIGKILL for the driver in the middle; --resume runs what is left, and nothing twice; then the outcome is read."""
    driver = start("ablate", "--checkpoint", str(trained_on_digits), "--out", str(tmp_path))
    folder = tmp_path / "ablation"
    ends = time.monotonic() + 400
    while len(list(folder.glob("*/trial.json"))) < 5:
        assert time.monotonic() < ends and driver.poll() is None
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    time.sleep(3)  # its actors end
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("*/trial.json")}
    assert 5 <= len(stamps) < 33
    done = start("ablate", "--resume", str(folder))
    out, _ = done.communicate(timeout=600)
    assert done.returncode == 0, out
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items()), "a finished trial ran again"
    with (folder / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len({r["trial"] for r in table}) == 28 + 2 + 3
    assert all(r["status"] == "finished" for r in table)
    assert [r["trial"] for r in table if r["bench/images_per_s"]] == [
        r["trial"] for r in table if "joint" in r["trial"]
    ]
    assert "Traceback" not in out and "prune" in out and f"report: {folder}/report/index.html" in out
    assert {p.name for p in (folder / "report").glob("*.png")} >= {"components.png", "layers.png", "joint.png"}
    columns, groups = hparams_table(tmp_path)
    assert {m.name.tag for m in columns.metric_infos} == set(HPARAM_METRICS), "Tune's own files took the tab over"
    assert [g.hparams["status"].string_value for g in groups] == ["finished"] * len(table)
    assert {h.name for h in columns.hparam_infos[:3]} == {"cut.conv1d", "cut.layer", "cut.linear_B_C"}
    page = (folder / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64") >= 3 and "ray_jobs/ablate.py" in page
    assert ablate(["--checkpoint", str(trained_on_digits), "--out", str(tmp_path)]) == 2
    assert "holds an experiment already" in capsys.readouterr().err
    assert compare([str(folder), "--csv", str(tmp_path / "all.csv")]) == 0
    assert "ablation/components-mlp-0.3," in (tmp_path / "all.csv").read_text()


def test_a_search_stopped_and_continued(tmp_path):
    """SIGTERM, as `ray job stop` sends it: an orderly end with results so far; then the rest, with the same study.
    Learning rates below optim.min_lr cannot be, which costs those trials alone."""
    words = [*FAST[:8], "--space", "quickstart", "--trials", "5", "--out", str(tmp_path), "--optim.min-lr", "2e-3"]
    driver = start("tune", *words)
    folder = tmp_path / "search"
    ends = time.monotonic() + 400
    while not list(folder.glob("trial-*/trial.json")):
        assert time.monotonic() < ends and driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130 and f"--resume {folder}" in out, out
    assert (folder / "results.csv").exists()
    done = start("tune", "--resume", str(folder))
    out, _ = done.communicate(timeout=600)
    assert done.returncode == 1 and "Traceback" not in out, out
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'study.db'}")
    states = {"COMPLETE": "finished", "PRUNED": "stopped early", "FAIL": "failed"}
    assert len(study.trials) == 5 and {"COMPLETE", "FAIL"} <= {t.state.name for t in study.trials} <= set(states)
    for t in study.trials:
        result = json.loads((folder / f"trial-{t.number:04d}" / "trial.json").read_text())
        assert result["values"]["optim.lr"] == pytest.approx(t.params["optim.lr"])
        assert result["status"] == states[t.state.name]
        assert (result["status"] == "failed") == (t.params["optim.lr"] < 2e-3)
        assert shown_status(folder / f"trial-{t.number:04d}") == result["status"]
    assert torch.tensor(study.best_value).isfinite()


def test_a_trial_trains_with_two_workers_on_all_cpus_there_are(tmp_path):
    """Nested in a trial that takes none of them; how many run at once: the test of resources above."""
    words = [*FAST, "--space", "quickstart", "--trials", "1", "--out", str(tmp_path)]
    workers = ["--scaling.num-workers", "2", "--scaling.cpus-per-worker", "1"]
    done = start("tune", *words, *workers)
    out, _ = done.communicate(timeout=600)
    assert done.returncode == 0, out
    results = [json.loads(p.read_text()) for p in sorted((tmp_path / "search").glob("trial-*/trial.json"))]
    assert len(results) == 1
    runs = [json.loads(p.read_text()) for p in (tmp_path / "search").glob("trial-*/result.json")]
    assert all(r["world_size"] == 2 for r in runs) and len(runs) == sum(r["status"] == "finished" for r in results)


@pytest.fixture
def two_nodes(tmp_path):
    """A cluster of two nodes with a CPU each, on this machine; yields (environment, how to kill the second node)."""
    scratch = Path("/tmp") / f"forge-{os.getpid()}"  # socket paths must be short
    ray = str(Path(sys.executable).parent / "ray")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"RAY_health_check_initial_delay_ms": "0", "RAY_health_check_period_ms": "300"}  # notice a death soon
    env |= {"RAY_health_check_failure_threshold": "3", "OMP_NUM_THREADS": "1"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # nodes and driver have to share one
    address = f"127.0.0.1:{free_port()}"

    def node(*words):
        words = [*words, "--num-cpus=1", "--block", f"--dashboard-agent-listen-port={free_port()}"]
        process = subprocess.Popen([ray, "start", *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, start_new_session=True)  # fmt: skip
        nodes.append(process)
        assert any("Ray runtime started" in line for line in process.stdout), "the node did not start"

    def kill(process):
        listing = subprocess.run(["ps", "-s", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
        for pid in listing.split():  # raylet, agents and workers share the terminal session that it was started in
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        process.wait(30)

    nodes = []
    try:
        port = address.partition(":")[2]
        node("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={scratch}")
        node(f"--address={address}")
        yield {**env, "RAY_ADDRESS": address}, lambda: kill(nodes[1])
    finally:
        for process in reversed(nodes):
            if process.poll() is None:
                kill(process)
        shutil.rmtree(scratch, ignore_errors=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_node_that_dies_costs_only_the_trial_on_it(two_nodes, tmp_path, monkeypatch):
    """Two training trials at once, one a node; the second node goes; its trial alone goes on, on the first node."""
    env, kill_second = two_nodes
    space = {"question": "?", "cost": "2 trials", "kind": "train", "set": {"optim.epochs": 16, "data.batch_size": 64},
             "grids": [{"seed": [0, 1]}]}  # fmt: skip
    (tmp_path / "seeds.yaml").write_text(yaml.safe_dump(space))
    for name in env:
        monkeypatch.setenv(name, env[name])
    driver = start("tune", *FAST[:6], "--space", str(tmp_path / "seeds.yaml"), "--out", str(tmp_path))
    folder = tmp_path / "search"

    def epochs(name):
        path = folder / name / "metrics.jsonl"
        return [json.loads(line)["epoch"] for line in path.read_text().splitlines()] if path.exists() else []

    ends = time.monotonic() + 400
    while min(len(epochs("seed-0")), len(epochs("seed-1"))) < 2:
        assert time.monotonic() < ends and driver.poll() is None
        time.sleep(0.02)
    kill_second()
    assert not list(folder.glob("*/trial.json")), "a trial was over before the node died"
    out, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, out
    with (folder / "results.csv").open() as file:
        assert [(r["trial"], r["status"]) for r in csv.DictReader(file)] == [
            (f"seed-{i}", "finished") for i in range(2)
        ]
    assert all(epochs(f"seed-{i}") == list(range(1, 17)) for i in range(2)), "epochs were lost or counted twice"
    starts = [len(list((folder / f"seed-{i}").glob("events.out.tfevents.[1-9]*"))) for i in range(2)]
    assert sorted(starts) == [1, 2], "a trial on the living node started again"


def wait_for(condition, driver, seconds=500):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends and driver.poll() is None, driver.stdout.read()
        time.sleep(0.02)


def epochs_in(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


SAME = ("val/loss", "val/best_accuracy", "test/accuracy", "train/loss", "model/macs")


@pytest.mark.parametrize("kind", ["grid", "search"])
def test_training_trials_killed_and_continued_are_what_they_had_been(kind, tmp_path):
    """SIGKILL in the middle of trials, in a later one again; each trial's values are those that it has when it is run
    in one go, in this process."""
    space = {"question": "?", "cost": "4 trials", "kind": "train", "set": {"optim.epochs": 6}}
    if kind == "grid":
        space["grids"] = [{"optim.lr": [1e-3, 3e-3], "data.batch_size": [64, 128]}]
    else:
        lr = {"low": 1e-3, "high": 1e-2, "log": True}
        space |= {"search": {"optim.lr": lr}, "objectives": {"val/loss": "min"}, "trials": 4}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    words = [*FAST[:8], "--space", str(tmp_path / "space.yaml"), "--out", str(tmp_path), "--name", "killed"]
    folder = tmp_path / "killed"
    for at in (1, 3):
        driver = start("tune", *(words if at == 1 else ["--resume", str(folder)]))
        wait_for(
            lambda at=at: len([f for f in folder.glob("*/metrics.jsonl") if epochs_in(f.parent) >= 3]) >= at, driver
        )
        os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate()
    done = start("tune", "--resume", str(folder))
    out, _ = done.communicate(timeout=600)
    assert done.returncode == 0 and "Traceback" not in out, out
    own = experiment.load(folder)
    config = own.config.with_values(own.space.fixed).model_dump(mode="json")
    shared = Shared("train", tmp_path / "whole", config, None, 1, 1, False, compared(own), tuple(own.space.objectives))
    rows = results.rows(folder)
    assert len(rows) == 4
    for row in rows:
        whole = run_trial(shared, row["trial"], row["values"], lambda _: None)
        assert {k: row["metrics"][k] for k in SAME} == pytest.approx({k: whole["metrics"][k] for k in SAME}), row[
            "trial"
        ]
        assert epochs_in(folder / row["trial"]) == 6, "epochs were lost or counted twice"
    if kind == "search":
        study = optuna.load_study(study_name="killed", storage=f"sqlite:///{folder / 'study.db'}")
        assert [t.state.name for t in study.trials] == ["COMPLETE"] * 4
        assert [t.value for t in study.trials] == [row["metrics"]["val/loss"] for row in rows]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "stopped"])
def test_trials_of_several_workers_go_on(end, tmp_path):
    """Every interrupted trial failed, or was over for good."""
    space = {
        "question": "?",
        "cost": "2 trials",
        "kind": "train",
        "set": {"optim.epochs": 12},
        "grids": [{"seed": [0, 1]}],
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    words = [*FAST[:8], "--space", str(tmp_path / "space.yaml"), "--out", str(tmp_path), "--name", "two"]
    folder = tmp_path / "two"
    driver = start("tune", *words, "--scaling.num-workers", "2", "--scaling.cpus-per-worker", "1")
    wait_for(lambda: epochs_in(folder / "seed-0") >= 3, driver)
    if end == signal.SIGKILL:
        os.killpg(driver.pid, end)
        driver.communicate()
    else:
        driver.send_signal(end)
        out, _ = driver.communicate(timeout=200)
        assert driver.returncode == 130 and f"--resume {folder}" in out and "Traceback" not in out, out
    assert read_trial(folder / "seed-0") is None, "an interrupted trial was over"
    done = start("tune", "--resume", str(folder))
    out, _ = done.communicate(timeout=600)
    assert done.returncode == 0, out
    for name in ("seed-0", "seed-1"):
        result = read_trial(folder / name)
        assert result is not None and result["status"] == "finished", result
        assert [
            json.loads(line)["epoch"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()
        ] == list(range(1, 13))
        assert json.loads((folder / name / "result.json").read_text())["world_size"] == 2
