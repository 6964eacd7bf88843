"""Command lines made of the config's own types: its keys, its bounds, its conversions.

Values come, each over the one before, from the preset, from `--config FILE`, and from the command line itself.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from tyro.conf import FlagConversionOff, FlagCreatePairsOff, Suppress, arg

from mamba.config.counts import BESIDE_CHECKPOINT
from mamba.config.files import read_yaml
from mamba.config.help import show_completion, show_help
from mamba.config.keys import stored_values
from mamba.config.presets import PRESETS, get_preset
from mamba.config.schema import RunConfig
from mamba.config.words import split_words
from mamba.errors import ConfigError, reason


@dataclass(frozen=True)
class TrainArgs:
    """What `ray_jobs/train.py` was asked to do."""

    config: Annotated[RunConfig, arg(name=""), FlagConversionOff]
    preset: Annotated[str, arg(metavar="{" + ",".join(PRESETS) + "}")] = "quickstart"
    """Start from this named run; every key below overrides it, and shows its value as the default."""
    file: Annotated[Path | None, arg(name="config", metavar="FILE.yaml")] = None
    """Keys and values over the preset's, under the command line's own: any of them, or a run's own config.yaml."""
    resume: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Continue the run in this folder exactly where it stopped; of the keys below only scaling.* and tracking.* go
    with it, and more optim.epochs to train on."""
    dry_run: Annotated[bool, FlagCreatePairsOff] = False
    """Print what would run and exit: the resolved config, and parameters and steps, or the trials of a sweep."""
    given: Annotated[tuple[str, ...], Suppress] = ()
    """Keys of the config that the command line itself names."""
    over: Annotated[dict[str, Any], Suppress] = field(default_factory=dict)
    """Keys and values over the preset's, of the command line and its file; `preset` among them where it was named."""


@dataclass(frozen=True)
class PruneArgs(TrainArgs):
    """What `ray_jobs/prune.py` was asked to do."""

    plan: Annotated[str | None, arg(metavar="{stage1,stage2,stage2_output,stage3,own}")] = None
    """Instead of rounds: apply this plan once to --checkpoint, and print what it cost and bought; own: the rates of
    cut.*."""


@dataclass(frozen=True)
class SweepArgs(TrainArgs):
    """What `ray_jobs/tune.py` was asked to do."""

    space: str | None = None
    """The search space: a YAML file, or the name of one in search_spaces/."""
    trials: int | None = None
    """Trials of a search in all, also of one that is continued; None: what the space says."""
    gpus_per_trial: float | None = None
    """GPUs that a trial holds, fractions allowed; None: 1 to train, 0.25 to measure."""
    storage: str | None = None
    """URL of the Optuna study; None: a SQLite file in the experiment's folder."""
    warm_start: Annotated[Path | None, arg(metavar="EXPERIMENT")] = None
    """Begin a search with the best of the search in this folder, as far as it is within this space."""


@dataclass(frozen=True)
class AblateArgs(TrainArgs):
    """What `ray_jobs/ablate.py` was asked to do."""

    grid: Annotated[str, arg(metavar="{components,layers,joint,all}")] = "all"
    """Which grids: each component at each rate; each block alone; combinations; or all of them."""
    gpus_per_trial: float | None = None
    """GPUs that a trial holds, fractions allowed; None: 0.25."""


Args = TypeVar("Args", bound=TrainArgs)


@dataclass(frozen=True)
class Command(Generic[Args]):
    """A command line of ours."""

    kind: type[Args]
    prog: str
    first: Mapping[str, Sequence[str]]
    """The keys that people use first: what `--help` shows, under headings."""
    defaults: Mapping[str, str | None] = field(default_factory=dict)
    """Values of keys where they are not the preset's."""
    short: Mapping[str, str] = field(default_factory=dict)
    """Names of keys that it also takes: short -> dotted key."""
    with_resume: Sequence[str] = ("scaling",)
    """Options and groups of keys that go with --resume."""


