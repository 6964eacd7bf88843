"""Command lines made of the config's own types: its keys, its bounds, its conversions; tyro writes the help page."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from mamba.config.keys import RETIRED, current, dotted_keys, may_be_none, unknown_key
from mamba.config.presets import PRESETS, get_preset
from mamba.config.schema import RunConfig
from mamba.errors import ConfigError


@dataclass(frozen=True)
class TrainArgs:
    """What `ray_jobs/train.py` was asked to do."""

    config: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    preset: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(PRESETS) + "}")] = "quickstart"
    """Start from this named run; every key below overrides it, and shows its value as the default."""
    resume: Path | None = None
    """Continue the run in this folder exactly where it stopped. Of the keys below only scaling.* may be given with
    it; the rest is read from the folder."""
    dry_run: bool = False
    """Print what would run and exit: the resolved config, and parameters and steps, or the trials of a sweep."""


@dataclass(frozen=True)
class PruneArgs(TrainArgs):
    """What `ray_jobs/prune.py` was asked to do."""

    plan: Annotated[str | None, tyro.conf.arg(metavar="{stage1,stage2,stage3}")] = None
    """Instead of rounds: apply this plan once to --checkpoint, and print what it cost and bought."""


@dataclass(frozen=True)
class SweepArgs(TrainArgs):
    """What `ray_jobs/tune.py` was asked to do."""

    space: str | None = None
    """The search space: a YAML file, or the name of one in search_spaces/."""
    trials: int | None = None
    """Trials of a search in all; None: what the space says."""
    gpus_per_trial: float | None = None
    """GPUs that a trial holds, fractions allowed; None: 1 to train, 0.25 to measure."""
    storage: str | None = None
    """URL of the Optuna study; None: a SQLite file in the experiment's folder."""


@dataclass(frozen=True)
class AblateArgs(TrainArgs):
    """What `ray_jobs/ablate.py` was asked to do."""

    grid: Annotated[str, tyro.conf.arg(metavar="{components,layers,joint,all}")] = "all"
    """Which grids: each component at each rate; each block alone; combinations; or all of them."""
    gpus_per_trial: float | None = None
    """GPUs that a trial holds, fractions allowed; None: 0.25."""


PRUNE_SHORT = {name: f"prune.{name}" for name in ("method", "target", "rate", "rounds")} | {
    "checkpoint": "model.checkpoint"
}
"""Short names of keys that `ray_jobs/prune.py` also takes."""


PRUNE_DEFAULTS = {"prune.method": "refill", "name": "prune", "trial": None}


def parse_train_args(argv: Sequence[str] | None = None, description: str = "") -> TrainArgs:
    """Parse a command line; `--help` prints and exits.

    Raises:
        ConfigError: an unknown key or preset, a value out of bounds, keys that do not go with `--resume`.
    """
    return _parse(TrainArgs, argv, "train.py", description, {}, {})


Recipe = Callable[[Path], RunConfig]
"""Reads from a checkpoint how it was trained."""


def parse_prune_args(argv: Sequence[str] | None = None, description: str = "", *, recipe_of: Recipe) -> PruneArgs:
    """As `parse_train_args`, with `--plan` and the short names of PRUNE_SHORT; the method defaults to refill. Without
    --preset, what starts from a checkpoint takes over the config that trained it, by `recipe_of`."""
    args = _parse(PruneArgs, argv, "prune.py", description, PRUNE_SHORT, PRUNE_DEFAULTS, recipe_of)
    assert isinstance(args, PruneArgs)
    return args


def parse_sweep_args(argv: Sequence[str] | None = None, description: str = "", *, recipe_of: Recipe) -> SweepArgs:
    """As `parse_prune_args`, for a search; `--checkpoint` is the trained model that measure trials cut."""
    args = _parse(SweepArgs, argv, "tune.py", description, CHECKPOINT, {"name": "search", "trial": None}, recipe_of)
    assert isinstance(args, SweepArgs)
    return args


def parse_ablate_args(argv: Sequence[str] | None = None, description: str = "", *, recipe_of: Recipe) -> AblateArgs:
    """As `parse_prune_args`, for the ablation grids of a trained model, `--checkpoint`."""
    args = _parse(
        AblateArgs, argv, "ablate.py", description, CHECKPOINT, {"name": "ablation", "trial": None}, recipe_of
    )
    assert isinstance(args, AblateArgs)
    return args


