"""Files that lie in two splits: found by size, then by a piece of their middle, then by all bytes, so that of a large
data set little is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from filelock import FileLock

from mamba.data.cache import Progress, data_cache
from mamba.data.listing import Files
from mamba.errors import DataError, reason

PIECE = 4096
"""Bytes that are compared first."""
Place = tuple[int, int]
"""0 or 1, the first or the second split, and the row there."""


def copies(one: Files, other: Files) -> int:
    """How many files of `other` are, byte for byte, files of `one`; counted once, then kept in the data set's cache.

    Raises:
        DataError: a file that cannot be read.
    """
    folder = data_cache(one.root.parent)
    path = folder / f"copies-{one.root.name}-{other.root.name}.json"
    key = f"{one.key('copies')}{other.key('copies')}"
    with FileLock(path.with_suffix(".lock")):
        try:
            found = json.loads(path.read_text())
            if found["key"] == key:
                return int(found["copies"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not there, damaged, or of other files
        number = _count(one, other)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps({"key": key, "copies": number}))
            partial.replace(path)
        except OSError:  # it is counted again
            partial.unlink(missing_ok=True)
    return number


def _count(one: Files, other: Files) -> int:
    both = np.intersect1d(one.sizes, other.sizes)
    splits = (one, other)
    places = [(i, int(row)) for i in (0, 1) for row in np.flatnonzero(np.isin(splits[i].sizes, both))]
    for digest in (_middle, _whole):
        places = _in_both(splits, places, digest)
    return sum(i for i, _ in places)


def _in_both(splits: tuple[Files, Files], places: list[Place], digest: Callable[[Files, int], bytes]) -> list[Place]:
    """The places whose digest is also one of the other split."""
    groups: dict[bytes, list[Place]] = defaultdict(list)
    with ThreadPoolExecutor(16) as pool, Progress("looking for copies", len(places)) as progress:
        for place, found in zip(places, pool.map(lambda p: digest(splits[p[0]], p[1]), places), strict=True):
            groups[found].append(place)
            progress.add(1)
    return [place for group in groups.values() if len({i for i, _ in group}) == 2 for place in group]


def _middle(files: Files, row: int) -> bytes:
    size = int(files.sizes[row])
    return size.to_bytes(8) + _read(files, row, max(0, (size - PIECE) // 2), PIECE)


def _whole(files: Files, row: int) -> bytes:
    return hashlib.blake2b(_read(files, row, 0, -1), digest_size=16).digest()


def _read(files: Files, row: int, start: int, length: int) -> bytes:
    path = files.path(row)
    try:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.blake2b(file.read(length), digest_size=16).digest() if length > 0 else file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({reason(error)}); mend or remove it") from None
