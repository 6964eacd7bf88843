"""`ray job submit` and `ray job stop` against a cluster started by `ray start --head`, with token authentication."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_jobs.train import main as train

ROOT = Path(__file__).parent.parent.parent
RAY = str(Path(sys.executable).parent / "ray")
FAST = [
    *("--model.d-model", "12", "--model.depth", "2", "--model.d-state", "4", "--data.batch-size", "128"),
    *("--optim.warmup-epochs", "1", "--optim.epochs", "3", "--scaling.num-workers", "0"),
]

STOP = """
import sys
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient(sys.argv[1])
sys.stdin.read()
client.stop_job("stopped")
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def cluster(tmp_path):
    """A head node of two CPUs; yields (environment, address of its jobs)."""
    scratch = Path("/tmp") / f"forge-{os.getpid()}"  # socket paths must be short
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    subprocess.run([RAY, "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
    port, dashboard = free_port(), 8400 + os.getpid() % 500
    ports = {"port": port, "dashboard-port": dashboard, "dashboard-agent-listen-port": free_port()}
    words = [f"--{name}={number}" for name, number in ports.items()] + ["--num-cpus=2", f"--temp-dir={scratch}"]
    head = subprocess.Popen([RAY, "start", "--head", "--block", *words], env=env, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        ends = time.monotonic() + 90
        hello = [RAY, "job", "submit", "--address", address, "--", "true"]  # until the agent that starts jobs is up
        while subprocess.run(hello, env=env, capture_output=True).returncode:
            assert time.monotonic() < ends and head.poll() is None, "the cluster did not start"
            time.sleep(1)
        yield env, address
    finally:
        os.killpg(head.pid, signal.SIGKILL)  # in order it takes half a minute
        head.wait(60)
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.mark.long
@pytest.mark.cluster
def test_an_ablation_as_a_job_submitted_and_stopped(cluster, tmp_path, monkeypatch):
    env, address = cluster
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert train([*FAST, "--out", str(tmp_path), "--trial", "one"]) == 0
    words = ["python", "ray_jobs/ablate.py", "--checkpoint", str(tmp_path / "quickstart" / "one")]
    words += ["--out", str(tmp_path / "runs")]

    def job(*command):
        return subprocess.run([RAY, "job", *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)

    submit = ["submit", "--address", address, "--working-dir", ".", "--submission-id"]
    done = job(*submit, "whole", "--", *words, "--grid", "joint")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "ablation"
    assert "3/3" in done.stdout and f"report: {folder}/report/index.html" in done.stdout, "logs are not followed"
    assert (folder / "report" / "index.html").exists()

    # the command takes seconds to start, in which all trials may end: what it asks for is made ready before
    stopper = subprocess.Popen([sys.executable, "-c", STOP, address], env=env, stdin=subprocess.PIPE, text=True)
    job(*submit, "stopped", "--no-wait", "--", *words, "--name", "stopped")
    folder = tmp_path / "runs" / "stopped"
    ends = time.monotonic() + 120
    while len(list(folder.glob("*/trial.json"))) < 3:
        assert time.monotonic() < ends
        time.sleep(0.05)
    stopper.communicate("now", timeout=60)
    job("stop", "--address", address, "stopped")  # waits for the end
    log = job("logs", "--address", address, "stopped").stdout
    assert f"--resume {folder}" in log and "Traceback" not in log, log
    assert 3 <= len((folder / "results.csv").read_text().splitlines()) - 1 < 33
