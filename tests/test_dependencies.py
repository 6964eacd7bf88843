"""The dependency rule: ray_jobs -> pruning -> mamba, never back; only ray_jobs knows ray and optuna."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "mamba": {"pruning", "ray_jobs", "ray", "optuna", "tests", "benchmarks"},
    "pruning": {"ray_jobs", "ray", "optuna", "tests", "benchmarks"},
    "ray_jobs": {"tests", "benchmarks"},
}
FILES = [(package, file) for package in FORBIDDEN for file in sorted((ROOT / package).rglob("*.py"))]


def imported(file: Path) -> set[str]:
    """Top-level packages of every import in a file, also those inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("package, file", FILES, ids=lambda v: str(v.relative_to(ROOT)) if isinstance(v, Path) else v)
def test_imports_point_downward(package, file):
    assert not imported(file) & FORBIDDEN[package]


def test_the_rule_looks_at_something():
    assert len(FILES) > 20 and "ray" in imported(ROOT / "ray_jobs" / "launch" / "cluster.py")


def test_sweeps_start_without_what_only_compiling_needs():
    """torch._dynamo takes more than a second to import, in the driver and in every process of a sweep."""
    code = "import sys, ray_jobs.report.outcome, ray_jobs.sweep.trial; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
