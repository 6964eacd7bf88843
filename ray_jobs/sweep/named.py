"""What Ray's dashboard, `ray list actors`, the log's prefix and `top` call a sweep's actors.

An actor runs one trial after another and its class and repr are fixed when it starts, so these two are the
experiment's; the title of its process is that of the trial which it runs now.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.trainable.function_trainable import FunctionTrainable, wrap_function


def named(trainable: Callable[[dict[str, Any]], None], folder: Path) -> type[FunctionTrainable]:
    """The class of actors that run a function, `config` -> None, of an experiment in a folder."""
    name = f"trial of {folder.name}"
    base = wrap_function(trainable, name=name)

    class Trial(base):  # type: ignore[misc, valid-type]
        def train(self) -> Any:
            show(f"{self.config['trial']} of {folder.name}")  # Ray gives it back its own when this call ends
            return super().train()

    Trial.__name__ = Trial.__qualname__ = name
    return Trial


def show(title: str) -> None:
    """Call this worker process of Ray's by a name, in `top` and in the dashboard's list of processes."""
    from ray._raylet import setproctitle  # type: ignore[attr-defined]

    setproctitle(f"ray::{title}")
