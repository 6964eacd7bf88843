"""Prune a vision Mamba: rounds of training, pruning and rewinding, each a Ray Train run; or one plan, applied once.

python ray_jobs/prune.py --method refill --rounds 3
python ray_jobs/prune.py --preset v2 --method rsst --target mlp --rate 0.5 --rounds 4 --checkpoint runs/v2/TRIAL
python ray_jobs/prune.py --plan stage2 --checkpoint runs/quickstart/first
python ray_jobs/prune.py --plan own --cut.mlp 0.7 --cut.structured True --checkpoint runs/quickstart/first
python ray_jobs/prune.py --resume runs/prune/20260101-120000-seed0
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mamba.config.cli import parse_prune_args
from mamba.config.counts import check_given, work_of
from ray_jobs.launch.ending import exit_code
from ray_jobs.launch.intent import say_intent
from ray_jobs.launch.recipe import recipe_of


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 finished, 2 an error of the user's, 130 interrupted (resumable)."""

    def prune() -> int:
        args = parse_prune_args(argv, description=(__doc__ or "").split("\n")[0], recipe_of=recipe_of)
        if args.resume is None:
            work = work_of(args.plan, args.config, args.given) if args.plan else "rounds"
            check_given([work], args.given, [args.config])
        if args.dry_run:
            from pruning.rounds import check_rounds
            from ray_jobs.launch.dry_run import dry_run

            if args.plan is None:
                check_rounds(args.config)
            return dry_run(args.config, args.plan, args.given)
        say_intent(args)
        if args.plan:
            from ray_jobs.launch.plan import run_plan

            return run_plan(args)
        from ray_jobs.launch.series import run_series

        return run_series(args, "ray_jobs/prune.py")

    return exit_code(prune, "stopped; continue with --resume and the folder named above")


if __name__ == "__main__":
    sys.exit(main())
