"""The words that a key takes: those that the config lists, and those of entries that were added from outside.

What ships is a `Literal` on its key, for help, completion and errors, and an entry of a `Registry` in the room that
does it; a test compares both. Code outside of the package adds an entry to a registry, and the key takes its name:

    from mamba.train.optim import OPTIMIZERS
    OPTIMIZERS["mine"] = make_mine          # now --optim.optimizer mine

The commands import the modules that the environment variable MAMBA_FORGE_PLUGINS names (`mine,my.other`), in every
process of theirs, so that each knows the same entries. No file can name them: files are data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, TypeVar, get_args

from mamba.errors import ConfigError

PLUGINS = "MAMBA_FORGE_PLUGINS"
Entry = TypeVar("Entry")
_added: dict[str, list[str]] = {}
_by: dict[tuple[str, str], str | None] = {}
"""Key and name of what was added -> the plug-in whose import added it."""
_importing: str | None = None


class Registry(dict[str, Entry]):
    """What a key chooses from: name -> entry. An entry that is set later makes its name a word of the key.

    Args:
        key: the dotted key.
        entries: those that ship.
        besides: words of the key that need no entry.
        facts: where the config keeps what it has to know of each word (`mamba.config.facts`).
        fact: what it has to know of an entry.
    """

    def __init__(
        self,
        key: str,
        entries: Mapping[str, Entry],
        besides: tuple[str, ...] = (),
        facts: dict[str, Any] | None = None,
        fact: Callable[[Entry], Any] = lambda entry: None,
    ) -> None:
        super().__init__(entries)
        self.key, self.besides, self.shipped = key, besides, tuple(entries)
        self.facts, self.fact = {} if facts is None else facts, fact

    def __setitem__(self, name: str, entry: Entry) -> None:
        """Raises ConfigError for a name that is no word, is another's, or an entry of another kind than what ships."""
        self._check(name, entry)
        self.facts[name] = self.fact(entry)
        super().__setitem__(name, entry)
        words = _added.setdefault(self.key, [])
        if name not in (*words, *self.shipped, *self.besides):
            words.append(name)

    def _check(self, name: str, entry: Entry) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9]\w*([.+-]\w+)*", name) or name.lower() == "none":
            raise ConfigError(f"{self.key}: {name!r:.40} is no name; valid: letters, digits and _")
        if name in (*self.shipped, *self.besides):
            raise ConfigError(f"{self.key}: '{name}' is what ships; tables would say it of both: choose another name")
        other = _by.get((self.key, name), _importing)
        if name in self and other != _importing:
            both = [f"the plug-in {one}" if one else "code outside of plug-ins" for one in (other, _importing)]
            raise ConfigError(f"{self.key}: '{name}' is added by {' and by '.join(both)}; rename one of them")
        own = next(iter(self.values()))
        if not (callable(entry) if callable(own) else isinstance(entry, type(own))):
            raise ConfigError(
                f"{self.key}: '{name}' is a {type(entry).__name__}; valid: a "
                f"{'function' if callable(own) else type(own).__name__}, as what ships"
            )
        _by[self.key, name] = _importing

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.facts.pop(name, None)
        if name in _added.get(self.key, []):
            _added[self.key].remove(name)


def added(key: str) -> tuple[str, ...]:
    """The words that a dotted key takes besides those that ship."""
    return tuple(_added.get(key, ()))


def words_of(annotation: Any) -> tuple[str, ...]:
    """The words of a type: of a `Literal`, or of the literals in a union."""
    found: list[str] = []
    for arg in get_args(annotation):
        found += [arg] if isinstance(arg, str) else words_of(arg)
    return tuple(found)


@cache
def load_plugins() -> None:
    """Import the modules that MAMBA_FORGE_PLUGINS names, once in a process.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    global _importing
    for name in filter(None, os.environ.get(PLUGINS, "").split(",")):
        try:
            _importing = name.strip()
            import_module(_importing)
        except ConfigError as error:
            raise ConfigError(f"{PLUGINS}: {name}: {error}") from None
        except Exception as error:
            raise ConfigError(f"{PLUGINS}: {name} cannot be imported ({type(error).__name__}: {error})") from error
        finally:
            _importing = None
