"""What an image folder holds: the files that are read, and a count of everything that is not."""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mamba.errors import DataError, reason

HIDDEN = frozenset({"@eaDir", "__MACOSX", "#recycle", "@Recycle", "$RECYCLE.BIN", "lost+found", "Thumbs.db"})
"""What systems leave behind in folders, beside every name that begins with a dot: never read, never a class."""
NO_PICTURES = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "PDF", "EPS", "WMF", "PSD", "IPTC", "FITS", "XVTHUMB"})
"""Formats that Pillow registers and cannot, or not everywhere, decode to one image."""


@lru_cache(maxsize=1)
def endings() -> frozenset[str]:
    """Endings of the files that are read: what this Pillow opens."""
    Image.init()
    return frozenset(e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN) - frozenset(
        e for e, kind in Image.registered_extensions().items() if kind in NO_PICTURES
    )


@dataclass(frozen=True)
class Files:
    """The image files of a split in the order of their rows: class by class, by path. A million take some 60 MB."""

    root: Path
    """The split's folder."""
    blob: bytes
    """Their paths below it, one after the other."""
    ends: NDArray[np.int64]
    """(n,): where each path ends."""
    sizes: NDArray[np.int64]
    """(n,): bytes."""
    times: NDArray[np.int64]
    """(n,): last change, in nanoseconds."""

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, row: int) -> str:
        """Path below the split's folder, with `/`."""
        return os.fsdecode(self.blob[self.ends[row - 1] if row else 0 : self.ends[row]])

    def path(self, row: int) -> Path:
        return self.root / self.name(row)

    def key(self, about: str) -> str:
        """Changes with any file's name, size or time, and with `about`: names a cache."""
        parts = (about.encode(), self.blob, self.ends.tobytes(), self.sizes.tobytes(), self.times.tobytes())
        return hashlib.sha256(b"\n".join(parts)).hexdigest()[:16]

    def digest(self, rows: Sequence[int] | NDArray[np.int64]) -> str:
        """Of the names and sizes of some files: the same wherever they lie, and whenever they were copied."""
        total = hashlib.blake2b(digest_size=8)
        for row in rows:
            name = unicodedata.normalize("NFC", self.name(int(row)))
            total.update(os.fsencode(f"{name}\0{self.sizes[row]}\n"))
        return total.hexdigest()


@dataclass
class Listing:
    """A split's classes and files, and what else lies there."""

    classes: tuple[str, ...]
    files: Files
    labels: NDArray[np.int64]
    unread: Counter[str] = field(default_factory=Counter)
    """Files with other endings, in class folders, by ending."""
    hidden: Counter[str] = field(default_factory=Counter)
    """Hidden files and folders, by name."""
    loose: int = 0
    """Files beside the class folders."""
    deep: int = 0
    """Images that were read from folders within a class's folder."""


def list_split(folder: Path) -> Listing:
    """Every image below folder/<class>/, at any depth, classes and files in the order of their names.

    Raises:
        DataError: a folder that cannot be listed or is empty, a class without images, a file that is not there.
    """
    found = Listing((), pack(folder, []), np.zeros(0, np.int64))
    classes: list[str] = []
    entries: list[tuple[str, int, int]] = []
    labels: list[int] = []
    for entry in _entries(folder):
        if is_hidden(entry.name):
            found.hidden[entry.name] += 1
        elif not entry.is_dir():
            found.loose += 1
        else:
            own: list[tuple[str, int, int]] = []
            unread: Counter[str] = Counter()
            _walk(Path(entry.path), entry.name, own, unread, found, set())
            found.unread += unread
            if not own:
                there = f" (it holds {count(unread)})" if unread else ""
                raise DataError(
                    f"{entry.path} holds no images{there}; valid endings: {', '.join(sorted(endings()))}; remove the "
                    "folder if it is no class"
                )
            own.sort(key=lambda item: item[0].split("/"))
            labels += [len(classes)] * len(own)
            classes.append(entry.name)
            entries += own
    if not classes:
        raise DataError(f"{folder} holds no class folders; it must hold {folder.name}/<class>/<image>")
    found.classes, found.files, found.labels = tuple(classes), pack(folder, entries), np.array(labels, np.int64)
    return found


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN


def count(endings_seen: Counter[str]) -> str:
    """6 .npy, 2 .txt, ..."""
    shown = [f"{number:,} {ending}" for ending, number in endings_seen.most_common(5)]
    more = sum(endings_seen.values()) - sum(number for _, number in endings_seen.most_common(5))
    return ", ".join([*shown, *([f"{more:,} others"] if more else [])])


def _walk(
    folder: Path,
    below: str,
    own: list[tuple[str, int, int]],
    unread: Counter[str],
    found: Listing,
    above: set[tuple[int, int]],
) -> None:
    """Collect (path, size, time) of the images below a class's folder; links to a folder above are not followed."""
    here = folder.stat()
    identity = (here.st_dev, here.st_ino)
    if identity in above:
        return
    for entry in _entries(folder):
        name = f"{below}/{entry.name}"
        if is_hidden(entry.name):
            found.hidden[entry.name if entry.is_dir() else "files"] += 1
            continue
        if entry.is_dir():
            _walk(Path(entry.path), name, own, unread, found, {*above, identity})
            continue
        ending = os.path.splitext(entry.name)[1].lower()
        if ending not in endings():
            unread[ending or "without ending"] += 1
            continue
        try:
            status = entry.stat()
        except OSError as error:
            raise DataError(f"{entry.path} cannot be read ({reason(error)}); mend or remove it") from None
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            unread["that are no files"] += 1
            continue
        own.append((name, status.st_size, status.st_mtime_ns))
        found.deep += name.count("/") > 1


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {reason(error)}") from None


def pack(root: Path, entries: list[tuple[str, int, int]]) -> Files:
    """Files from (path below the root, size, time of the last change) of each."""
    names = [os.fsencode(name) for name, _, _ in entries]
    ends = np.cumsum([len(name) for name in names], dtype=np.int64) if names else np.zeros(0, np.int64)
    sizes, times = (np.array([entry[i] for entry in entries], np.int64) for i in (1, 2))
    return Files(root, b"".join(names), ends, sizes, times)
