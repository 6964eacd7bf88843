"""Where a result comes from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import mamba.runs.environment as own


def test_a_copy_inside_another_checkout_does_not_take_its_commit(tmp_path):
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words], check=True)

    git("init", "-q")
    copy = tmp_path / "ignored" / "environment.py"
    copy.parent.mkdir()
    shutil.copy(Path(own.__file__), copy)
    (tmp_path / "other").write_text("x")
    git("add", "other")
    git("commit", "-q", "-m", "another project")
    code = "from environment import _revision; print(_revision())"

    def revision() -> str:
        done = subprocess.run([sys.executable, "-c", code], cwd=copy.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert revision() == "unknown"
    git("add", "-f", "ignored/environment.py")
    git("commit", "-q", "-m", "ours")
    assert len(revision()) == 12
