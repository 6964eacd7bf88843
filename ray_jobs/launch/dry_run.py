"""What would be trained, without training it: the resolved config, parameters, images, steps."""

from __future__ import annotations

from collections.abc import Sequence

from mamba.config.counts import trains_first
from mamba.config.help import quiet_pipe
from mamba.config.schema import RunConfig
from mamba.data.loader import check_batch_size
from mamba.data.registry import describe
from mamba.errors import ConfigError
from mamba.models.model import parameters_of
from mamba.runs.checkpoint import parameters_in
from mamba.runs.provenance import with_split
from mamba.runs.start import check_start, described
from pruning.plans import get_plan
from ray_jobs.launch.run import check_early


def dry_run(config: RunConfig, plan: str | None = None, given: Sequence[str] = ()) -> int:
    """Print what a run of a config, or its rounds of pruning, would train, or what a plan would cut; returns 0.

    Raises:
        ForgeError: what can be found wrong without starting anything.
    """
    config = with_split(config.resolve())
    check_early(config)
    if plan is not None:
        get_plan(plan, config.cut)
        if config.model.checkpoint is None:
            raise ConfigError("--plan prunes a trained model: give --checkpoint, a run's folder or a checkpoint's")
    classes, train_images = describe(config.data, config.seed)
    check_batch_size(train_images, config.data)
    side, own, teacher = config.data.img_size, config.model, config.distill.teacher
    assert side is not None  # resolved
    steps = train_images // config.data.batch_size
    if own.checkpoint is None:
        parameters = parameters_of(own, classes, side)
    else:
        key = "model.checkpoint" if plan is None else "--checkpoint"  # whose remedies a plan does not take
        check_start(own.checkpoint, classes, side, key, own.new_head, own.new_size)
        config, parameters = described(config), parameters_in(own.checkpoint)
    if teacher is not None:
        check_start(teacher, classes, side, "distill.teacher")
    with quiet_pipe():
        print(config.to_yaml(), end="")
        print(f"# parameters: {parameters:,}")
        print(f"# training images: {train_images:,} in {classes} classes")
        if plan is not None:
            trains = trains_first(config, given)
            how = f"after a training under penalty.kind {config.penalty.kind}" if trains else "nothing is trained"
            print(f"# plan {plan}: {get_plan(plan, config.cut).purpose}; applied once, {how}")
            if trains:
                print(f"# steps: {steps:,} an epoch, {steps * config.optim.epochs:,} in all")
            return 0
        rounds = _rounds(config) if config.prune.method != "none" else []
        print(f"# steps: {steps:,} an epoch, {steps * config.optim.epochs:,} {'a round' if rounds else 'in all'}")
        print("".join(f"# {line}\n" for line in rounds), end="")
        if rounds:
            trained = len(rounds) - (config.model.checkpoint is not None)
            print(f"# steps of all rounds: {trained * steps * config.optim.epochs:,}")
    return 0


def _rounds(config: RunConfig) -> list[str]:
    """A line for each round of pruning."""
    prune, trains = config.prune, f"trains {config.optim.epochs} epochs"
    first = "the model as it is, not trained" if config.model.checkpoint else trains
    back = "its trained model" if config.model.checkpoint else f"epoch {prune.rewind_epoch}"
    kept = [(1 - prune.rate) ** k for k in range(1, prune.rounds + 1)]
    return [
        f"round 0: dense, {first}",
        *(
            f"round {k}: {prune.method}, {100 * share:.1f} % of the weights of prune.target {prune.target}, "
            f"from {back} of round 0, {trains}"
            for k, share in enumerate(kept, 1)
        ),
    ]
