"""Search a space with Optuna, on all the GPUs of the cluster: recipes by training, pruning rates by measuring.

python ray_jobs/tune.py --space quickstart
python ray_jobs/tune.py --space search_spaces/recipe.yaml --preset v2 --optim.epochs 30 --trials 40
python ray_jobs/tune.py --space pruning --checkpoint runs/v2/TRIAL --gpus-per-trial 0.25
python ray_jobs/tune.py --resume runs/search --trials 40
python ray_jobs/tune.py --space recipe --name again --warm-start runs/search
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
        from ray_jobs.sweep.experiment import more_trials

        if args.resume is not None and args.trials is not None and not args.dry_run:
            before = more_trials(args.resume.absolute(), args.trials)
            print(f"{args.trials} trials in all, {args.trials - before} more than before")
        return perform(args, lambda: _experiment(args), "ray_jobs/tune.py")

    return exit_code(work, "stopped; continue with --resume and the experiment's folder")


def _experiment(args: SweepArgs) -> Experiment:
    from mamba.runs.checkpoint import architecture_in, find_checkpoint
    from mamba.runs.provenance import with_split
    from ray_jobs.sweep.checks import check, check_cuts, check_given
    from ray_jobs.sweep.experiment import Experiment, absolute
    from ray_jobs.sweep.grid import expand
    from ray_jobs.sweep.space import MOST_TRIALS, base_of, load_space
    from ray_jobs.sweep.warm_start import best_of

    if args.space is None:
        raise ConfigError("--space is missing: a YAML file, or the name of one in search_spaces/")
    space = load_space(args.space)
    base = base_of(space, args)
    for sentence in check_given(space, base, args.given, args.over):
        print(f"note: {sentence}", file=sys.stderr)
    config = absolute(base)
    checkpoint = config.model.checkpoint if space.kind == "measure" else None
    if space.kind == "measure":
        if checkpoint is None:
            raise ConfigError("a space of kind measure cuts a trained model: give --checkpoint")
        config = with_split(config, checkpoint).with_values({"model.checkpoint": None})
    own = None if checkpoint is None else architecture_in(find_checkpoint(checkpoint))
    trials = expand(space, len(own.blocks) if own else 0, given=args.over) if space.grids else []
    if trials and (args.trials is not None or args.storage is not None or args.warm_start is not None):
        raise ConfigError("--trials, --storage and --warm-start are of searches; this space has grids, with "
                          f"{len(trials)} trials")  # fmt: skip
    count = len(trials) or (space.trials if args.trials is None else args.trials)
    if not 1 <= count <= MOST_TRIALS:
        raise ConfigError(f"--trials {count} is not possible; valid: 1 to {MOST_TRIALS:,}")
    warm = best_of(args.warm_start.absolute(), space)[:count] if args.warm_start else None
    check(space, trials, config, args.given)
    if own is not None:
        check_cuts(space, trials, config, own)
    return Experiment(space, trials, config, checkpoint, args.gpus_per_trial, args.storage, count, warm_start=warm)


if __name__ == "__main__":
    sys.exit(main())
