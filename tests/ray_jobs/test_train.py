"""The entry script, for real: in this process, under Ray Train, interrupted, killed, and given bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mamba.errors import FolderError, TrainingError
from mamba.runs import checkpoint as ckpt
from mamba.train.distributed import Process
from ray_jobs.launch.tasks import train_task
from ray_jobs.launch.workers import _sentence
from ray_jobs.train import main
from tests.runs.test_tracking import shown_status

ROOT = Path(__file__).parent.parent.parent
FAST = [
    *("--model.d-model", "12", "--model.depth", "2", "--model.d-state", "4", "--data.batch-size", "128"),
    *("--optim.warmup-epochs", "1"),
]
LOCAL = ["--scaling.num-workers", "0"]


@pytest.fixture(autouse=True)
def _a_cluster_of_its_own(monkeypatch):
    """Not whatever happens to run on this machine."""
    monkeypatch.setenv("RAY_ADDRESS", "local")


def command(tmp_path, *words):
    return [sys.executable, "ray_jobs/train.py", *FAST, "--out", str(tmp_path), "--trial", "one", *words]


def start(tmp_path, *words):
    log = (tmp_path / "output.txt").open("w")
    return subprocess.Popen(
        command(tmp_path, *words), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(condition, seconds=150):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise TimeoutError


def epochs(run):
    path = run / "metrics.jsonl"
    return [json.loads(line)["epoch"] for line in path.read_text().splitlines()] if path.exists() else []


def ray_processes_of(driver):
    """Processes of the local cluster that a driver started, by the terminal session that they share with it."""
    listing = subprocess.run(["ps", "-s", str(driver), "-o", "args="], capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if "raylet" in line or "gcs_server" in line]


def test_local_run_and_its_output(tmp_path, capsys):
    assert main([*FAST, *LOCAL, "--out", str(tmp_path), "--trial", "one", "--optim.epochs", "2"]) == 0
    run = tmp_path / "quickstart" / "one"
    out = capsys.readouterr().out
    result = json.loads((run / "result.json").read_text())
    assert f"{result['metrics']['test/accuracy']:.2f} %" in out
    assert f"tensorboard --logdir {tmp_path}" in out and str(run) in out
    assert "epoch 2/2" in out
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["epochs"] == 2


def test_dry_run_starts_nothing(tmp_path, capsys):
    assert main(["--preset", "v2", "--data.dataset", "cifar10", "--out", str(tmp_path / "runs"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "# parameters: 16,488,394" in out and "# steps: 351 an epoch, 105,300 in all" in out
    assert yaml.safe_load(out)["optim"]["lr"] == 0.001
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data.batch-size", "100", "--scaling.num-workers", "3"], "data.batch_size 100 is not divisible by workers"),
        (["--optim.amp", "fp16", *LOCAL], "optim.amp 'fp16' needs a GPU"),
        (["--data.img-size", "30", "--model.patch-size", "4"], "data.img_size 30 is not divisible by"),
        (["--data.img-size", "6", "--model.stem", "conv"], "'conv'; valid: a multiple of 4"),
        (["--distill.teacher", "/nonexistent"], "distill.teacher: there is no /nonexistent"),
        (["--distill.teacher", "/nonexistent", "--dry-run"], "distill.teacher: there is no /nonexistent"),
        (["--preset", "v3"], "unknown preset 'v3'; valid: quickstart"),
        (["--optim.lrr", "1"], "unknown key 'optim.lrr'"),
        (["--data.dataset", "folder", "--data.root", "/nonexistent"], "data.root /nonexistent is not an image folder"),
        (["--data.batch-size", "2048", *LOCAL], "data.batch_size 2048 is larger than the training set of 1295"),
    ],
)
def test_bad_input_ends_with_one_sentence_before_anything_starts(tmp_path, capsys, words, message, monkeypatch):
    monkeypatch.setattr("ray_jobs.launch.run.train_with_workers", lambda *_: pytest.fail("started workers"))
    assert main(["--out", str(tmp_path), *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and len(err.strip().splitlines()) == 1


def test_an_existing_run_is_not_overwritten(tmp_path, capsys):
    words = [*FAST, *LOCAL, "--out", str(tmp_path), "--trial", "one", "--optim.epochs", "1"]
    assert main(words) == 0
    before = (tmp_path / "quickstart" / "one" / "result.json").read_text()
    capsys.readouterr()
    assert main(words) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path / "quickstart" / "one")]) == 0
    out = capsys.readouterr().out
    assert "finished already" in out and "test accuracy" in out
    assert (tmp_path / "quickstart" / "one" / "result.json").read_text() == before


def test_ctrl_c_leaves_a_checkpoint_that_resumes(tmp_path):
    """As a terminal sends it: to the whole process group, loader processes too."""
    loaders = ["--data.augment", "basic", "--data.loader-workers", "2"]
    process = start(tmp_path, *LOCAL, *loaders, "--optim.epochs", "500")
    run = tmp_path / "quickstart" / "one"
    wait_for(lambda: len(epochs(run)) >= 2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    out = (tmp_path / "output.txt").read_text()
    assert "saving a checkpoint" in out and f"--resume {run}" in out and "Traceback" not in out
    position = ckpt.load_training_state(ckpt.newest_checkpoint(run))
    assert position["epoch"] >= 2 and not (run / "result.json").exists()
    assert shown_status(run) == "interrupted"


@pytest.mark.cluster
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.long)], ids=["stopped", "killed"])
def test_a_run_of_two_workers_is_stopped_and_goes_on_without_ray(killed, tmp_path):
    """SIGTERM, as `ray job stop` sends it, leaves no process behind; where `killed`, after a SIGKILL for rank 1 in
    mid-run, from which the workers restart (without a cluster: launch/test_workers.py)."""
    process = start(tmp_path, "--scaling.num-workers", "2", "--scaling.cpus-per-worker", "1", "--optim.epochs", "24")
    run = tmp_path / "quickstart" / "one"
    try:
        wait_for(lambda: len(epochs(run)) >= 2)
        if killed:
            worker = run / ".ray" / "worker-1.json"
            first = json.loads(worker.read_text())["pid"]
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: json.loads(worker.read_text())["pid"] != first)
            wait_for(lambda: len(epochs(run)) >= 6)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130, (tmp_path / "output.txt").read_text()
        out = (tmp_path / "output.txt").read_text()
        assert f"--resume {run}" in out and "Traceback" not in out
        assert epochs(run) == list(range(1, len(epochs(run)) + 1)) and len(epochs(run)) < 24
    finally:
        process.kill()
    wait_for(lambda: not ray_processes_of(process.pid), 30)
    assert main(["--resume", str(run), *LOCAL]) == 0
    assert epochs(run) == list(range(1, 25))
    result = json.loads((run / "result.json").read_text())
    assert result["world_size"] == 1 and result["epochs"] == 24 and result["metrics"]["test/accuracy"] > 60


NEVER_FINITE = ["--optim.lr", "1e30", "--optim.grad-clip", "none", "--optim.max-skipped", "5", "--optim.epochs", "30"]


def test_a_loss_that_is_never_finite_ends_with_one_sentence(tmp_path, capsys):
    assert main([*FAST, *LOCAL, *NEVER_FINITE, "--out", str(tmp_path), "--trial", "one"]) == 2
    err = capsys.readouterr().err
    assert "not finite in" in err and len(err.strip().splitlines()) == 1
    run = tmp_path / "quickstart" / "one"
    assert shown_status(run) == "failed" and "not finite in" in (run / "train.log").read_text()


@pytest.mark.parametrize("world_size, every_rank, comes_back", [(1, False, True), (2, True, True), (2, False, False)])
def test_errors_of_all_ranks_come_back_from_workers_and_are_not_retried(
    tmp_path, monkeypatch, small_config, world_size, every_rank, comes_back
):
    def fail(*_args, **_options):
        raise TrainingError("the loss is not finite", every_rank=every_rank)

    monkeypatch.setattr("ray_jobs.launch.tasks.fit", fail)
    spec = {"config": small_config().model_dump(mode="json"), "folder": str(tmp_path)}
    if comes_back:
        assert train_task(Process(0, world_size), spec) == {"error": "the loss is not finite"}
    else:
        with pytest.raises(TrainingError, match="the loss is not finite"):
            train_task(Process(0, world_size), spec)
    assert json.loads((tmp_path / ".ray" / "worker-0.json").read_text())["pid"] == os.getpid()


def test_what_ended_ray_train_is_a_sentence_though_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise FolderError("no space")

    error = RuntimeError("\n\nTraceback (most recent call last):\n  x\nValueError: what counts\n")
    assert (
        str(_sentence(error, tmp_path))
        == f"worker 0 failed: ValueError: what counts (full traceback: {tmp_path}/error.log)"
    )
    assert "most recent call last" in (tmp_path / "error.log").read_text()
    monkeypatch.setattr("ray_jobs.launch.workers.write_text", full)
    assert "ValueError: what counts" in str(_sentence(error, tmp_path))


def test_a_full_disk_at_the_end_does_not_hide_why(tmp_path, monkeypatch, capsys):
    def full(*_args, **_options):
        raise FolderError("result.json could not be written: No space left on device")

    monkeypatch.setattr("mamba.runs.tracking.write_json", full)
    monkeypatch.setattr("ray_jobs.launch.run.write_hparams", lambda *_: full())
    assert main([*FAST, *LOCAL, "--out", str(tmp_path), "--trial", "one", "--optim.epochs", "1"]) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err and len(err.strip().splitlines()) == 1
    monkeypatch.undo()
    assert main(["--resume", str(tmp_path / "quickstart" / "one")]) == 0


def test_fine_tuning_records_what_the_model_is_and_needs_its_start_no_more(tmp_path):
    first = tmp_path / "quickstart" / "first"
    assert main([*FAST, *LOCAL, "--out", str(tmp_path), "--trial", "first", "--optim.epochs", "1"]) == 0
    words = ["--model.checkpoint", str(first), *FAST[6:], *LOCAL, "--out", str(tmp_path), "--trial", "tuned"]
    assert main([*words, "--optim.epochs", "1"]) == 0
    run = tmp_path / "quickstart" / "tuned"
    model = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert (model["d_model"], model["depth"], model["d_state"]) == (12, 2, 4)
    first.rename(tmp_path / "elsewhere")
    assert main(["--resume", str(run), "--optim.epochs", "2"]) == 0
    assert json.loads((run / "result.json").read_text())["epochs"] == 2
