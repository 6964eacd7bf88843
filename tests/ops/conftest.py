"""One process in which Triton interprets its kernels, for all tests that need one: to start it takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOOP = """
import json, os, sys, traceback
import torch
answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # what tests print is no answer
torch.set_num_threads(1)
for line in sys.stdin:
    try:
        exec(compile(json.loads(line), "test", "exec"), {})
        problem = None
    except Exception:
        problem = traceback.format_exc()
    print(json.dumps(problem), file=answers, flush=True)
"""


@pytest.fixture(scope="session")
def in_the_interpreter() -> Iterator[Callable[[str], None]]:
    """Run code where TRITON_INTERPRET is 1 and no GPU is seen. It imports what it needs; what it sets in a module, it
    puts back."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", LOOP]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    given, answers = process.stdin, process.stdout

    def run(code: str) -> None:
        print(json.dumps(code), file=given, flush=True)
        answer = answers.readline()
        assert answer, f"the process ended with {process.wait()}"
        problem = json.loads(answer)
        assert problem is None, problem

    yield run
    process.kill()  # it holds nothing, and to end takes it seconds
    process.communicate()
