"""The scripts under cluster/ without a cluster: linted, on one node, and on two that one machine plays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
FAKE = Path(__file__).parent / "fake"
BIN = Path(sys.executable).parent
TINY = [
    *("--model.d-model", "12", "--model.depth", "2", "--model.d-state", "4", "--data.batch-size", "128"),
    *("--optim.warmup-epochs", "1", "--optim.epochs", "2"),
]


@pytest.fixture
def submit(tmp_path):
    """A started slurm.sbatch: (words of the command, variables of SLURM and ours) -> its process."""
    job = os.getpid()
    scratch = Path("/tmp") / f"forge-slurm-{job}"  # socket paths must be short
    known = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
    known |= {"PATH": f"{FAKE}:{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(scratch)}
    for room in ("ray_jobs", "mamba", "pruning", "cluster"):
        (tmp_path / room).symlink_to(ROOT / room)  # logs of nodes go where the job was submitted
    known |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": str(job), "SLURM_TMPDIR": str(tmp_path)}
    known |= {"OMP_NUM_THREADS": "1", "SLURM_CPUS_PER_TASK": "1"}
    scratch.mkdir()
    started = []

    def start(*command, **variables):
        started.append(
            subprocess.Popen(
                ["bash", str(CLUSTER / "slurm.sbatch"), *command], env=known | variables, text=True, cwd=tmp_path,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    shutil.rmtree(scratch, ignore_errors=True)


def test_shellcheck():
    scripts = [CLUSTER / "slurm.sbatch", *CLUSTER.glob("*.sh"), ROOT / ".ci" / "run"]
    done = subprocess.run([BIN / "shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_directives_come_before_the_first_command():
    """SLURM reads #SBATCH lines up to the first line that is neither empty nor a comment."""
    lines = (CLUSTER / "slurm.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert len(directives) > 5 and max(directives) < first


def test_one_node_runs_the_command_and_passes_its_exit_code_on(submit):
    job = submit("bash", "-c", "echo $RAY_ADDRESS; exit 7")
    assert job.communicate(timeout=60)[0] == "local\n" and job.returncode == 7
    job = submit()
    assert "no command" in job.communicate(timeout=60)[0] and job.returncode == 2


def test_before_the_time_is_up_the_command_is_asked_to_end_and_the_job_is_queued_again(submit, tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho scontrol $@ > {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    work = f"trap 'exit 130' TERM; touch {tmp_path}/ready; while true; do sleep 0.05; done"
    path = f"{scontrol.parent}:{FAKE}:{BIN}:{os.environ['PATH']}"
    job = submit("bash", "-c", work, PATH=path, RUN=str(tmp_path / "run"))
    ends = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < ends and job.poll() is None
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGUSR1)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 130, output
    assert (tmp_path / "requeued").read_text() == f"scontrol requeue {os.getpid()}\n"


@pytest.mark.parametrize("kept", ["config.yaml", "experiment.json"])
def test_start_or_resume(tmp_path, kept):
    script, run = CLUSTER / "start_or_resume.sh", tmp_path / "run"

    def say():
        words = ["bash", script, run, "echo", "train.py", "--preset", "v2"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    assert say() == "train.py --preset v2\n"
    run.mkdir()
    (run / kept).touch()
    assert say() == f"train.py --resume {run}\n"


@pytest.mark.long
@pytest.mark.cluster
def test_two_nodes_train_one_model(submit, tmp_path):
    command = ["python", "ray_jobs/train.py", *TINY, "--scaling.num-workers", "2", "--scaling.cpus-per-worker", "1"]
    out = ["--out", str(tmp_path / "runs"), "--trial", "two"]
    job = submit(*command, *out, SLURM_JOB_NUM_NODES="2", RUN=str(tmp_path / "runs" / "quickstart" / "two"))
    output = job.communicate(timeout=230)[0]
    assert job.returncode == 0, output
    assert "head at" in output and "2 workers" in output and "state-dump" not in output, output
    assert "On worker node" in (tmp_path / f"mamba-{os.getpid()}-node1.log").read_text()
    folder = tmp_path / "runs" / "quickstart" / "two"
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished" and (folder / ".ray" / "worker-1.json").exists()
