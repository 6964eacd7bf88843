"""Command lines generated from the config's own types (by tyro), shared by every entry script."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mamba.config import RunConfig, dotted_keys, unknown_key
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
    """Parse a command line; `--help` and syntax errors exit as usual.

    Raises:
        ConfigError: an unknown key or preset, a value out of bounds, keys that do not go with `--resume`.
    """
    argv = _normalise(list(sys.argv[1:] if argv is None else argv))
    preset = _value_of(argv, "--preset") or "quickstart"
    base = get_preset(preset)
    resume = _value_of(argv, "--resume")
    if resume is not None:
        base = RunConfig.from_yaml(Path(resume) / "config.yaml")
        taken = [a[2:] for a in argv if a.startswith("--") and not a.startswith("--scaling.")]
        extra = [a for a in taken if a not in ("resume", "dry-run")]
        if extra:
            raise ConfigError(f"--resume continues a run as it was: leave out --{', --'.join(extra)}")
    return tyro.cli(
        TrainArgs,
        args=argv,
        default=TrainArgs(config=base, preset=preset),
        prog="train.py",
        description=description,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )


def _normalise(argv: list[str]) -> list[str]:
    """Split `--key=value`, spell keys and booleans the one way that tyro reads, and refuse unknown keys early."""
    known = set(dotted_keys())
    launch = {"preset", "resume", "dry_run", "no_dry_run", "help"}
    words: list[str] = []
    for word in argv:
        if not word.startswith("--") or word == "--":
            words.append({"true": "True", "false": "False", "none": "None"}.get(word, word))
            continue
        flag, equals, value = word[2:].partition("=")
        key = flag.replace("-", "_")
        if key not in known | launch:
            raise unknown_key(key)
        words.append("--" + key.replace("_", "-"))
        if equals:
            words.append({"true": "True", "false": "False", "none": "None"}.get(value, value))
    return words


def _value_of(argv: list[str], flag: str) -> str | None:
    at = argv.index(flag) + 1 if flag in argv else len(argv)
    return argv[at] if at < len(argv) else None