WHERE = ("name", "out", "scaling.num_workers")
TRAIN = Command(
    TrainArgs,
    "train.py",
    {
        "data": ("data.dataset", "data.root"),
        "model": ("model.name", "model.checkpoint"),
        "training": ("optim.epochs", "optim.lr", "data.batch_size"),
        "run": WHERE,
    },
    with_resume=("scaling", "tracking", "optim.epochs"),  # a finished run takes more epochs
)
PRUNE = Command(
    PruneArgs,
    "prune.py",
    {
        "pruning": ("model.checkpoint", "prune.method", "prune.target", "prune.rate", "prune.rounds"),
        "training": ("data.dataset", "optim.epochs"),
        "run": WHERE,
    },
    {"prune.method": "refill", "name": "prune", "trial": None},
    {name: f"prune.{name}" for name in ("method", "target", "rate", "ssm_rate", "mlp_rate", "rounds")}
    | {"checkpoint": "model.checkpoint"},
)
TUNE = Command(
    SweepArgs,
    "tune.py",
    {
        "search": ("model.checkpoint", "seed"),
        "data": ("data.dataset", "data.root"),
        "training": ("model.name", "optim.epochs", "data.batch_size"),
        "run": WHERE,
    },
    {"name": "search", "trial": None},
    {"checkpoint": "model.checkpoint"},
    ("trials",),
)
ABLATE = Command(
    AblateArgs,
    "ablate.py",
    {
        "ablation": ("model.checkpoint", "cut.structured", "cut.criterion", "cut.finetune_epochs", "seed"),
        "data": ("data.dataset", "data.root"),
        "run": WHERE,
    },
    {"name": "ablation", "trial": None},
    {"checkpoint": "model.checkpoint"},
    (),
)

Recipe = Callable[[Path], RunConfig]
"""Reads from a checkpoint how it was trained."""


def parse_train_args(argv: Sequence[str] | None = None, description: str = "") -> TrainArgs:
    """Parse a command line; `--help`, `--help-all` and tyro's completion print and exit.

    Raises:
        ConfigError: an unknown key or preset, a value out of bounds, keys that do not go with `--resume`.
    """
    return parse(TRAIN, argv, description)


def parse_prune_args(argv: Sequence[str] | None = None, description: str = "", *, recipe_of: Recipe) -> PruneArgs:
    """As `parse_train_args`, with `--plan` and short names; the method defaults to refill. Without --preset, what
    starts from a checkpoint takes over the config that trained it, by `recipe_of`."""
    return parse(PRUNE, argv, description, recipe_of)


def parse_sweep_args(argv: Sequence[str] | None = None, description: str = "", *, recipe_of: Recipe) -> SweepArgs:
    """As `parse_prune_args`, for a search; `--checkpoint` is the trained model that measure trials cut."""
    return parse(TUNE, argv, description, recipe_of)


def parse_ablate_args(argv: Sequence[str] | None = None, description: str = "", *, recipe_of: Recipe) -> AblateArgs:
    """As `parse_prune_args`, for the ablation grids of a trained model, `--checkpoint`."""
    return parse(ABLATE, argv, description, recipe_of)


def parse(
    command: Command[Args],
    argv: Sequence[str] | None = None,
    description: str = "",
    recipe_of: Recipe | None = None,
) -> Args:
    """What a command line asks for; see `parse_train_args` and `parse_prune_args`."""
    words = list(sys.argv[1:] if argv is None else argv)
    kind, prog = command.kind, _prog(command.prog)
    options = {f.name for f in fields(kind)} - {"dry_run", "file", "given", "over"}
    given, values = split_words(words, options | {"completion"}, command.short)
    if "completion" in given:
        show_completion(
            kind, kind(get_preset("quickstart").with_values(dict(command.defaults))), prog, given["completion"]
        )
    config, preset, from_file = _config(command, given, values, recipe_of)
    own = {name: _typed(kind, name, given[name]) for name in options - {"preset", "resume", "config"} if name in given}
    args = kind(
        config=config,
        preset=preset,
        file=Path(given["config"]) if "config" in given else None,
        resume=Path(given["resume"]) if "resume" in given else None,
        dry_run="dry_run" in given,
        given=tuple(values),
        over={**from_file, **values, **({"preset": preset} if "preset" in given else {})},
        **own,
    )
    if "help" in given or "help_all" in given:
        if command.short:
            named = ", ".join(f"--{name} for --{key}" for name, key in command.short.items())
            description += f" Short names: {named}."
        show_help(kind, args, prog, description, None if "help_all" in given else command.first)
    return args


