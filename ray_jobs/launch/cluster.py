"""Connecting to Ray: the running cluster where there is one, else a local one that ends with this process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from mamba.config.choices import PLUGINS
from mamba.errors import ConfigError

RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # by default a report costs 2 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints would come twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own banner; its verbosity 0 silences the older output
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # its own TensorBoard files would take over the HPARAMS tab
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no objective, and must not end the sweep
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default, which it warns about otherwise
}
"""Environment variables that Ray reads when a cluster or a run starts; a user's own setting wins."""


@dataclass(frozen=True)
class Cluster:
    """What the cluster has in all, and where it runs ("local" or its address)."""

    cpus: int
    gpus: int
    where: str


_current: Cluster | None = None
"""What this process is connected to."""


@contextlib.contextmanager
def connected(announce: Callable[[str], None]) -> Iterator[Cluster]:
    """Connect for the length of a block; within a connection, to the same. A cluster started here ends with it; a
    running one is left as it is.

    A running cluster is one that `RAY_ADDRESS` names (as inside a Ray job) or that `ray start` started on this machine;
    RAY_ADDRESS=local always starts a local one.

    Raises:
        ConfigError: the cluster that RAY_ADDRESS names cannot be reached.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if plugins := os.environ.get(PLUGINS):  # every process knows the same registries
        quiet["runtime_env"] = {"env_vars": {PLUGINS: plugins}}
    where = "the running cluster"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    global _current
    if _current is not None:
        yield _current
        return
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "auto")
        told = {"auto": "connecting to Ray, or starting it on this machine", "local": "starting Ray on this machine"}
        announce(f"{told.get(address, f'connecting to the Ray cluster at {address}')} ...")
        try:
            ray.init(address=address, **quiet, **({"include_dashboard": False} if address == "local" else {}))
        except (ConnectionError, ValueError, RuntimeError) as error:
            if address != "auto":
                raise ConfigError(
                    f"RAY_ADDRESS {address} cannot be reached ({error}); start that cluster, or unset RAY_ADDRESS to "
                    "use the one on this machine or to start one"
                ) from None
            address = "local"
            ray.init(address=address, include_dashboard=False, **quiet)
        if address == "local":
            where = "a local cluster"
    for number, handler in handlers.items():  # ray.init takes SIGTERM over; give it back to who had it
        if callable(handler):
            signal.signal(number, handler)
    for name in ("ray", "ray.train", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        total = ray.cluster_resources()
        _current = Cluster(int(total.get("CPU", 1)), int(total.get("GPU", 0)), where)
        yield _current
    finally:
        _current = None
        ray.shutdown()


@contextlib.contextmanager
def connected_if(wanted: bool, announce: Callable[[str], None]) -> Iterator[None]:
    """`connected`, where a cluster is wanted at all."""
    with connected(announce) if wanted else contextlib.nullcontext():
        yield
