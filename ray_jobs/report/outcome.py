"""A sweep from its command line to its end: results.csv, the report, a table of the best, a text, the exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from mamba.config.cli import TrainArgs
from mamba.config.help import quiet_pipe
from mamba.errors import ForgeError
from mamba.runs.inputs import keep_inputs
from ray_jobs.launch.ending import continued_by
from ray_jobs.launch.recipe import cut_again
from ray_jobs.report.findings import findings
from ray_jobs.report.rows import ranked
from ray_jobs.report.table import show, write_results
from ray_jobs.sweep import experiment, results
from ray_jobs.sweep.results import refused
from ray_jobs.sweep.run import check_data, run

SHOWN = 10
"""Trials in the table at the end."""


def perform(args: TrainArgs, asked: Callable[[], experiment.Experiment], script: str) -> int:
    """What an entry script does once its words are parsed: outline an experiment, continue one, or create and run it.

    Args:
        args: `resume` and `dry_run` count.
        asked: the experiment of these words, where none is continued; may take its time.
        script: how the user calls it.

    Returns, raises: as `conclude`; 0 after an outline.
    """
    if args.dry_run:
        told = experiment.load(args.resume) if args.resume else asked()
        with quiet_pipe():
            print(experiment.outline(told))
            for line in _estimate(told, args.resume).splitlines():
                print(f"# {line}")
        return 0
    if args.resume:
        folder = args.resume.absolute()
        keep_inputs(folder, *check_data(experiment.load(folder)))
        return conclude(folder, script)
    wanted = asked()
    inputs = check_data(wanted)  # first, so that what is refused leaves no folder behind
    folder = experiment.create(wanted, sys.argv)
    try:
        keep_inputs(folder, *inputs)
        return conclude(folder, script)
    except ForgeError:
        experiment.discard_if_unused(folder)
        raise


def _estimate(told: experiment.Experiment, folder: Path | None) -> str:
    """Time and disk, in lines; why not, where the machine or the data do not let them be measured."""
    from ray_jobs.sweep.estimate import estimated, left_of

    if told.space.kind == "measure" and told.checkpoint is None:
        return "time and disk: not measured, the model that is cut has yet to be trained"
    try:
        return estimated(told, left_of(folder, told) if folder else None)
    except ForgeError as error:
        return f"time and disk: not measured, {error}"


def conclude(folder: Path, script: str) -> int:
    """Run an experiment to its end, or as far as it gets, and say what came out.

    Returns:
        0 all trials ended well; 1 some failed; 130 interrupted.

    Raises:
        ForgeError: before trials start.
    """
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"folder: {folder}", markup=False)

    def say(text: str) -> None:
        console.print(text, markup=False)

    def write_table() -> None:
        write_results(folder / "results.csv", results.rows(folder))

    again = f"python {script} --resume {folder}"
    with continued_by(again):
        ended, rows = run(folder, say, write_table)
    write_table()
    failed = [row for row in rows if row["status"] == "failed"]
    told = experiment.load(folder)
    objective, mode = told.space.first_objective
    best = ranked(rows, objective, mode)
    show(best[:SHOWN], first=list(told.space.objectives))
    if len(best) > SHOWN:
        console.print(f"the best {SHOWN} of {len(best)}; all of them: {folder / 'results.csv'}", markup=False)
    for sentence in refused(folder):  # of a sweep that was interrupted
        console.print(f"left out: {sentence}", markup=False)
    for row in failed:
        console.print(f"failed: {row['trial']}: {row['reason']}", markup=False)
    text = findings(rows, results.baseline_of(folder), told.space.objectives)
    console.print(text, markup=False)
    if told.space.kind == "measure" and told.checkpoint and best and best[0]["status"] == "finished":
        config = told.config.with_values(best[0]["values"])
        if not config.cut.finetune_epochs:  # else the trial's folder has the model
            console.print(f"the model of {best[0]['trial']}: {cut_again(told.checkpoint, config)}", markup=False)
    if rows:
        from ray_jobs.report.page import write_report  # draws: nothing that a sweep should wait for before it starts

        console.print(f"report: {write_report(folder, rows, text)}", markup=False)
    console.print(f"table: {folder / 'results.csv'}", markup=False)
    if not ended:
        console.print(f"interrupted; continue with\n  {again}", markup=False)
        return 130
    return 1 if failed else 0
