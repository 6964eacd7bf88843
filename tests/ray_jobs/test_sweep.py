"""Sweeps: trials without a cluster, studies that survive, and real sweeps under Tune, killed and continued."""

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
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
import yaml

from mamba.config.schema import RunConfig
from mamba.errors import ConfigError
from mamba.runs import checkpoint as ckpt
from mamba.runs.tracking import HPARAM_METRICS
from mamba.train.distributed import local_process
from mamba.train.trainer import fit
from pruning import measure as meter
from pruning import prune_multiple
from ray_jobs.ablate import main as ablate
from ray_jobs.compare import main as compare
from ray_jobs.launch.cluster import Cluster
from ray_jobs.sweep import experiment
from ray_jobs.sweep.grid import expand
from ray_jobs.sweep.run import resources
from ray_jobs.sweep.searcher import GridTrials, StudyTrials
from ray_jobs.sweep.space import load_space
from ray_jobs.sweep.study import open_study
from ray_jobs.sweep.trial import Shared, data_of, run_trial
from ray_jobs.sweep.tuner import Watcher
from ray_jobs.train import main as train
from ray_jobs.tune import main as tune
from tests.runs.test_tracking import hparams_table, shown_status

ROOT = Path(__file__).parent.parent.parent
FAST = [
    *("--model.d-model", "12", "--model.depth", "2", "--model.d-state", "4", "--data.batch-size", "128"),
    *("--optim.warmup-epochs", "1", "--optim.epochs", "3"),
]


@pytest.fixture(autouse=True)
def _a_cluster_of_its_own(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert train([*FAST, "--scaling.num-workers", "0", "--out", str(out), "--trial", "one"]) == 0
    return out / "quickstart" / "one"


def shared_of(trained, folder, kind="measure"):
    config = RunConfig.from_yaml(trained / "config.yaml")
    return Shared(kind, folder, config.model_dump(mode="json"), trained, 1, 1, False)


# --- without a cluster -----------------------------------------------------------------------------------------------


def test_a_measure_trial_is_the_prune_done_by_hand(trained, tmp_path):
    shared = shared_of(trained, tmp_path / "runs" / "exp")
    model, _ = ckpt.load_model(trained)
    data = data_of(shared, RunConfig(**shared.config).resolve())
    assert data.val is not None
    dense = meter.accuracy(model, data, data.val)
    for trial in expand(load_space("layer_sensitivity"), 2) + expand(load_space("joint_pruning"), 2):
        result = run_trial(shared, trial.name, trial.values, lambda _: None)
        rates = {k.removeprefix("cut."): v for k, v in trial.values.items() if isinstance(v, float)}
        layer = trial.values.get("cut.layer")
        layers = None if layer is None else [layer]
        by_hand = prune_multiple(model, rates, shrink="cut.structured" in trial.values, layers=layers)
        drop = dense - meter.accuracy(by_hand, data, data.val)
        assert result["metrics"]["val/drop"] == pytest.approx(drop, abs=1e-6)
        assert result["metrics"]["model/params"] == sum(p.numel() for p in by_hand.parameters())
        assert "bench/images_per_s" not in result["metrics"], "measured beside other trials"
    baseline = experiment.baseline_of(shared.folder)
    assert baseline["val/accuracy"] == pytest.approx(dense, abs=1e-6)
    assert baseline["model/params"] == sum(p.numel() for p in model.parameters())
    assert baseline["val/images"] == len(data.val)


def test_a_trial_that_is_done_is_read_not_run(trained, tmp_path):
    shared = shared_of(trained, tmp_path / "runs" / "exp")
    first = run_trial(shared, "a", {"cut.mlp": 0.5}, lambda _: None)
    assert run_trial(shared, "a", {"cut.mlp": 0.9}, lambda _: None) == json.loads(json.dumps(first))


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"cut.linear_B_C": 0.9, "cut.structured": True}, "a floor of 1"),
        ({"cut.mlp": 0.5, "cut.layer": 7}, "there is no block 7; valid: 0 to 1"),
        ({"seed": 1}, "nothing is cut"),
    ],
)
def test_a_trial_that_cannot_be_is_a_result_with_its_reason(trained, tmp_path, values, reason):
    shared = shared_of(trained, tmp_path / "runs" / "exp")
    result = run_trial(shared, "bad", values, lambda _: None)
    assert result["status"] == "failed" and reason in result["reason"]
    log = (tmp_path / "runs" / "exp" / "bad" / "trial.log").read_text()
    assert "Traceback" in log and reason in log and log.endswith("failed\n")
    assert shown_status(tmp_path / "runs" / "exp" / "bad") == "failed"


