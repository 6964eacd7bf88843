"""Inputs that nobody wrote by hand: each target says what an input looks like, and what must hold for every one.

A target is a strategy of hypothesis and a function that fails for an input that is not handled: it ended in a traceback
where a sentence was due, took something silently, or gave what cannot be. `python tests/fuzz.py` runs all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Target:
    """Something that takes what users, files and disks give it."""

    inputs: SearchStrategy[Any]
    holds: Callable[[Any, Path], None]
    """Called with an input and an empty folder; raises where the input is not handled."""

    def run(self, examples: int, folder: Path, start: int = 0) -> None:
        """Try so many inputs, the same ones for the same `start`; raises with the smallest that fails."""
        count = iter(range(10**9))

        @seed(start)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(self.inputs)
        def attempt(value: Any) -> None:
            here = folder / str(next(count))
            here.mkdir(parents=True)
            self.holds(value, here)

        attempt()


def sentence(error: BaseException) -> str:
    """The message of an error that a user may see; fails where it is none that one could act on."""
    text = str(error)
    assert text and "\n" not in text, f"no sentence: {text!r}"
    assert len(text) < 2000, f"too long to be read: {text[:200]!r}"
    return text
