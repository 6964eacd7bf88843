"""Where a result comes from: hardware, versions, the commit of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and code revision, for the result's reader."""
    packages = ("torch", "torchvision", "ray", "numpy")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "hardware": {"gpu": gpu, "cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "code_revision": _revision(),
    }


@cache
def _revision() -> str:
    """The commit of the code that runs, `+changes` where the tree differs from it; `unknown` outside a checkout, and of
    a copy that lies in somebody else's checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
