"""A TorchTrainer without the processes of Ray Train that serve nothing here. Knows no torch until it is asked.

On a cluster of its own a run needs its controller, a synchronisation actor and the workers. Ray starts three more
processes, each of which imports Ray Train for seconds: one for Ray datasets, one that asks an autoscaler for nodes, and
one that frees the workers' place should the controller die alone. Its controller also carries environment variables
that every process of this cluster has already, and because of which no process that waits idle may be used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

SPARE = ("PlacementGroupCleanerCallback", "DatasetsCallback")
"""Callbacks that start processes of their own."""


def trainer_class(private: bool) -> type[TorchTrainer]:
    """TorchTrainer, or, on a cluster that is this process's own, one with fewer processes; TorchTrainer too where this
    version of Ray is made otherwise."""
    from ray.train.torch import TorchTrainer

    if not private:
        return TorchTrainer
    try:
        return _lean()
    except (ImportError, AttributeError):
        return TorchTrainer


def _lean() -> type[TorchTrainer]:
    import ray
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    for name in ("_send_resource_request", "_maybe_send_resource_request", "_cancel_resource_request"):
        getattr(FixedScalingPolicy, name)
    getattr(TorchTrainer, "_create_default_callbacks")  # noqa: B009
    getattr(TorchTrainer, "_initialize_and_run_controller")  # noqa: B009

    class NoAutoscaler(FixedScalingPolicy):
        def _send_resource_request(self) -> None: ...

        def _maybe_send_resource_request(self) -> None: ...

        def _cancel_resource_request(self) -> None: ...

    class Lean(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [c for c in super()._create_default_callbacks() if type(c).__name__ not in SPARE]

        def _initialize_and_run_controller(self, **needs: Any) -> Any:
            needs["scaling_policy"] = NoAutoscaler(self.scaling_config)
            controller = ray.remote(num_cpus=0)(TrainController).remote(**needs)
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())

    return Lean