CHECKPOINT = {"checkpoint": "model.checkpoint"}


def _parse(
    kind: type[TrainArgs],
    argv: Sequence[str] | None,
    prog: str,
    description: str,
    short: dict[str, str],
    defaults: dict[str, str | None],
    recipe_of: Recipe | None = None,
) -> TrainArgs:
    options = {field.name for field in fields(kind)} - {"config", "dry_run"}
    launch, values = _split(list(sys.argv[1:] if argv is None else argv), options, short)
    preset = launch.get("preset", "quickstart")
    base = get_preset(preset)
    checkpoint = values.get("model.checkpoint")
    if recipe_of and checkpoint and "preset" not in launch:
        base = recipe_of(Path(checkpoint))
    base = base.with_values(defaults)
    if "resume" in launch:
        extra = [f"--{key}" for key in values if not key.startswith("scaling.")]
        extra += [f"--{key}" for key in launch if key not in ("resume", "dry_run", "help")]
        if extra:
            raise ConfigError(f"--resume continues a run as it was: leave out {', '.join(extra)}")
        base = _config_in(Path(launch["resume"]))
    counts = ("model.checkpoint", "model.drop_path", "model.sync_batchnorm")
    ignored = [f"--{k}" for k in values if k.startswith("model.") and k not in counts]
    if values.get("model.checkpoint") and ignored:
        raise ConfigError(
            f"model.checkpoint brings its own widths: leave out {', '.join(ignored)}; of model.* only model.drop_path "
            "and model.sync_batchnorm go with it"
        )
    given = {key: _typed(kind, key, launch[key]) for key in options - {"preset", "resume"} if key in launch}
    args = kind(
        config=base.with_values(values),
        preset=preset,
        resume=Path(launch["resume"]) if "resume" in launch else None,
        dry_run="dry_run" in launch,
        **given,
    )
    if "help" in launch:
        if short:
            words = ", ".join(f"--{name} for --{key}" for name, key in short.items())
            description += f" Short names: {words}."
        tyro.cli(kind, args=["--help"], default=args, prog=prog, description=description)
    return args


def _typed(kind: type[TrainArgs], key: str, text: str) -> int | float | str:
    """An option's text as the type that it is declared with."""
    declared = next(str(field.type) for field in fields(kind) if field.name == key)
    try:
        return int(text) if declared.startswith("int") else float(text) if declared.startswith("float") else text
    except ValueError:
        what = "a whole number" if declared.startswith("int") else "a number"
        raise ConfigError(f"--{key.replace('_', '-')} {text}: {what} is needed") from None


def _config_in(folder: Path) -> RunConfig:
    """The config of a run's folder, or of an experiment's."""
    experiment = folder / "experiment.json"
    if not folder.is_dir():
        raise ConfigError(f"--resume {folder}: there is no such folder")
    if not experiment.exists():
        return RunConfig.from_yaml(folder / "config.yaml")
    return RunConfig.stored(json.loads(experiment.read_text())["config"], experiment)


def _split(words: list[str], options: set[str], short: dict[str, str]) -> tuple[dict[str, str], dict[str, str | None]]:
    """A command line's launch options and its config keys with their values as text, which the config converts.

    `--key value` and `--key=value`, with `-` or `_` inside of names.
    """
    known = dotted_keys()
    launch: dict[str, str] = {}
    values: dict[str, str | None] = {}
    rest = iter(words)
    for word in rest:
        if word in ("-h", "--help", "--dry-run"):
            launch["dry_run" if word == "--dry-run" else "help"] = ""
            continue
        if not word.startswith("--"):
            raise ConfigError(f"unexpected word '{word}'; options are given as --key value (see --help)")
        flag, equals, value = word[2:].partition("=")
        key = flag.replace("-", "_")
        key = short.get(key, key)
        if key not in known and key not in options and key not in RETIRED:
            raise unknown_key(key)
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{flag} needs a value (see --help)")
        if key in launch or key in values:
            raise ConfigError(f"--{flag} is given twice")
        if key in options:
            launch[key] = value
        else:
            values[key] = None if value.lower() == "none" and may_be_none(RETIRED.get(key) or key) else value
    return launch, current(values, "the command line")
