"""Connecting to Ray: the user's running cluster where there is one, else a local one that ends with this process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import ray

from mamba.config.choices import PLUGINS
from mamba.errors import ConfigError, TrainingError, reason
from ray_jobs.launch.ending import how_to_continue
from ray_jobs.launch.waiting import told

Result = TypeVar("Result")
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # by default a report costs 2 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints would come twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own banner; its verbosity 0 silences the older output
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # its own TensorBoard files would take over the HPARAMS tab
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no objective, and must not end the sweep
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train's controller does so
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default, which it warns about otherwise
}
"""Environment variables that Ray reads when a cluster or a run starts; a user's own setting wins."""
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOOK_S = 0.2
"""Seconds between two looks at the processes of a local cluster."""


@dataclass(frozen=True)
class Cluster:
    """What the cluster has in all, and where it runs ("a local cluster", or whose it is and at which address).
    `private`: it was started here, and ends with this process."""

    cpus: int
    gpus: int
    where: str
    private: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Running:
    """A Ray cluster of this machine."""

    address: str
    uid: int

    @property
    def owner(self) -> str:
        with contextlib.suppress(ImportError, KeyError):
            import pwd

            return pwd.getpwuid(self.uid).pw_name
        return f"user {self.uid}"


class Waited(Protocol):
    def wait(self) -> object: ...


_current: Cluster | None = None
"""What this process is connected to."""
ahead: Waited | None = None
"""A thread that is connecting (`ray_jobs.launch.ahead`)."""


@contextlib.contextmanager
def connected(announce: Callable[[str], None]) -> Iterator[Cluster]:
    """Connect for the length of a block; within a connection, to the same. A cluster started here ends with it; a
    running one is left as it is.

    A running cluster is one that `RAY_ADDRESS` names (as inside a Ray job) or that this user's `ray start` started on
    this machine; another user's is joined only where RAY_ADDRESS names it. RAY_ADDRESS=local always starts a local one.

    Raises:
        ConfigError: the cluster that RAY_ADDRESS names cannot be reached.
        TrainingError: Ray cannot be started here.
        KeyboardInterrupt: Ctrl-C or SIGTERM came while Ray was starting.
    """
    global _current
    if ahead is not None:
        ahead.wait()
        _take_back_signals()
    if _current is not None:
        yield _current
        return
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    where, local = "the running cluster", False
    if not ray.is_initialized():
        where, local = _connect(announce)
    for name in ("ray", "ray.train", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    over = threading.Event()
    if local:
        _without_state_dumps()
        threading.Thread(target=_watch, args=(_processes(), announce, over), daemon=True).start()
    try:
        total = ray.cluster_resources()
        _current = Cluster(int(total.get("CPU", 1)), int(total.get("GPU", 0)), where, local)
        yield _current
    finally:
        _current = None
        over.set()
        with told("Ray to end", announce):
            ray.shutdown()


@contextlib.contextmanager
def connected_if(wanted: bool, announce: Callable[[str], None]) -> Iterator[None]:
    """`connected`, where a cluster is wanted at all."""
    with connected(announce) if wanted else contextlib.nullcontext():
        yield


def on_one_gpu(gpu: bool, work: Callable[..., Result], *args: Any) -> Result:
    """What `work(*args)` returns, computed on a GPU of the connected cluster that nothing else uses meanwhile; without
    one, in this process."""
    if not gpu:
        return work(*args)
    import ray

    found: Result = ray.get(ray.remote(num_gpus=1)(work).remote(*args))
    return found


def _take_back_signals() -> None:
    """Ray starting in another thread puts its own handler of SIGTERM before ours: it prints a stack, calls ours, and
    aborts the process three seconds later, in the middle of an orderly stop."""
    if threading.current_thread() is threading.main_thread():
        signal.alarm(0)
        handler = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, handler if handler is not None else signal.SIG_DFL)


def _connect(announce: Callable[[str], None]) -> tuple[str, bool]:
    """Join a cluster or start one. Returns where it is, and whether it was started here."""
    asked = os.environ.get("RAY_ADDRESS") or "auto"
    address = asked
    if asked == "auto":
        mine, others = _of_this_user(running_clusters())
        address = mine[-1].address if mine else "local"
        for other in others:
            announce(
                f"{other.owner}'s Ray cluster at {other.address} is left alone (RAY_ADDRESS={other.address} joins it)"
            )
        if mine:
            announce(
                f"joining your Ray cluster at {address} (RAY_ADDRESS=local would start one for this command alone) ..."
            )
    if address == "local":
        announce("starting Ray on this machine ...")
        with signals_held(announce), told("Ray to start", announce):
            _start()
        return "a local cluster", True
    if asked != "auto":
        announce(f"connecting to the Ray cluster at {address} ...")
    try:
        with signals_held(announce), told(f"the Ray cluster at {address}", announce):
            ray.init(address=address, **QUIET, **_plugins())
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{'RAY_ADDRESS' if asked != 'auto' else 'the Ray cluster at'} {address} cannot be reached "
            f"({reason(error)}); start that cluster, or set RAY_ADDRESS=local to start one"
        ) from None
    owners = [c.owner for c in running_clusters() if c.address == address]
    return f"the running cluster at {address}{f' of {owners[0]}' if owners else ''}", False


