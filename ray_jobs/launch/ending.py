"""How a command ends: with an exit code, and one sentence where something went wrong; and what would continue it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mamba.errors import ForgeError

_continued: str | None = None
"""The command that continues what this process does, or did when it was stopped."""


def exit_code(work: Callable[[], int], stopped: str) -> int:
    """What `work` returns; 2 after an error of the user's, whose sentence is printed; 130 after Ctrl-C, with what
    continues it, or else the sentence `stopped`."""
    global _continued
    _continued = None
    try:
        return work()
    except ForgeError as error:
        tell(error)
        return 2
    except KeyboardInterrupt:
        print(f"stopped at once; {how_to_continue()}" if _continued else stopped, file=sys.stderr)
        return 130


@contextmanager
def continued_by(command: str) -> Iterator[None]:
    """In this block, and after a Ctrl-C that ends it, `command` is what continues the work from its last checkpoint."""
    global _continued
    before, _continued = _continued, command
    try:
        yield
    except KeyboardInterrupt:
        before = command
        raise
    finally:
        _continued = before


def how_to_continue() -> str:
    """What a process that ends at once says of how its work goes on."""
    if _continued is None:
        return "nothing that could be continued was begun: give the same command again"
    return f"continue from the last checkpoint with\n  {_continued}"


def tell(error: ForgeError) -> None:
    """Print an error's sentence, once."""
    if not error.said:
        error.said = True
        print(f"error: {error}", file=sys.stderr, flush=True)
