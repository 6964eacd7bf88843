"""Learn what can be cut from a trained model: every component, every block, and combinations, one trial each.

python ray_jobs/ablate.py --grid all --checkpoint runs/v2/TRIAL
python ray_jobs/ablate.py --grid components --preset quickstart          (trains a small model on digits first)
python ray_jobs/ablate.py --resume runs/ablation
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mamba.config.cli import AblateArgs, parse_ablate_args
from mamba.errors import ConfigError
from ray_jobs.launch.ending import exit_code
from ray_jobs.launch.intent import say_intent
from ray_jobs.launch.recipe import recipe_of

if TYPE_CHECKING:
    from ray_jobs.sweep.experiment import Experiment

GRIDS = {"components": "component_ablation", "layers": "layer_sensitivity", "joint": "joint_pruning"}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all trials ended well, 1 some failed, 2 an error of the user's, 130 interrupted."""

    def work() -> int:
        args = parse_ablate_args(argv, description=(__doc__ or "").split("\n")[0], recipe_of=recipe_of)
        if args.grid in (*GRIDS, "all"):
            say_intent(args)
        from ray_jobs.report.outcome import perform  # after the words: imports ray

        return perform(args, lambda: _experiment(args), "ray_jobs/ablate.py")

    return exit_code(work, "stopped; continue with --resume and the experiment's folder")


def _experiment(args: AblateArgs) -> Experiment:
    from mamba.models.model import Architecture
    from mamba.runs.checkpoint import architecture_in, find_checkpoint
    from mamba.runs.provenance import with_split
    from ray_jobs.sweep.baseline import trained_baseline
    from ray_jobs.sweep.checks import check, check_cuts, check_given
    from ray_jobs.sweep.experiment import FILE, Experiment, absolute, taken
    from ray_jobs.sweep.grid import expand
    from ray_jobs.sweep.space import load_space

    chosen = list(GRIDS) if args.grid == "all" else [args.grid]
    if not set(chosen) <= set(GRIDS):
        raise ConfigError(f"unknown grid '{args.grid}'; valid: {', '.join(GRIDS)}, all")
    config, resolved = absolute(args.config), args.config.resolve()
    folder = config.out / config.name
    if (folder / FILE).exists():
        raise taken(folder)  # before a baseline is trained for it
    checkpoint = config.model.checkpoint
    if checkpoint is None:
        own = Architecture.from_config(resolved.model, 10, resolved.data.img_size or 0)  # classes do not matter
    else:
        config, own = with_split(config, checkpoint), architecture_in(find_checkpoint(checkpoint))
    spaces = [load_space(GRIDS[name]) for name in chosen]
    many = len(spaces) > 1
    trials = [
        t for n, s in zip(chosen, spaces, strict=True) for t in expand(s, len(own.blocks), f"{n}-" if many else "")
    ]
    question = spaces[0].question if not many else "What does each cut cost: components, blocks, combinations?"
    cost = " ".join(space.cost for space in spaces)
    grids = [{**{key: [value] for key, value in s.fixed.items()}, **grid} for s in spaces for grid in s.grids]
    space = spaces[0].model_copy(update={"question": question, "cost": cost, "fixed": {}, "grids": grids})
    for sentence in check_given(space, config, args.given, args.over):
        print(f"note: {sentence}", file=sys.stderr)
    config = config.with_values({"model.checkpoint": None})
    check(space, trials, config, args.given, baseline=checkpoint is None)
    check_cuts(space, trials, config, own)
    if checkpoint is None and not args.dry_run:
        checkpoint = trained_baseline(resolved, folder)
        config = with_split(config, checkpoint)
    return Experiment(space, trials, config, checkpoint, args.gpus_per_trial, None, len(trials))


if __name__ == "__main__":
    sys.exit(main())
