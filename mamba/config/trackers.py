"""The words of `tracking.backends`: those that ship, and those of installed packages.

A package adds one by an entry point of the group `mamba_forge.trackers`, whose name is the word and whose object makes
a `mamba.runs.backends.Backend`:

    [project.entry-points."mamba_forge.trackers"]
    mine = "my_package.tracking:MyBackend"
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

from mamba.errors import ConfigError

GROUP = "mamba_forge.trackers"
SHIPPED: dict[str, str | None] = {"tensorboard": None, "csv": None, "wandb": "wandb", "mlflow": "mlflow"}
"""Word -> the module that it needs and that an extra of the same name installs."""


@cache
def added() -> dict[str, EntryPoint]:
    """The words of installed packages; what ships is not replaced."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in SHIPPED}


def several(value: Any) -> Any:
    """Words from one text: `csv,wandb`, `[csv, wandb]`; `none` or nothing: no words."""
    if value is None:
        return ()
    if not isinstance(value, str):
        return value
    words = [word.strip(" '\"") for word in value.strip(" []()").split(",")]
    return tuple(word for word in words if word and word.lower() != "none")


def check(words: Iterable[str]) -> None:
    """Refuse what there is not.

    Raises:
        ConfigError: an unknown word, one that stands twice, or one whose package is not installed.
    """
    seen: set[str] = set()
    for word in words:
        if word not in SHIPPED and word not in added():
            raise ConfigError(f"tracking.backends: unknown '{word[:80]}'; valid: {', '.join([*SHIPPED, *added()])}")
        if word in seen:
            raise ConfigError(f"tracking.backends: {word} is given twice")
        seen.add(word)
        module = SHIPPED.get(word)
        if module is not None and find_spec(module) is None:
            raise ConfigError(
                f"tracking.backends: {word} needs a package that is not installed: pip install -e '.[{word}]'"
            )
