"""The images that a run validates on, each by a hash of its path and size: kept with its checkpoints, so that a folder
that has grown or shrunk since can be split without validating on what the model was trained on."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamba.data.images import ImageSet
from mamba.data.listing import Files
from mamba.errors import DataError

Hashes = NDArray[np.uint64]
PROBES = 16
CHECK = 8
"""Bytes of a packed list that are its checksum."""


def hashes_of(files: Files, rows: Iterable[int]) -> Hashes:
    """(n,): of the class, the path below it and the size of each file; the same wherever they lie."""
    found = []
    for row in rows:
        name = unicodedata.normalize("NFC", files.name(int(row)))
        found.append(hashlib.blake2b(os.fsencode(f"{name}\0{files.sizes[row]}"), digest_size=8).digest())
    return np.frombuffer(b"".join(found), "<u8")


def pack(hashes: Hashes) -> str:
    """As text, with a checksum."""
    content = np.sort(hashes).astype("<u8").tobytes()
    return base64.b64encode(hashlib.blake2b(content, digest_size=CHECK).digest() + content).decode()


def unpack(text: object) -> Hashes:
    """What `pack` was given, sorted; raises ValueError where the text is another's or damaged."""
    try:
        whole = base64.b64decode(text if isinstance(text, str) else "", validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    content = whole[CHECK:]
    if len(whole) < CHECK or hashlib.blake2b(content, digest_size=CHECK).digest() != whole[:CHECK]:
        raise ValueError("its checksum is not that of what was written")
    return np.frombuffer(content, "<u8")


def probe(files: Files, rows: Sequence[int] | NDArray[np.int64]) -> dict[str, str]:
    """Of a few files, hash -> a digest of their bytes: other images of the same names and sizes are other data."""
    few = [int(rows[i]) for i in np.unique(np.linspace(0, len(rows) - 1, PROBES).astype(np.int64))]
    return {str(key): _content(files, row) for key, row in zip(hashes_of(files, few).tolist(), few, strict=True)}


def probed_again(files: Files, hashes: Hashes, probed: object) -> tuple[int, int]:
    """Of the files that were probed and are here: how many have the bytes that they had, and how many have others.

    Args:
        files: as they are now.
        hashes: of all of them.
        probed: what `probe` returned, as it was stored.
    """
    here = dict(zip(hashes.tolist(), range(len(hashes)), strict=True))
    items = probed.items() if isinstance(probed, dict) else ()
    same = [_content(files, here[int(key)]) == digest for key, digest in items if int(key) in here]
    return sum(same), len(same) - sum(same)


def _content(files: Files, row: int) -> str:
    try:
        return hashlib.blake2b(files.path(row).read_bytes(), digest_size=8).hexdigest()
    except OSError:  # whoever decodes it says so
        return ""


def held_by(path: Path) -> Hashes:
    """What the run in a folder, or the run that a checkpoint is from, validated on.

    Raises:
        DataError: there is no checkpoint, or none that says so.
    """
    candidates = [path / "config.json", *sorted(path.glob("checkpoints/*-*/config.json"))]
    files = [file for file in candidates if file.is_file()]
    if not files:
        raise DataError(f"data.split_from {path}: there is no checkpoint")
    reason = ""
    for file in files:
        try:
            return unpack(json.loads(file.read_bytes())["data"]["split"]["held"])
        except KeyError:
            reason = "it does not say which images it validated on (of an earlier version, or no split of a folder)"
        except (OSError, ValueError, TypeError, RecursionError) as error:
            reason = f"{file} is damaged ({' '.join(str(error).split())})"
    raise DataError(f"data.split_from {path}: {reason}")


def split_like(train: ImageSet, path: Path, classes: Sequence[str]) -> tuple[ImageSet, ImageSet]:
    """The training set without, and with only, the images that another run validated on, as far as they are here.

    Raises:
        DataError: as `held_by`; images that are no files; a class without an image to train on, or to validate on.
    """
    if train.files is None:
        raise DataError("data.split_from is for image folders: the images of other data sets have no names")
    held = held_by(path)
    chosen = np.isin(hashes_of(train.files, train.index), held)
    labels = train.labels[train.index]
    counts = [(name, int((labels == i).sum()), int(chosen[labels == i].sum())) for i, name in enumerate(classes)]
    bad = [f"{name} ({all_ - val} and {val})" for name, all_, val in counts if val in (0, all_)]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(
            f"data.split_from {path}: {int(chosen.sum())} of the {len(held)} images that it validated on are here, "
            f"which leaves no image to train on, or none to validate on, of {len(bad)} of {len(classes)} classes: "
            f"{', '.join(bad[:5])}{more}; give the images to validate on a folder of their own, val/"
        )
    return replace(train, index=train.index[~chosen]), replace(train, index=train.index[chosen])
