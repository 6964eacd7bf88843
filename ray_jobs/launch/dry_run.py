"""What would be trained, without training it: the resolved config, parameters, images, steps."""

from __future__ import annotations

from mamba.config.help import quiet_pipe
from mamba.config.schema import RunConfig
from mamba.data.loader import check_batch_size
from mamba.data.registry import describe
from mamba.models.model import parameters_of
from mamba.runs.checkpoint import parameters_in
from mamba.runs.provenance import with_split
from mamba.runs.start import check_start, described
from ray_jobs.launch.run import check_early


def dry_run(config: RunConfig) -> int:
    """Print what a run of a config, or each of its rounds, would train; returns 0.

    Raises:
        ForgeError: what can be found wrong without starting anything.
    """
    config = with_split(config.resolve())
    check_early(config)
    classes, train_images = describe(config.data, config.seed)
    check_batch_size(train_images, config.data)
    side, own, teacher = config.data.img_size, config.model, config.distill.teacher
    assert side is not None  # resolved
    steps = train_images // config.data.batch_size
    if own.checkpoint is None:
        parameters = parameters_of(own, classes, side)
    else:
        check_start(own.checkpoint, classes, side, "model.checkpoint", own.new_head, own.new_size)
        config, parameters = described(config), parameters_in(own.checkpoint)
    if teacher is not None:
        check_start(teacher, classes, side, "distill.teacher")
    with quiet_pipe():
        print(config.to_yaml(), end="")
        print(f"# parameters: {parameters:,}")
        print(f"# training images: {train_images:,} in {classes} classes")
        print(f"# steps: {steps:,} an epoch, {steps * config.optim.epochs:,} in all")
    return 0