def _plugins() -> dict[str, Any]:
    """Every process of the cluster is to know the same registries."""
    plugins = os.environ.get(PLUGINS)
    return {"runtime_env": {"env_vars": {PLUGINS: plugins}}} if plugins else {}


def _start() -> None:
    try:
        ray.init(address="local", include_dashboard=False, num_cpus=_allotted(), **QUIET, **_plugins())
    except (Exception, SystemExit) as error:
        with contextlib.suppress(Exception):
            ray.shutdown()
        raise TrainingError(
            f"Ray could not be started on this machine ({reason(error)}); on a busy one try again, or wait longer with "
            "RAY_raylet_start_wait_time_s=120; --scaling.num-workers 0 trains without Ray"
        ) from None


def _allotted() -> int | None:
    """CPUs of this process where a scheduler gave it only some of the machine; Ray would count them all."""
    mine = len(os.sched_getaffinity(0))
    return mine if mine < (os.cpu_count() or mine) else None


@contextlib.contextmanager
def signals_held(announce: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C or SIGTERM in this block ends it as soon as it is over, a second one at once: cut short while it starts,
    Ray leaves processes behind or hides the interrupt in an error of its own. Handlers are as before afterwards (Ray
    takes SIGTERM over)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt
        announce(f"{signal.Signals(number).name}: ending once Ray has started (again to end at once)")

    before = {number: signal.signal(number, hold) for number in SIGNALS}
    try:
        yield
    except Exception:
        if came:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    if came:
        with told("Ray to end", announce):
            ray.shutdown()
        raise KeyboardInterrupt


def running_clusters(proc: Path = Path("/proc")) -> list[Running]:
    """The Ray clusters that have a node on this machine, by their raylets; oldest first. Empty without a /proc."""
    found: dict[str, Running] = {}
    processes = sorted((p for p in proc.glob("[0-9]*")), key=lambda p: int(p.name))
    for process in processes:
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if Path(words[0]).name != "raylet":
                continue
            named = [w.partition("=")[2] for w in words if w.startswith(("--gcs-address=", "--gcs_address="))]
            if named and named[0]:
                found[named[0]] = Running(named[0], process.stat().st_uid)
    return list(found.values())


def _of_this_user(clusters: list[Running]) -> tuple[list[Running], list[Running]]:
    """Those of this user that are no process's private ones, and other users'."""
    mine = [c for c in clusters if c.uid == os.getuid()]
    return _started_by_hand(mine), [c for c in clusters if c.uid != os.getuid()]


def _started_by_hand(clusters: list[Running]) -> list[Running]:
    """Of a user's clusters those that `ray start` started, as Ray itself notes the last of them in its folder; a
    command's own local cluster is not to be joined by the next command."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    with contextlib.suppress(OSError):
        current = note.read_text().strip()
        return [c for c in clusters if c.address == current]
    return []


def _without_state_dumps() -> None:
    """Ray prints what an ending raylet wrote into its log, pages of it, before anyone can say what has happened."""
    worker = getattr(getattr(ray, "_private", None), "worker", None)
    original = getattr(worker, "print_to_stdstream", None)
    if original is None or hasattr(original, "shortens"):
        return

    def shortened(data: dict[str, Any], *args: Any, **options: Any) -> None:
        if not any("Raylet is terminated" in str(line) for line in data.get("lines", ())):
            original(data, *args, **options)

    shortened.shortens = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = shortened  # type: ignore[union-attr]


def _processes() -> list[tuple[str, Any]]:
    """Name and handle of the processes without which a local cluster does not live."""
    node = getattr(getattr(ray, "_private", None), "worker", None)
    everything = getattr(getattr(node, "_global_node", None), "all_processes", None) or {}
    vital = ("gcs_server", "raylet")
    return [(name, info.process) for name in vital for info in everything.get(name, [])]


def _watch(processes: list[tuple[str, Any]], announce: Callable[[str], None], over: threading.Event) -> None:
    """End this process in a sentence when a vital one of its local cluster has died: Ray itself would be silent for a
    minute, or print pages, and then abort."""
    while not over.wait(LOOK_S):
        for name, process in processes:
            if process.poll() is None or over.is_set():
                continue
            announce(
                f"error: Ray's {name} (process {process.pid}) has died, and with it the local cluster; "
                + how_to_continue()
            )
            for _, other in processes:
                with contextlib.suppress(Exception):
                    other.kill()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)
