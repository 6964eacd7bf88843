"""Starting Ray while something else is being done: imports, and reading or decoding the data. Imports no torch."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from mamba.config.schema import RunConfig
from mamba.errors import ForgeError
from ray_jobs.launch import cluster
from ray_jobs.launch.ending import tell
from ray_jobs.launch.waiting import told


@contextlib.contextmanager
def begun(config: RunConfig, announce: Callable[[str], None]) -> Iterator[None]:
    """Connect to Ray in a thread while the block runs, if its config will need it; `cluster.connected` in the block
    waits for it. Nothing is started where a look at the config shows that the block will refuse it."""
    if config.scaling.num_workers == 0 or not plausible(config):
        yield
        return
    ahead = Ahead(lambda: cluster.connected(announce))
    with sigterm_interrupts():
        cluster.ahead = ahead
        try:
            yield
        except ForgeError as error:
            tell(error)  # now, and not when Ray has started and ended
            raise
        finally:
            cluster.ahead = None
            ahead.end(announce)


class Ahead:
    """A connection made and ended in a thread; what it raises is raised where it is waited for.

    The thread lives as long as the connection: the processes of a local cluster end with the thread that started them.
    """

    def __init__(self, connected: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
        self.connected = connected
        self.error: BaseException | None = None
        self.ready, self.over = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self.connected():
                self.ready.set()
                self.over.wait()
        except BaseException as error:
            self.error = error
        finally:
            self.ready.set()

    def wait(self) -> None:
        """Until it is connected; at once in the thread itself."""
        if threading.current_thread() is not self.thread:
            self.ready.wait()
            if self.error is not None:
                raise self.error

    def end(self, announce: Callable[[str], None]) -> None:
        """End the connection, once it is made: cut short it leaves processes behind."""
        self.over.set()
        if not self.ready.is_set():
            announce("ending once Ray has started (again to end at once)")
            with told("Ray to start, to end it", announce):
                self.ready.wait()
        self.thread.join()


def plausible(config: RunConfig) -> bool:
    """Whether a config looks as if it could run: what can be seen of it without torch and without its data."""
    places = (config.model.checkpoint, config.distill.teacher)
    try:
        config.check_workers(config.scaling.num_workers or 1, gpu=True)
    except ForgeError:
        return False
    root = config.data.root
    if config.data.dataset == "folder" and (root is None or not root.is_dir()):
        return False
    if any(place is not None and not place.is_dir() for place in places):
        return False
    return not (config.trial and (config.out / config.name / config.trial / "config.yaml").exists())


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM in this block is as Ctrl-C is."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
