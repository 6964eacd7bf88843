"""Saying what is waited for, so that nothing that takes long is silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_S = 5.0
"""Seconds between two lines about the same wait."""


class Wait:
    """Something that may take long: asked now and then, it says so while it lasts."""

    def __init__(self, what: str, lasts: Callable[[], bool], every: float | None = None) -> None:
        self.what, self.lasts, self.every = what, lasts, EVERY_S if every is None else every
        self.began: float | None = None
        self.said = 0

    def look(self, announce: Callable[[str], None]) -> None:
        if not self.lasts():
            self.began = None
            return
        now = time.monotonic()
        if self.began is None:
            self.began, self.said = now, 0
        if now - self.began >= (self.said + 1) * self.every:
            self.said += 1
            announce(f"waiting for {self.what}, {now - self.began:.0f} s so far")


@contextmanager
def told(what: str, announce: Callable[[str], None], every: float | None = None) -> Iterator[None]:
    """While a block that blocks this thread takes long, say what it waits for."""
    over = threading.Event()
    wait = Wait(what, lambda: not over.is_set(), every)

    def speak() -> None:
        wait.look(announce)
        while not over.wait(min(0.5, wait.every)):
            wait.look(announce)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
