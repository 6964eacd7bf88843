"""A TorchTrainer that goes on with fewer workers where a node is lost, of the numbers that divide the batch.

Ray's elastic policy restarts a worker group with as many workers as the nodes that are left have room for, whatever
that number is. A step needs equal shares, so the largest number that gives them is taken. While it trains, a group is
left alone: a restart costs the steps since the last checkpoint, and a node that comes back is used from the next
restart on.

A node that is drained will go away, as a spot machine does whose time is up. Ray's watcher tells the workers, who save
where they are and end (`ray_jobs.launch.tasks.Drained`): the group starts again at once on the nodes that stay, and has
lost no step. That is no failure, and does not count as one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mamba.config.schema import RunConfig
from mamba.errors import ConfigError
from ray_jobs.launch.tasks import Drained

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

WATCHER = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
"""Ray's own interval of 5 seconds is a part of the half minute that some clouds give."""


def possible_counts(config: RunConfig, most: int, gpu: bool) -> tuple[int, ...]:
    """The numbers of workers that a run may go on with: `most` and, from scaling.min_workers on, all that divide the
    batch; `most` alone where min_workers is not set.

    Raises:
        ConfigError: the least or the greatest of them is above the other, or cannot train.
    """
    config.check_workers(most, gpu)
    least = config.scaling.min_workers
    if least is None:
        return (most,)
    if least > most:
        raise ConfigError(f"scaling.min_workers {least} is above the {most} workers of the run; valid: 1 to {most}")
    try:
        config.check_workers(least, gpu)
    except ConfigError as error:
        raise ConfigError(f"scaling.min_workers {least} cannot be: {error}") from None
    return tuple(n for n in range(least, most + 1) if _fits(config, n, gpu))


def _fits(config: RunConfig, count: int, gpu: bool) -> bool:
    try:
        config.check_workers(count, gpu)
    except ConfigError:
        return False
    return True


def elastic_trainer(counts: Sequence[int]) -> type[TorchTrainer]:
    """A TorchTrainer, for a ScalingConfig with a range of workers, that only takes one of these numbers."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision

    class OfCounts(ElasticScalingPolicy):
        def _count_possible_workers(self, reserved_resources: Any) -> int:
            leaving = _draining()
            stays = {node: resources for node, resources in reserved_resources.items() if node not in leaving}
            room = super()._count_possible_workers(stays)
            return max((count for count in counts if count <= room), default=0)

        def make_decision_for_running_worker_group(self, *_: Any, **__: Any) -> ScalingDecision:
            self._maybe_send_resource_request()
            return NoopDecision()

    class DrainsAreNoFailures(DefaultFailurePolicy):
        def make_decision(self, training_failed_error: Any) -> FailureDecision:
            failures = getattr(training_failed_error, "worker_failures", {}).values()
            if any(isinstance(getattr(error, "_base_exc", error), Drained) for error in failures):
                return FailureDecision.RETRY
            return super().make_decision(training_failed_error)

    class Elastic(TorchTrainer):
        def _initialize_and_run_controller(self, **needs: Any) -> Any:
            own = {
                "scaling_policy": OfCounts(self.scaling_config),
                "failure_policy": DrainsAreNoFailures(self.run_config.failure_config),
            }
            os.environ.update(WATCHER)  # Ray hands them to its controller
            return super()._initialize_and_run_controller(**{**needs, **own})

    return Elastic


def _draining() -> set[str]:
    """Ids of the nodes that are going to go away."""
    with suppress(ImportError, AttributeError):
        from ray._private.state import state

        return set(state.get_draining_nodes())
    return set()
