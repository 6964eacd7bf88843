"""A TorchTrainer that goes on with fewer workers where a node is lost, of the numbers that divide the batch.

Ray's elastic policy restarts a worker group with as many workers as the nodes that are left have room for, whatever
that number is. A step needs equal shares, so the largest number that gives them is taken. While it trains, a group is
left alone: a restart costs the steps since the last checkpoint, and a node that comes back is used from the next
restart on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mamba.config.schema import RunConfig
from mamba.errors import ConfigError

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


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
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision

    class OfCounts(ElasticScalingPolicy):
        def _count_possible_workers(self, reserved_resources: Any) -> int:
            room = super()._count_possible_workers(reserved_resources)
            return max((count for count in counts if count <= room), default=0)

        def make_decision_for_running_worker_group(self, *_: Any, **__: Any) -> ScalingDecision:
            self._maybe_send_resource_request()
            return NoopDecision()

    class Elastic(TorchTrainer):
        def _initialize_and_run_controller(self, **needs: Any) -> Any:
            return super()._initialize_and_run_controller(**{**needs, "scaling_policy": OfCounts(self.scaling_config)})

    return Elastic
