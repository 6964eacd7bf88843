"""Train a vision Mamba classifier with Ray Train. Without arguments: the quickstart preset, on digits, on CPU.

python ray_jobs/train.py
python ray_jobs/train.py --preset v2 --data.dataset cifar10 --scaling.num-workers 2
python ray_jobs/train.py --resume runs/v2/20260101-120000-seed0
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mamba.config.cli import TrainArgs, parse_train_args
from mamba.config.counts import check_given
from mamba.config.schema import RunConfig
from mamba.errors import ConfigError, ForgeError
from ray_jobs.launch.ending import continued_by, exit_code
from ray_jobs.launch.intent import say_intent
from ray_jobs.launch.recipe import to_train


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 finished, 2 an error of the user's, 130 interrupted (resumable)."""

    def work() -> int:
        args = parse_train_args(argv, description=(__doc__ or "").split("\n")[0])
        if args.resume is None:
            check_given(["train"], args.given, [args.config])
        wanted = to_train(args)
        if args.dry_run:
            from ray_jobs.launch.dry_run import dry_run

            return dry_run(wanted)
        say_intent(args)
        print("loading PyTorch and the data ...", flush=True)  # seconds without a word look like a hang
        config = wanted.resolve()
        if config.scaling.num_workers == 0:
            return _train(args, config)
        from ray_jobs.launch.ahead import begun

        with begun(config, lambda text: print(text, flush=True)):  # while PyTorch is imported and the data read
            return _train(args, config)

    return exit_code(work, "stopped at once; continue from the last checkpoint with --resume")


def _train(args: TrainArgs, config: RunConfig) -> int:
    from mamba.runs.folder import create_run, discard_if_unused, exclusive, finished_result
    from mamba.runs.provenance import own_split, with_split
    from mamba.runs.start import described, keep_start, prepare_resume
    from ray_jobs.launch.console import Display, result_table, stop_on_signal
    from ray_jobs.launch.resume import check_run, extend, is_longer
    from ray_jobs.launch.run import preflight, run

    if args.resume is None:
        if config.prune.method != "none":
            raise ConfigError(f"prune.method '{config.prune.method}' is for ray_jobs/prune.py; valid here: none")
        config = with_split(described(config))
        preflight(config)
        folder = create_run(config)
    else:
        folder = args.resume.absolute()
        check_run(folder)
        config = own_split(config, folder)

    again = f"python {os.path.relpath(__file__)} --resume {folder}"
    with exclusive(folder), continued_by(again), Display(folder) as display, stop_on_signal(folder, display):
        display.say(f"run folder: {folder}")
        result = finished_result(folder)
        more = args.resume is not None and is_longer(folder, config)
        if result is not None and not more:
            display.say("finished already:")
        else:
            try:
                if args.resume is not None:
                    preflight(config, folder)
                    prepare_resume(folder)
                if more:
                    display.say(extend(folder, config))
                keep_start(config, folder)
                result = run(config, folder, display.say)
            except ForgeError:
                if args.resume is None:
                    discard_if_unused(folder)
                raise
    if result["status"] == "interrupted":
        display.say(f"interrupted in epoch {result['epoch'] + 1} after {result['step']} of its steps; continue with")
        display.say(f"  {again}")
        return 130
    display.show(result_table(result))
    display.say(f"run folder: {folder}")
    display.say(f"compare runs: tensorboard --logdir {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