def test_a_trial_that_tune_ended_gets_a_result_and_a_status(trained, tmp_path):
    """Stopped early, its process died again and again, or done by itself: the last keeps what it left."""
    shared = shared_of(trained, tmp_path / "runs" / "exp")

    class Ended:
        def __init__(self, name, values):
            self.config = {"trial": name, "values": values}
            self.last_result = {"val/accuracy": 50.0}

        def get_error(self):
            return "Traceback\nActorDiedError: gone"

    told = {}
    watcher = Watcher(shared, GridTrials([]), told.__setitem__)
    run_trial(shared, "done", {"cut.mlp": 0.5}, lambda _: None)
    watcher.on_trial_complete(0, [], Ended("done", {"cut.mlp": 0.5}))
    watcher.on_trial_complete(0, [], Ended("stopped", {"optim.lr": 0.1}))
    watcher.on_trial_error(0, [], Ended("dead", {"optim.lr": 0.1, "optim.min_lr": 0.2}))  # not even resolvable
    states = {"done": "finished", "stopped": "stopped early", "dead": "failed"}
    assert {name: result["status"] for name, result in told.items()} == states
    assert {name: shown_status(shared.folder / name) for name in states} == states


def test_a_cut_can_be_fine_tuned(trained, tmp_path):
    shared = shared_of(trained, tmp_path / "runs" / "exp")
    values = {"cut.mlp": 0.9, "cut.linear_in": 0.7}
    at_once = run_trial(shared, "cut", values, lambda _: None)
    epochs = []
    tuned = run_trial(shared, "tuned", {**values, "cut.finetune_epochs": 2}, epochs.append)
    assert len(epochs) == 2 and tuned["metrics"]["val/accuracy"] > at_once["metrics"]["val/accuracy"]
    assert tuned["metrics"]["model/nonzero"] == at_once["metrics"]["model/nonzero"], "cut weights came back"


def test_a_training_trial_reports_every_epoch_but_the_last_and_repeats_itself(trained, tmp_path):
    shared = shared_of(trained, tmp_path / "runs" / "exp", "train")
    told = []
    a = run_trial(shared, "a", {"optim.lr": 1e-3}, told.append)
    b = run_trial(shared, "b", {"optim.lr": 1e-3}, lambda _: None)
    # the last one goes with the test's score: a scheduler that stopped the trial there would only lose that
    assert len(told) == 2 and told[-1]["val/best_accuracy"] >= told[0]["val/best_accuracy"]
    same = ("val/loss", "val/best_accuracy", "test/accuracy", "train/loss")
    assert [a["metrics"][k] for k in same] == [b["metrics"][k] for k in same]


def test_a_trial_of_several_workers_is_followed_and_stopped(trained, tmp_path, monkeypatch):
    """Tune stops a trial where it reports: the workers are asked to end, and have ended before the trial has."""
    shared = replace(shared_of(trained, tmp_path / "runs" / "exp", "train"), workers=2)
    ended = []

    def workers(config, folder, *_):
        ended.append(fit(config, local_process(), folder, data_of(shared, config)))
        return ended[-1]

    monkeypatch.setattr("ray_jobs.launch.run.train_with_workers", workers)
    told = []
    result = run_trial(shared, "whole", {}, told.append)
    assert [m["epoch"] for m in told] == [1, 2], "the third comes with the result"
    assert result["metrics"]["val/best_accuracy"] >= told[-1]["val/best_accuracy"] > 0

    def stop(metrics):
        raise SystemExit

    with pytest.raises(SystemExit):
        run_trial(shared, "stopped", {"optim.epochs": 500}, stop)
    assert [r["status"] for r in ended] == ["finished", "interrupted"] and ended[-1]["epoch"] < 499
    assert not (shared.folder / "stopped" / "trial.json").exists()


