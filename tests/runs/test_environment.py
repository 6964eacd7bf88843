"""Where a result comes from."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
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

    def revision() -> str:
        spec = importlib.util.spec_from_file_location("copied_environment", copy)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return str(module._revision())

    assert revision() == "unknown"
    git("add", "-f", "ignored/environment.py")
    git("commit", "-q", "-m", "ours")
    assert len(revision()) == 12
