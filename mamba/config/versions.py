"""Versions of what a run leaves in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mamba.errors import ConfigError, ForgeError

FORMAT = 2
"""`format` in config.yaml, result.json and checkpoints' config.json. What says none is version 1. Count up when a
reader of today would misread what is written."""


def check_format(tree: Mapping[str, Any], where: object, error: type[ForgeError] = ConfigError) -> None:
    """Raises `error` where a file's content is of a newer version than this program reads."""
    found = tree.get("format", 1)
    if not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise error(f"{where} has format {found!r}, of a newer version of this program; this one reads up to {FORMAT}")
