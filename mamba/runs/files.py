"""Small files, written whole or not at all, and read back without a traceback.

A file appears under its name once it is complete. No link is followed: a name is made anew and put in the place of
whatever had it, so that a link planted in a run's folder leads nowhere. Readable by whoever may read the folder (the
umask decides). JSON knows no NaN: what is not finite is written as null, and metrics are read back with NaN for it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mamba.errors import FolderError, reason

SEAL = "checksum"
"""Key of a JSON object's checksum of itself."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends well, and leaves nothing when it does not.

    Raises:
        FolderError: it cannot be written (no space, no permission).
    """
    partial: Path | None = None
    try:
        partial, file = _new_beside(path)
        with file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        if partial is not None:
            with suppress(OSError):
                partial.unlink()


def create(path: Path) -> IO[bytes]:
    """A new binary file; raises FileExistsError where anything has that name, a link too."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb")


def append(path: Path, text: str) -> None:
    """Add text to the end of a file, which is made if it is missing; raises FolderError, for a link too."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "wb") as file:
            file.write(text.encode())
    except OSError as error:
        raise unwritable(path, error) from None


def write_text(path: Path, text: str) -> None:
    """Replace a text file so that a reader never sees half of it; raises FolderError."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Replace a JSON file so that a reader never sees half of it; numbers that are not finite become null."""
    write_text(path, to_json(tree, indent=1) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a CSV file so that a reader never sees half of it; what a row does not have stays empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def to_json(tree: Any, indent: int | None = None) -> str:
    """JSON as the standard has it: null for NaN and the infinities."""
    return json.dumps(_finite(tree), indent=indent, allow_nan=False)


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: the file.
        remedy: what a user can do about a damaged one, for the error.

    Raises:
        FileNotFoundError: there is none.
        FolderError: it cannot be read, is damaged, or holds something else than an object.
    """
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{path} is damaged ({reason(error)}){remedy and '; ' + remedy}") from None
    if not isinstance(tree, dict):
        raise FolderError(f"{path} is damaged (it holds no JSON object){remedy and '; ' + remedy}")
    return tree


def write_sealed(path: Path, tree: Mapping[str, Any]) -> None:
    """As `write_json`, with a checksum of the content, which `read_sealed` compares: for what is ranked and trusted."""
    write_json(path, sealed(tree))


def read_sealed(path: Path, remedy: str = "") -> dict[str, Any]:
    """As `read_json`, of a file that `write_sealed` wrote, without its checksum; one that has none (earlier versions)
    is as it is.

    Raises:
        FileNotFoundError: there is none.
        FolderError: as of `read_json`; a bit of it is not what was written.
    """
    tree = read_json(path, remedy)
    check_seal(tree, path, f"{remedy and remedy + ', or '}take its {SEAL} out to use it as it is")
    return unsealed(tree)


def sealed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of its own content, which `check_seal` compares."""
    return {**unsealed(tree), SEAL: _digest_of(tree)}


def unsealed(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key != SEAL}


def check_seal(tree: Mapping[str, Any], path: Path, remedy: str = "") -> None:
    """Raises FolderError where an object that was read is not what `sealed` made; one without a checksum is as it is
    (earlier versions)."""
    if SEAL in tree and tree[SEAL] != _digest_of(tree):
        raise FolderError(
            f"{path} is damaged or was changed (its checksum is not that of what was written){remedy and '; ' + remedy}"
        )


def _digest_of(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_finite(unsealed(tree)), sort_keys=True).encode()).hexdigest()


def as_metrics(tree: Any) -> dict[str, float]:
    """Metrics as read from JSON: null is NaN; what is no number is left out."""
    if not isinstance(tree, dict):
        return {}
    found = {key: math.nan if value is None else value for key, value in tree.items()}
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def checksum(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(path: Path, error: BaseException, then: str = "") -> FolderError:
    """The sentence for a path that could not be written: the system's reason, and how much space is left there."""
    free = ""
    with suppress(OSError, StopIteration):
        there = next(p for p in (path, *path.parents) if p.is_dir())
        free = f" ({shutil.disk_usage(there).free / 2**20:,.0f} MiB are free there)"
    return FolderError(f"{path} could not be written: {reason(error)}{free}{then and '; ' + then}")


def _new_beside(path: Path) -> tuple[Path, IO[bytes]]:
    for n in itertools.count():
        partial = path.with_name(f".{path.name}.{os.getpid()}-{n}.partial")
        with suppress(FileExistsError):
            return partial, create(partial)
    raise AssertionError


def _finite(tree: Any) -> Any:
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return tree
