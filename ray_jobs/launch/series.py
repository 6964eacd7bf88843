"""Rounds of pruning from the command line: the folder, a display for each training, table and figure at the end."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from mamba.config.cli import PruneArgs
from mamba.config.schema import RunConfig
from mamba.data.registry import load_data
from mamba.errors import ForgeError
from mamba.runs.folder import create_run, discard_if_unused, exclusive, finished_result
from mamba.runs.provenance import own_split, with_split
from mamba.runs.start import prepare_resume
from pruning.record import load_record
from pruning.report import rounds_figure, rounds_table
from pruning.rounds import Engine, check_rounds, check_series, run_rounds
from pruning.show import print_cut
from ray_jobs.launch.console import Display, stop_on_signal
from ray_jobs.launch.ending import continued_by
from ray_jobs.launch.measure import measure
from ray_jobs.launch.recipe import train_on
from ray_jobs.launch.run import preflight, run, workers_for
from ray_jobs.launch.workers import Workers


def run_series(args: PruneArgs, command: str) -> int:
    """Run or continue a series of rounds, and say what came out. `command` is how the user calls it.

    Returns:
        0, or 130 where it was interrupted.

    Raises:
        ForgeError: with a sentence for the user.
    """
    config = args.config.resolve()
    if args.resume is None:
        check_rounds(config)
        config = with_split(config)
        preflight(config)
        folder = create_run(config)
    else:
        folder = args.resume.absolute()
        check_series(folder, config)
        config = own_split(config, folder)
        start = folder / "start"  # a series is complete by itself, wherever its model came from
        preflight(config.with_values({"model.checkpoint": start if start.exists() else config.model.checkpoint}))
    console = Console(highlight=False, soft_wrap=True)
    say = lambda text: console.print(text, markup=False)  # noqa: E731
    say(f"folder: {folder}")
    again = f"python {command} --resume {folder}"
    try:
        # one group of workers for all rounds
        with exclusive(folder), continued_by(again), workers_for(config, folder, say) as workers:
            data = load_data(config.data, config.seed)
            engine = Engine(partial(_train, workers=workers), partial(measure, workers=workers), say)
            rows = run_rounds(config, folder, data, engine)
    except ForgeError:
        if args.resume is None:
            discard_if_unused(folder)
        raise
    if rows is None:
        say(f"interrupted; continue with\n  {again}")
        return 130
    last = folder / f"round-{config.prune.rounds:02d}"
    record = load_record(last)
    if record is not None:
        print_cut(record, last)
    console.print(rounds_table(rows))
    say(f"table: {folder / 'rounds.csv'}\nfigure: {rounds_figure(folder, rows)}")
    if rows[-1].get("val_accuracy") is not None and rows[-1].get("test_accuracy") is not None:
        say(f"test accuracy of the last round, read once: {rows[-1]['test_accuracy']:.2f} %")
    pruned = last / "pruned"
    say(f"pruned model: {pruned}\ntrain it on: {train_on(folder, pruned, config)}")
    return 0


def _train(config: RunConfig, folder: Path, workers: Workers | None) -> dict[str, Any]:
    """One round's training, with its progress shown and the first Ctrl-C turned into a checkpoint."""
    done = finished_result(folder)
    if done is not None:
        return done
    prepare_resume(folder)
    with Display(folder) as display, stop_on_signal(folder, display):
        return run(config, folder, lambda text: display.say(f"{folder.name}: {text}"), workers)
