"""The words that a key takes: those that the config lists, and those of entries that were added from outside.

What ships is a `Literal` on its key, for help, completion and errors. A registry (data sets, mixers, optimizers, ...)
that takes an entry from outside the package also names it here, so that a config may say it.
"""

from __future__ import annotations

from typing import Any, get_args

_added: dict[str, list[str]] = {}


def add_choice(key: str, word: str) -> None:
    """Let a dotted key take one more word, in this process. A word that it takes already changes nothing."""
    words = _added.setdefault(key, [])
    if word not in words:
        words.append(word)


def remove_choice(key: str, word: str) -> None:
    """Undo `add_choice`, for tests."""
    if word in _added.get(key, []):
        _added[key].remove(word)


def added(key: str) -> tuple[str, ...]:
    """The words that a key takes besides those that ship."""
    return tuple(_added.get(key, ()))


def words_of(annotation: Any) -> tuple[str, ...]:
    """The words of a type: of a `Literal`, or of the literals in a union."""
    found: list[str] = []
    for arg in get_args(annotation):
        found += [arg] if isinstance(arg, str) else words_of(arg)
    return tuple(found)