def test_a_study_goes_on_after_its_sweep_died(tmp_path):
    """Rows that were running: one whose trial had left its result counts, the other runs again, as it was."""
    space = load_space("quickstart")
    study = open_study(space, tmp_path, None, 0)
    first = StudyTrials(space, study, tmp_path, 4)
    handed = [first.suggest(str(i)) for i in range(3)]
    for i, status in enumerate(["finished", "finished"]):
        folder = tmp_path / handed[i]["trial"]
        folder.mkdir()
        result = {"status": status, "metrics": {"val/best_accuracy": 90.0 + i}, "values": handed[i]["values"]}
        (folder / "trial.json").write_text(json.dumps(result))
    first.settled(
        "trial-0000", json.loads((tmp_path / "trial-0000" / "trial.json").read_text())
    )  # the sweep dies before it hears of the second
    again = StudyTrials(space, open_study(space, tmp_path, None, 0), tmp_path, 4)
    states = [t.state.name for t in again.study.trials]
    assert states == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert again.suggest("x") == handed[2], "an interrupted trial got other parameters"
    fresh = again.suggest("y")
    assert fresh["trial"] == "trial-0003" and fresh["values"] != handed[0]["values"]
    assert again.suggest("z") == "FINISHED" and again.exhausted()
    urls = optuna.study.get_all_study_names(f"sqlite:///{tmp_path / 'study.db'}")
    assert urls == [tmp_path.name]


def test_concurrent_trials_never_hold_more_than_there_is(small_config):
    def held(cluster, kind="train", workers=0, share=None, cpus=None):
        config = small_config(scaling__num_workers=workers, scaling__cpus_per_worker=cpus)
        space = load_space("quickstart" if kind == "train" else "component_ablation")
        return resources(experiment.Experiment(space, [], config, None, share, None, 1), cluster)

    two = held(Cluster(2, 0, "here"), workers=2, cpus=1)
    assert two.concurrent == 1 and two.cpus == 0, "two nested runs of two workers would wait for each other"
    assert held(Cluster(8, 0, "here"), workers=2, cpus=2).concurrent == 2
    assert held(Cluster(2, 0, "here")).concurrent == 2
    gpu = held(Cluster(32, 2, "there"), kind="measure")
    assert gpu.gpus == 0.25 and gpu.concurrent == 8
    assert held(Cluster(32, 2, "there"), share=0.5).concurrent == 4
    with pytest.raises(ConfigError, match="needs 4 GPUs or CPUs and the cluster has 2"):
        held(Cluster(2, 0, "here"), workers=4, cpus=1)
    with pytest.raises(ConfigError, match="the cluster has no GPU"):
        held(Cluster(2, 0, "here"), share=0.5)


