"""Where this project keeps what it can make again: compiled kernels, decoded images."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`$MAMBA_FORGE_CACHE`, else ~/.cache/mamba-forge, else a folder for temporary files named after the user: the
    first that can be made and written to. In a shared place it must be the user's own."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    shared = Path(tempfile.gettempdir()) / f"mamba-forge-{user}"
    candidates = [shared]
    with contextlib.suppress(RuntimeError):  # no home folder
        candidates.insert(0, Path.home() / ".cache" / "mamba-forge")
    if folder := os.environ.get("MAMBA_FORGE_CACHE"):
        candidates.insert(0, Path(folder).expanduser())
    for candidate in candidates:
        with contextlib.suppress(OSError):
            candidate.mkdir(mode=0o700, parents=True, exist_ok=True)
            mine = not hasattr(os, "getuid") or candidate.stat().st_uid == os.getuid()
            if os.access(candidate, os.W_OK) and (mine or candidate != shared):
                return candidate
    return Path(tempfile.mkdtemp(prefix="mamba-forge-"))
