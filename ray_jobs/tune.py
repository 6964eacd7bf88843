"""Search a space with Optuna, on all the GPUs of the cluster: recipes by training, pruning rates by measuring.

python ray_jobs/tune.py --space quickstart
python ray_jobs/tune.py --space search_spaces/recipe.yaml --preset v2 --optim.epochs 30 --trials 40
python ray_jobs/tune.py --space pruning --checkpoint runs/v2/TRIAL --gpus-per-trial 0.25
python ray_jobs/tune.py --resume runs/search
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mamba.config.cli import SweepArgs, parse_sweep_args
from mamba.errors import ConfigError
from ray_jobs.launch.ending import exit_code
from ray_jobs.launch.recipe import recipe_of

if TYPE_CHECKING:
    from ray_jobs.sweep.experiment import Experiment


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all trials ended well, 1 some failed, 2 an error of the user's, 130 interrupted."""

    def work() -> int:
        args = parse_sweep_args(argv, description=(__doc__ or "").split("\n")[0], recipe_of=recipe_of)
        from ray_jobs.report.outcome import perform  # after the words: imports ray

        return perform(args, lambda: _experiment(args), "ray_jobs/tune.py")

    return exit_code(work, "stopped; continue with --resume and the experiment's folder")


def _experiment(args: SweepArgs) -> Experiment:
    from ray_jobs.sweep.experiment import Experiment
    from ray_jobs.sweep.space import expand, load_space

    if args.space is None:
        raise ConfigError("--space is missing: a YAML file, or the name of one in search_spaces/")
    space = load_space(args.space)
    config = args.config.resolve()
    checkpoint = config.model.checkpoint
    if space.kind == "measure" and checkpoint is None:
        raise ConfigError("a space of kind measure cuts a trained model: give --checkpoint")
    trials = expand(space, config.model.depth or 0) if space.grids else []
    count = len(trials) or (space.trials if args.trials is None else args.trials)
    if count < 1:
        raise ConfigError(f"--trials {count} draws nothing; at least 1")
    config = config.with_values({"model.checkpoint": None}) if space.kind == "measure" else config
    return Experiment(space, trials, config, checkpoint, args.gpus_per_trial, args.storage, count)


if __name__ == "__main__":
    sys.exit(main())
