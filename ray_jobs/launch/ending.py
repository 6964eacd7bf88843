"""How a command ends: with an exit code, and one sentence where something went wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable

from mamba.errors import ForgeError


def exit_code(work: Callable[[], int], stopped: str) -> int:
    """What `work` returns; 2 after an error of the user's, whose sentence is printed; 130 after Ctrl-C, with the
    sentence `stopped`."""
    try:
        return work()
    except ForgeError as error:
        tell(error)
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130


def tell(error: ForgeError) -> None:
    """Print an error's sentence, once."""
    if not error.said:
        error.said = True
        print(f"error: {error}", file=sys.stderr, flush=True)
