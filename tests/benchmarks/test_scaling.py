"""What is made of the lines that torchrun's processes print; torchrun itself: the long toy of test_run.py."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks import scaling
from benchmarks.registry import BENCHMARKS
from mamba.train.distributed import local_process


@pytest.fixture
def printed(monkeypatch, capsys):
    """Each start of torchrun is one process, in this one; returns the cases of every start, and the exit code that the
    next ends with, before its last case."""
    starts, fails = [], []

    def run(command, **_):
        cases = json.loads(command[command.index("--cases") + 1])
        starts.append((next(word for word in command if "nproc" in word), cases))
        capsys.readouterr()
        scaling.run_cases(cases[:-1] if fails else cases)
        return subprocess.CompletedProcess(command, *(fails or [0]), capsys.readouterr().out, "why it failed")

    monkeypatch.setattr(scaling, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(scaling, "torchrun_process", local_process)
    monkeypatch.setattr(scaling.dist, "destroy_process_group", lambda: None)
    monkeypatch.setenv(scaling.CHOICE, "flat")  # which the cases set: it is put back
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    return starts, fails


def test_a_row_a_count_batch_and_way(printed):
    toy = BENCHMARKS["scaling"].toy | {"gpus": [1, 2], "batches": [8, 16], "gradients": ["flat"], "steps": 1}
    rows = list(scaling.rows(**toy))
    assert [(r["gpus"], r["batch"], r["gradients"]) for r in rows] == [(1, 8, "-"), (1, 16, "-"), (2, 8, "flat"),
                                                                       (2, 16, "flat")]  # fmt: skip
    assert [count for count, _ in printed[0]] == ["--nproc-per-node=1", "--nproc-per-node=2"]
    for first, second in zip(rows[:2], rows[2:], strict=True):
        assert first["ratio"] == 1 and second["ratio"] == second["images_per_s"] / first["images_per_s"]
        assert set(BENCHMARKS["scaling"].better) <= set(first)


def test_a_case_that_fails_is_a_row(printed):
    printed[1].append(1)
    first, second = scaling.rows(**BENCHMARKS["scaling"].toy | {"batches": [8, 16], "steps": 1})
    assert first["batch"] == 8 and first["images_per_s"] > 0
    assert second["batch"] == 16 and second["images_per_s"] == "failed: why it failed"
