"""A command line's words: which are options of the command, which are keys of the config, and what they say."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from mamba.config.keys import RETIRED, choices, current, dotted_keys, may_be_none, unknown_key
from mamba.errors import ConfigError

SWITCHES = {"--dry-run": "dry_run", "--dry_run": "dry_run", "-h": "help", "--help": "help", "--help-all": "help_all"}
"""Options without a value."""


def split_words(
    words: Sequence[str], options: Collection[str], short: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str | None]]:
    """The options of a command and the keys of the config, with their values as text, which the config converts.

    Args:
        words: `--key value` or `--key=value`, with `-` or `_` inside of names.
        options: of the command that take a value; those of SWITCHES are known.
        short: names of keys that the command takes besides: short -> dotted key.

    Raises:
        ConfigError: a word that is none of these, a value that is missing, a key that is given twice.
    """
    known = dotted_keys()
    given: dict[str, str] = {}
    values: dict[str, str | None] = {}
    rest = iter(words)
    for word in rest:
        if word in SWITCHES:
            given[SWITCHES[word]] = ""
            continue
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"unexpected word '{word[:80]}'; options are given as --key value (see --help)")
        flag, equals, value = word[2:].partition("=")
        key = flag.replace("-", "_")
        key = short.get(key, key)
        if key not in known and key not in options and key not in RETIRED:
            raise unknown_key(key[:80])
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{flag} needs a value (see --help)")
        if key in given or key in values:
            raise ConfigError(f"--{flag} is given twice")
        if key in options:
            given[key] = value
        else:
            values[key] = value_of(key, value)
    return given, current(values, "the command line")


def value_of(key: str, text: str) -> str | None:
    """What a word says of a key: None where it is `none`, the key takes None, and `none` is none of its choices."""
    name = RETIRED.get(key) or key
    return None if text.lower() == "none" and may_be_none(name) and text not in choices(name) else text
