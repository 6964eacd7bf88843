"""Command lines made of the config's own types: its keys, its bounds, its conversions; tyro writes the help page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mamba.config import RunConfig, dotted_keys, may_be_none, unknown_key
from mamba.errors import ConfigError
from mamba.presets import PRESETS, get_preset


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
    """Print the resolved config, the parameter count and the number of steps, and exit."""


def parse_train_args(argv: Sequence[str] | None = None, description: str = "") -> TrainArgs:
    """Parse a command line; `--help` prints and exits.

    Raises:
        ConfigError: an unknown key or preset, a value out of bounds, keys that do not go with `--resume`.
    """
    launch, values = _split(list(sys.argv[1:] if argv is None else argv))
    preset = launch.get("preset", "quickstart")
    base = get_preset(preset)
    if "resume" in launch:
        extra = [f"--{key}" for key in values if not key.startswith("scaling.")] + ["--preset"] * ("preset" in launch)
        if extra:
            raise ConfigError(f"--resume continues a run as it was: leave out {', '.join(extra)}")
        base = RunConfig.from_yaml(Path(launch["resume"]) / "config.yaml")
    args = TrainArgs(
        config=base.with_values(values),
        preset=preset,
        resume=Path(launch["resume"]) if "resume" in launch else None,
        dry_run="dry_run" in launch,
    )
    if "help" in launch:
        tyro.cli(TrainArgs, args=["--help"], default=args, prog="train.py", description=description)
    return args


def _split(words: list[str]) -> tuple[dict[str, str], dict[str, str | None]]:
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
        if key not in known and key not in ("preset", "resume"):
            raise unknown_key(key)
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{flag} needs a value (see --help)")
        if key in launch or key in values:
            raise ConfigError(f"--{flag} is given twice")
        if key in known:
            values[key] = None if value.lower() == "none" and may_be_none(key) else value
        else:
            launch[key] = value
    return launch, values