def _config(
    command: Command[Any], given: Mapping[str, str], values: dict[str, str | None], recipe_of: Recipe | None
) -> tuple[RunConfig, str, dict[str, Any]]:
    """The config that a command line asks for, the preset below it, and what a file gave."""
    preset = given.get("preset", "quickstart")
    if "resume" in given:
        fine = ("resume", "dry_run", "help", "help_all", *command.with_resume)
        extra = [f"--{key}" for key in (*values, *given) if key not in fine and key.split(".")[0] not in fine]
        if extra:
            raise ConfigError(f"--resume continues a run as it was: leave out {', '.join(extra)}")
        return stored_config(Path(given["resume"])).with_values(values), preset, {}
    from_file = _from_file(Path(given["config"])) if "config" in given else {}
    checkpoint = {**from_file, **values}.get("model.checkpoint")
    own = recipe_of(Path(checkpoint)) if recipe_of and checkpoint and "preset" not in given else None
    base = own or get_preset(preset)
    # a size that is named is that size, whatever the preset or the file says of width and depth
    named = dict.fromkeys(("model.d_model", "model.depth")) if values.get("model.name") else {}
    config = base.with_values({**command.defaults, **from_file, **named, **values})
    counts = ("model.checkpoint", *BESIDE_CHECKPOINT)
    ignored = [f"--{k}" for k in values if k.startswith("model.") and k not in counts]
    if config.model.checkpoint and ignored:
        raise ConfigError(
            f"model.checkpoint brings its own widths: leave out {', '.join(ignored)}; of model.* only "
            f"{', '.join(BESIDE_CHECKPOINT)} go with it"
        )
    return config, preset, from_file


def _from_file(path: Path) -> dict[str, Any]:
    """Keys and values of a file; of a run's own config.yaml, without what names that run."""
    if path.is_dir() and (path / "config.yaml").exists():
        path = path / "config.yaml"
    if not path.exists():
        raise ConfigError(f"--config {path}: there is no such file")
    values = stored_values(read_yaml(path, "a config"), path)
    if values.get("trial") == path.absolute().parent.name:
        del values["trial"]
    return values


def stored_config(folder: Path) -> RunConfig:
    """The config of a run's folder, or of an experiment's.

    Raises:
        ConfigError: there is no such folder, or none of both in it that can be read.
    """
    experiment = folder / "experiment.json"
    if not folder.is_dir():
        raise ConfigError(f"--resume {folder}: there is no such folder")
    if not experiment.exists():
        return RunConfig.from_yaml(folder / "config.yaml")
    try:
        tree = json.loads(experiment.read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{experiment} is damaged: {reason(error)}") from None
    return RunConfig.stored(tree, experiment)


def _prog(script: str) -> str:
    """What the user called: the script, or the command that was installed for it."""
    called = os.path.basename(sys.argv[0])
    return called if called.startswith("mamba-") else script


def _typed(kind: type[TrainArgs], key: str, text: str) -> int | float | str | Path:
    """An option's text as the type that it is declared with."""
    declared = next(str(field.type) for field in fields(kind) if field.name == key)
    try:
        if "Path" in declared:
            return Path(text)
        return int(text) if declared.startswith("int") else float(text) if declared.startswith("float") else text
    except ValueError:
        what = "a whole number" if declared.startswith("int") else "a number"
        raise ConfigError(f"--{key.replace('_', '-')} {text[:80]}: {what} is needed") from None