@pytest.mark.parametrize(
    "script, words, lines",
    [
        (tune, ["--space", "recipe"], ["# model.drop_path: 0 to 0.3", "# 1 - ema.decay: 1e-05 to 0.01, log scale"]),
        (tune, ["--space", "model_family"], ["# mixer-forward-seed0: model.mixer forward, seed 0"]),
        (ablate, ["--preset", "quickstart", "--grid", "layers"], ["# 4 trials in "]),
        (ablate, ["--grid", "joint", "--checkpoint", "CHECKPOINT"], ["# 3 trials in ", "cut.mlp 0.7"]),
    ],
)
def test_a_dry_run_says_what_would_run_and_leaves_nothing(trained, tmp_path, capsys, script, words, lines):
    words = [str(trained) if word == "CHECKPOINT" else word for word in words]
    assert script([*words, "--dry-run", "--out", str(tmp_path / "runs"), "--name", "dry"]) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in lines), said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "script, words, message",
    [
        (tune, [], "--space is missing"),
        (tune, ["--space", "nowhere"], "no search space nowhere"),
        (tune, ["--space", "pruning"], "give --checkpoint"),
        (tune, ["--space", "quickstart", "--trials", "many"], "--trials many: a whole number is needed"),
        (tune, ["--space", "quickstart", "--trials", "0"], "--trials 0 is not possible; valid: 1 to 10,000"),
        (ablate, ["--gpus-per-trial", "half"], "--gpus-per-trial half: a number is needed"),
        (
            ablate,
            ["--grid", "everything", "--checkpoint", "CHECKPOINT"],
            "unknown grid 'everything'; valid:",
        ),
        (ablate, ["--checkpoint", "/nowhere"], "there is no /nowhere"),
        (ablate, ["--resume", "/nowhere"], "--resume /nowhere: there is no such folder"),
    ],
)
def test_bad_input_is_named_before_anything_starts(trained, tmp_path, capsys, script, words, message):
    words = [str(trained) if w == "CHECKPOINT" else w for w in words]
    assert script([*words, *([] if "--resume" in words else ["--out", str(tmp_path / "runs")])]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# --- under Tune ------------------------------------------------------------------------------------------------------


def start(script, *words):
    return subprocess.Popen(
        [sys.executable, f"ray_jobs/{script}.py", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.cluster
def test_an_ablation_killed_and_continued(trained, tmp_path, capsys):
    """SIGKILL for the driver in the middle; --resume runs what is left, and nothing twice; then the outcome is read."""
    driver = start("ablate", "--checkpoint", str(trained), "--out", str(tmp_path))
    folder = tmp_path / "ablation"
    ends = time.monotonic() + 150
    while len(list(folder.glob("*/trial.json"))) < 5:
        assert time.monotonic() < ends and driver.poll() is None
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    time.sleep(3)  # its actors end
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("*/trial.json")}
    assert 5 <= len(stamps) < 33
    done = start("ablate", "--resume", str(folder))
    out, _ = done.communicate(timeout=200)
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
    assert ablate(["--checkpoint", str(trained), "--out", str(tmp_path)]) == 2
    assert "holds an experiment already" in capsys.readouterr().err
    assert compare([str(folder), "--csv", str(tmp_path / "all.csv")]) == 0
    assert "ablation/components-mlp-0.3," in (tmp_path / "all.csv").read_text()


@pytest.mark.cluster
def test_a_search_stopped_and_continued(tmp_path):
    """SIGTERM, as `ray job stop` sends it: an orderly end with results so far; then the rest, with the same study.
    Learning rates below optim.min_lr cannot be, which costs those trials alone."""
    words = [*FAST[:8], "--space", "quickstart", "--trials", "5", "--out", str(tmp_path), "--optim.min-lr", "2e-3"]
    driver = start("tune", *words)
    folder = tmp_path / "search"
    ends = time.monotonic() + 150
    while not list(folder.glob("trial-*/trial.json")):
        assert time.monotonic() < ends and driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130 and f"--resume {folder}" in out, out
    assert (folder / "results.csv").exists()
    done = start("tune", "--resume", str(folder))
    out, _ = done.communicate(timeout=200)
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


@pytest.mark.cluster
def test_a_trial_trains_with_two_workers_on_all_cpus_there_are(tmp_path):
    """Nested in a trial that takes none of them; how many run at once: the test of resources above."""
    words = [*FAST, "--space", "quickstart", "--trials", "1", "--out", str(tmp_path)]
    workers = ["--scaling.num-workers", "2", "--scaling.cpus-per-worker", "1"]
    done = start("tune", *words, *workers)
    out, _ = done.communicate(timeout=230)
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


@pytest.mark.cluster
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

    ends = time.monotonic() + 100
    while min(len(epochs("seed-0")), len(epochs("seed-1"))) < 2:
        assert time.monotonic() < ends and driver.poll() is None
        time.sleep(0.02)
    kill_second()
    assert not list(folder.glob("*/trial.json")), "a trial was over before the node died"
    out, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, out
    with (folder / "results.csv").open() as file:
        assert [(r["trial"], r["status"]) for r in csv.DictReader(file)] == [
            (f"seed-{i}", "finished") for i in range(2)
        ]
    assert all(epochs(f"seed-{i}") == list(range(1, 17)) for i in range(2)), "epochs were lost or counted twice"
    starts = [len(list((folder / f"seed-{i}").glob("events.out.tfevents.[1-9]*"))) for i in range(2)]
    assert sorted(starts) == [1, 2], "a trial on the living node started again"
