"""What a command is about to do, in one line before its first seconds of silence. Imports no torch."""

from __future__ import annotations

from mamba.config.cli import AblateArgs, PruneArgs, TrainArgs

PLACES = {"out", "name", "trial", "seed", "scaling", "tracking", "checkpoint"}
"""Keys, and groups of them, that change nothing of what is trained or cut."""


def say_intent(args: TrainArgs) -> None:
    """Print it; nothing where a folder is continued or nothing is going to run."""
    if args.resume is None and not args.dry_run:
        print(intent(args), flush=True)


def intent(args: TrainArgs) -> str:
    """One sentence: what is trained or cut, on which images, for how long, and what changes that."""
    config = args.config
    data = f"the images in {config.data.root}" if config.data.dataset == "folder" else config.data.dataset
    epochs = f"{config.optim.epochs} epochs" if config.optim.epochs != 1 else "1 epoch"
    checkpoint = config.model.checkpoint
    source = str(args.file) if args.file else f"preset {args.preset}"
    subject = f"the model of {checkpoint}" if checkpoint else f"a new model ({source})"
    own = {key.partition(".")[0] for key in args.over} - PLACES
    hints = ["all that can be changed: --help"] if not own and args.file is None else []
    if isinstance(args, PruneArgs) and args.plan is not None:
        how = "the rates of cut.*" if args.plan == "own" else f"the plan {args.plan}"
        return f"pruning {subject} once, by {how}"
    if isinstance(args, PruneArgs):
        prune = config.prune
        given = {"mixers": prune.ssm_rate, "MLPs": prune.mlp_rate}
        rates = {part: prune.rate if rate is None else rate for part, rate in given.items() if any(given.values())}
        each = " and ".join(f"{100 * rate:g} % of the {part}'" for part, rate in rates.items())
        each = each or f"{100 * prune.rate:g} % of the"
        rounds = f"{prune.rounds} round{'s'[: prune.rounds > 1]} of {prune.method}, each of {each} weights left"
        done = f"pruning {subject}: {rounds}, with {epochs} of training on {data} in each"
        done += "" if checkpoint else " and before the first"
    elif isinstance(args, AblateArgs):
        grids = "all grids" if args.grid == "all" else f"the grid {args.grid}"
        first = "" if checkpoint else f"training {subject} on {data} for {epochs} first, then "
        done = f"{first}cutting {subject if checkpoint else 'it'} in every way of {grids}, on {data}"
    else:
        return "; ".join([f"training {subject} on {data} for {epochs}", *hints])
    trained = ["of a trained model: --checkpoint RUN"] if checkpoint is None else []
    return "; ".join([done, *trained, *hints])
