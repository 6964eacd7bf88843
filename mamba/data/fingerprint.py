"""What a run remembers of its data: enough to tell, later and elsewhere, whether it is the same.

Of class names, relative paths, sizes and decoded pixels and of the split; never of absolute paths or times, so that a
copy that has moved is the same data.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from mamba.data.held import hashes_of, pack, probe
from mamba.data.images import ImageData, ImageSet, spread
from mamba.data.listing import Files

UNKNOWN = "-"
"""In place of a digest of pixels where nothing has been decoded."""


def fingerprint(data: ImageData) -> dict[str, Any]:
    """JSON: of each set and class "images files pixels" (a count and two digests), and how it was split."""
    if "fingerprint" not in data.__dict__:  # computed once: a million paths take seconds
        data.__dict__["fingerprint"] = _fingerprint(data)
    return data.__dict__["fingerprint"]


def _fingerprint(data: ImageData) -> dict[str, Any]:
    cut = data.val is None or data.split is not None or data.val.images is data.train.images
    sets = {"train": data.train, "test": data.test} | ({} if cut or data.val is None else {"val": data.val})
    held = data.val.index if cut and data.val is not None else np.zeros(0, np.int64)
    return {
        "side": data.side,
        "sample": _sample(data.train),
        "sets": {name: _of_classes(part, data.classes) for name, part in sets.items()},
        "split": {
            "seed": data.split.seed if data.split else None,
            "fraction": data.split.fraction if data.split else None,
            "train": len(data.train),
            "val": len(held),
            "digest": _digest(np.sort(data.train.index)) + _digest(held),
            **_held(data.train.files, held),
        },
    }


def _held(files: Files | None, rows: np.ndarray) -> dict[str, Any]:
    """The validation images one by one, where they have names."""
    return {} if files is None or not len(rows) else {"held": pack(hashes_of(files, rows)), "probe": probe(files, rows)}


def _of_classes(part: ImageSet, classes: tuple[str, ...]) -> dict[str, str]:
    order = np.argsort(part.labels, kind="stable")
    ends = np.searchsorted(part.labels[order], np.arange(len(classes)), side="right")
    rows = np.split(order, ends)[: len(classes)]
    hashes = part.pixel_hashes
    found = {}
    for name, own in zip(classes, rows, strict=True):
        pixels = UNKNOWN if hashes is None else _digest(hashes[own])
        files = pixels if part.files is None else part.files.digest(own)
        found[name] = f"{len(own)} {files} {pixels}"
    return found


def _sample(train: ImageSet) -> str:
    """Of the pixels of some training images, the same whether images are decoded or stay files."""
    if train.sample or train.pixel_hashes is None:
        return train.sample or UNKNOWN
    return _digest(train.pixel_hashes[spread(len(train.images))])


def _digest(values: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=8).hexdigest()
