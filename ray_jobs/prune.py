"""Prune a vision Mamba: rounds of training, pruning and rewinding, each a Ray Train run; or one plan, applied once.

python ray_jobs/prune.py --method refill --rounds 3
python ray_jobs/prune.py --preset v2 --method rsst --target mlp --rate 0.5 --rounds 4 --checkpoint runs/v2/TRIAL
python ray_jobs/prune.py --plan stage2 --checkpoint runs/quickstart/first
python ray_jobs/prune.py --resume runs/prune/20260101-120000-seed0
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamba.config.cli import PruneArgs, parse_prune_args
from mamba.config.schema import RunConfig
from mamba.errors import ConfigError, ForgeError
from ray_jobs.launch.ending import exit_code
from ray_jobs.launch.recipe import recipe_of
from ray_jobs.train import dry_run


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 finished, 2 an error of the user's, 130 interrupted (resumable)."""

    def work() -> int:
        args = parse_prune_args(argv, description=(__doc__ or "").split("\n")[0], recipe_of=recipe_of)
        if args.dry_run:
            return dry_run(args)
        return _plan(args) if args.plan else _rounds(args)

    return exit_code(work, "stopped; continue with --resume and the folder named above")


def _rounds(args: PruneArgs) -> int:
    from rich.console import Console

    from mamba.data.registry import load_data
    from mamba.runs.folder import create_run, discard_if_unused, exclusive
    from pruning.report import rounds_figure, rounds_table
    from pruning.rounds import Engine, check_rounds, check_series, run_rounds
    from ray_jobs.launch.cluster import connected_if
    from ray_jobs.launch.measure import measure
    from ray_jobs.launch.run import preflight

    config = args.config.resolve()
    if args.resume is None:
        check_rounds(config)
        preflight(config)
        folder = create_run(config)
    else:
        folder = args.resume.absolute()
        check_series(folder, config)
        start = folder / "start"  # a series is complete by itself, wherever its model came from
        preflight(config.with_values({"model.checkpoint": start if start.exists() else config.model.checkpoint}))
    console = Console(highlight=False, soft_wrap=True)
    say = lambda text: console.print(text, markup=False)  # noqa: E731
    say(f"folder: {folder}")
    try:
        with exclusive(folder), connected_if(config.scaling.num_workers != 0, say):
            data = load_data(config.data, config.seed)
            rows = run_rounds(config, folder, data, Engine(_train, measure, say))
    except ForgeError:
        if args.resume is None:
            discard_if_unused(folder)
        raise
    if rows is None:
        say(f"interrupted; continue with\n  python {os.path.relpath(__file__)} --resume {folder}")
        return 130
    console.print(rounds_table(rows))
    say(f"table: {folder / 'rounds.csv'}\nfigure: {rounds_figure(folder, rows)}")
    last = folder / f"round-{config.prune.rounds:02d}" / "pruned"
    say(f"pruned model: {last}\ntrain it on: python ray_jobs/train.py --model.checkpoint {last} ...")
    return 0


def _train(config: RunConfig, folder: Path) -> dict[str, Any]:
    """One round's training, with its progress shown and the first Ctrl-C turned into a checkpoint."""
    from mamba.runs.folder import finished_result
    from mamba.runs.start import prepare_resume
    from ray_jobs.launch.console import Display, stop_on_signal
    from ray_jobs.launch.run import run

    done = finished_result(folder)
    if done is not None:
        return done
    prepare_resume(folder)
    with Display(folder) as display, stop_on_signal(folder, display):
        return run(config, folder, lambda text: display.say(f"{folder.name}: {text}"))


def _plan(args: PruneArgs) -> int:
    from rich.console import Console

    from mamba.data import load_data
    from mamba.runs import checkpoint as ckpt
    from mamba.runs.files import write_json
    from mamba.runs.folder import create_run, exclusive
    from pruning.lite import describe
    from pruning.plans import apply_plan, get_plan
    from pruning.report import before_after_table
    from pruning.rounds import calibration_batches
    from pruning.store import masks_of, save_pruned
    from ray_jobs.launch.cluster import connected_if
    from ray_jobs.launch.measure import compare
    from ray_jobs.launch.run import preflight

    assert args.plan is not None
    plan = get_plan(args.plan)
    config = args.config.resolve()
    if config.model.checkpoint is None:
        raise ConfigError("--plan prunes a trained model: give --checkpoint, a run's folder or a checkpoint's")
    model, description = ckpt.load_model(config.model.checkpoint)
    preflight(config)
    images = calibration_batches(load_data(config.data, config.seed), config.seed) if config.cut.repair else None
    masks = masks_of(config.model.checkpoint)
    pruned = apply_plan(model, args.plan, calibration=images, seed=config.seed, masks=masks, repair=config.cut.repair)
    folder = create_run(config.with_values({"prune.method": "none"}))
    with exclusive(folder):
        description = {**description, "plan": args.plan}
        path = save_pruned(folder / "checkpoints" / "best-00000", pruned.model, pruned.masks, description)
        console = Console(highlight=False, soft_wrap=True)
        with connected_if(config.scaling.num_workers != 0, lambda text: console.print(text, markup=False)):
            before, after = compare(config, [config.model.checkpoint, path])
        write_json(folder / "pruned.json", {"plan": args.plan, "before": before, "after": after})
    console.print(f"{args.plan}: {plan.purpose}", markup=False)
    console.print(
        f"before: {describe(model.architecture)}\nafter:  {describe(pruned.model.architecture)}", markup=False
    )
    console.print(before_after_table(before, after))
    console.print(f"pruned model: {path}", markup=False)
    console.print(f"fine-tune it: python ray_jobs/train.py --model.checkpoint {path} ...", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
