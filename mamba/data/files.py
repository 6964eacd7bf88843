"""Images that stay files: read and decoded when they are asked for, so that memory does not grow with the data set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from mamba.data.cache import Job, Progress, data_cache
from mamba.data.decode import hash_images, read_fitted, read_rgb
from mamba.data.images import Moments, Statistics, spread
from mamba.errors import DataError, reason

Box = NDArray[np.int64]


class ImageFiles:
    """(n, side, side, 3) uint8, each image decoded from its file whenever it is taken. Pickled it is a list of files,
    which whoever unpickles it opens where it is."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.shape = job.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        rows = np.arange(len(self))[index]
        if np.ndim(rows) == 0:
            return self._fitted(int(rows))
        return self._stack(self._fitted, [(row,) for row in rows.tolist()])

    def crops(self, rows: NDArray[np.int64], boxes: Box) -> NDArray[np.uint8]:
        """(n, side, side, 3): a part of each image, cut from the original at its own resolution and resized.

        Args:
            rows: (n,), which images.
            boxes: (n, 4 or more), first row, first column, rows, columns of the part of a square of `side` pixels; an
                original of other proportions gives a part of as much of its area, as wide for its height, where that
                fits, and at the same place between its edges.
        """
        return self._stack(self._cropped, list(zip(rows.tolist(), boxes[:, :4].tolist(), strict=True)))

    def _fitted(self, row: int) -> NDArray[np.uint8]:
        return read_fitted(self.job.files.path(row), self.job.side, self.job.fit)

    def _cropped(self, row: int, box: list[int]) -> NDArray[np.uint8]:
        side = self.job.side
        image = read_rgb(self.job.files.path(row))
        resized = image.resize((side, side), Image.Resampling.BILINEAR, box=part_of(image.size, box, side))
        return np.asarray(resized)

    def _stack(self, decode: Callable[..., NDArray[np.uint8]], jobs: list[tuple[Any, ...]]) -> NDArray[np.uint8]:
        """In a loader process one by one, since there are many of them; else by as many threads as there are cores."""
        out = np.empty((len(jobs), *self.shape[1:]), np.uint8)

        def fill(i: int) -> None:
            out[i] = decode(*jobs[i])

        threads = min(len(os.sched_getaffinity(0)), 16, len(jobs))
        if torch.utils.data.get_worker_info() is not None or threads < 2:
            for i in range(len(jobs)):
                fill(i)
        else:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(fill, range(len(jobs))):
                    pass
        return out


def part_of(size: tuple[int, int], box: list[int], side: int) -> tuple[float, float, float, float]:
    """Left, upper, right, lower edge in an image of (width, height) of what `box` is in a square of `side` pixels."""
    width, height = size
    top, left, rows, columns = box
    share, ratio = rows * columns / side**2, columns / rows
    w = min(width, (share * width * height * ratio) ** 0.5)
    h = min(height, (share * width * height / ratio) ** 0.5)
    x = (width - w) * (left / (side - columns) if side > columns else 0.5)
    y = (height - h) * (top / (side - rows) if side > rows else 0.5)
    return x, y, x + w, y + h


def known_of(images: ImageFiles) -> tuple[Statistics, str]:
    """Statistics of a training set's files and a digest of the pixels that they were taken of, computed once and kept
    in the data set's cache folder.

    Raises:
        DataError: a file that cannot be read.
    """
    job = images.job
    folder = data_cache(job.data_root)
    path = folder / f"{job.stem}{job.key()}.json"
    with FileLock(folder / f"{job.stem}files.lock"):
        try:
            found = json.loads(path.read_text())
            return (tuple(found["mean"]), tuple(found["std"])), str(found["sample"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not there, or damaged
        rows, moments, total = spread(len(images)), Moments(), hashlib.blake2b(digest_size=8)
        with Progress(f"statistics of {job.split}", len(rows)) as progress:
            for part in _parts(rows, max(1, min(64, 2**24 // (3 * job.side**2)))):
                pixels = images[part]
                moments.add(pixels)
                total.update(hash_images(pixels).tobytes())
                progress.add(len(part))
        (mean, std), sample = moments.result(), total.hexdigest()
        for other in folder.glob(f"{job.stem}*.json"):
            other.unlink(missing_ok=True)
        _write(path, {"mean": mean, "std": std, "sample": sample})
    return (mean, std), sample


def _parts(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for lo in range(0, len(rows), size):
        yield rows[lo : lo + size]


def _write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(values))
        partial.replace(path)
    except OSError as error:
        raise DataError(f"what is known of the images could not be written to {path}: {reason(error)}") from None
    finally:
        partial.unlink(missing_ok=True)
