"""The decoded pixels of an image folder's split: made once, by all cores, and mapped into memory after that.

Beside each cache lies a file with a hash of every image: what is read is compared with it, and a cache that is cut or
damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from mamba.cache import cache_folder
from mamba.data.decode import VERSION, decode_rows, hash_images
from mamba.data.listing import Files
from mamba.errors import DataError, reason

PIECE = 64
"""Files that a process decodes between two looks at what is left."""
MANY_FILES = 2000
"""From here on processes decode: they take a third of a second to start, threads share one core's Python."""
PATIENCE_S = 1.0
"""Decoding that takes longer shows its progress."""
PROBE = 1000
"""Images of a cache whose hashes are compared when it is opened, spread over it."""


@dataclass(frozen=True)
class Job:
    """What a cache is made of; enough to find it, or to make it, on another machine."""

    data_root: Path
    split: str
    files: Files
    side: int
    fit: str

    @property
    def stem(self) -> str:
        return f"{self.split}-{self.side}-{self.fit}-"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.files), self.side, self.side, 3)

    def key(self) -> str:
        return self.files.key(f"{self.side} {self.fit} {VERSION}")


class CachedImages(np.memmap):
    """(n, side, side, 3) uint8 in a cache file. Pickled it is the job: whoever unpickles it opens the file, or makes
    it. What is taken out of it is a plain array."""

    job: Job | None = None

    def __array_finalize__(self, obj: Any) -> None:
        super().__array_finalize__(obj)
        self.job = None  # of the whole array alone

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return np.asarray(self).__reduce_ex__(protocol) if self.job is None else (_reopen, (self.job,))


def open_images(job: Job) -> tuple[CachedImages, NDArray[np.uint64]]:
    """A split's images, decoded into a cache if they are not there yet, and a hash of each.

    Raises:
        DataError: a file that cannot be read, a cache that cannot be written.
    """
    folder = data_cache(job.data_root)
    path = folder / f"{job.stem}{job.key()}.npy"
    with FileLock(folder / f"{job.stem}.lock".replace("-.", ".")):
        images, hashes = _read(path, job)
        if images is None:
            for stale in folder.glob(f"{job.stem}*.partial"):  # of a process that was killed
                stale.unlink(missing_ok=True)
            hashes = _make(path, job)
            images, _ = _read(path, job)
            assert images is not None
            _remove_others(folder, job, path)
        if hashes is None:
            hashes = np.concatenate([hash_images(images[lo : lo + 256]) for lo in range(0, len(images), 256)])
            _write_hashes(path, hashes)
    images.job = job
    return images, hashes


def _reopen(job: Job) -> CachedImages:
    return open_images(job)[0]


def data_cache(root: Path) -> Path:
    """The folder for a data set's caches: under $MAMBA_FORGE_CACHE if that is set, else beside the images where that
    can be written to, else under the user's cache folder."""
    named = f"{root.name or 'data'}-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]}"
    places = [root / ".cache", cache_folder() / "data" / named]
    if os.environ.get("MAMBA_FORGE_CACHE"):
        places.reverse()
    for folder in places:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise DataError(f"neither {places[0]} nor {places[1]} can be written to, to cache decoded images")


def _read(path: Path, job: Job) -> tuple[CachedImages | None, NDArray[np.uint64] | None]:
    """The images, None where they are not there or damaged, and their hashes, None likewise."""
    try:
        images = np.load(path, mmap_mode="r").view(CachedImages)
    except (OSError, ValueError, EOFError, SyntaxError):
        return None, None
    if images.shape != job.shape or images.dtype != np.uint8:
        return None, None
    try:
        hashes = np.frombuffer(path.with_suffix(".hash").read_bytes(), np.uint64)
    except (OSError, ValueError):
        return images, None
    if len(hashes) != len(images):
        return images, None
    rows = np.unique(np.linspace(0, len(images) - 1, PROBE).astype(np.int64))
    if not np.array_equal(hash_images(images[rows]), hashes[rows]):
        return None, None
    return images, hashes


def _remove_others(folder: Path, job: Job, path: Path) -> None:
    """Caches of this split whose files have changed, also those named as they once were."""
    old = f"{job.split}-{job.side}-"
    for other in folder.glob(f"{old}*"):
        once = other.suffix == ".npy" and len(other.stem.removeprefix(old)) == 16 and "-" not in other.stem[len(old) :]
        ours = other.name.startswith(job.stem) and other.suffix in (".npy", ".hash") and other.stem != path.stem
        if once or ours:
            other.unlink(missing_ok=True)


def _write_hashes(path: Path, hashes: NDArray[np.uint64]) -> None:
    partial = path.with_suffix(f".hash.{os.getpid()}.partial")
    try:
        partial.write_bytes(hashes.tobytes())
        partial.replace(path.with_suffix(".hash"))
    except OSError as error:
        raise DataError(f"the cache of decoded images {path} could not be written: {reason(error)}") from None
    finally:
        partial.unlink(missing_ok=True)


def _make(path: Path, job: Job) -> NDArray[np.uint64]:
    """Decode every file of a job into its cache file; returns the hashes."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=job.shape)
        with partial.open("r+b") as file:  # a full disk is an error here, and a crash when written through the map
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        hashes = decode_all(out, partial, job)
        out.flush()
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        _write_hashes(path, hashes)
        partial.replace(path)
        return hashes
    except OSError as error:
        raise DataError(f"the cache of decoded images {path} could not be written: {reason(error)}") from None
    finally:
        partial.unlink(missing_ok=True)


def decode_all(out: NDArray[np.uint8], path: Path, job: Job) -> NDArray[np.uint64]:
    """Decode into `out`, which is mapped from `path`: few files by threads, many by processes."""
    hashes = np.zeros(len(job.files), np.uint64)
    cores = len(os.sched_getaffinity(0))
    decode: Callable[[int, list[str]], list[int]]
    helpers: list[_Helper] = []
    if len(job.files) >= MANY_FILES and cores > 1:
        helpers = [_Helper(path, job) for _ in range(min(cores, 64))]
        idle = list(helpers)
        lock = Lock()

        def decode(lo: int, files: list[str]) -> list[int]:
            with lock:
                helper = idle.pop()
            answer = helper.ask(lo, files)
            with lock:
                idle.append(helper)
            return answer

    else:

        def decode(lo: int, files: list[str]) -> list[int]:
            return decode_rows(out, lo, files, job.side, job.fit)

    pool = ThreadPoolExecutor(len(helpers) or min(16, cores + 1))
    try:
        with Progress(f"decoding {job.split}", len(job.files)) as progress:
            for pieces in _groups(job.files):  # a bounded number is under way, so that an error ends it soon
                running: dict[Future[list[int]], int] = {pool.submit(decode, lo, files): lo for lo, files in pieces}
                for done in as_completed(running):
                    lo, found = running[done], done.result()
                    hashes[lo : lo + len(found)] = found
                    progress.add(len(found))
    finally:
        pool.shutdown(cancel_futures=True)
        for helper in helpers:
            helper.close()
    return hashes


def _groups(files: Files) -> Iterator[list[tuple[int, list[str]]]]:
    """Pieces of a few files, several hundred pieces at a time."""
    group: list[tuple[int, list[str]]] = []
    for lo in range(0, len(files), PIECE):
        group.append((lo, [str(files.path(row)) for row in range(lo, min(lo + PIECE, len(files)))]))
        if len(group) == 256:
            yield group
            group = []
    yield group


class _Helper:
    """A process that decodes. A program of its own and no fork: of threads, locks and GPUs it inherits nothing."""

    def __init__(self, path: Path, job: Job) -> None:
        here = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mamba.data.decode"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._tell({"path": str(path), "side": job.side, "fit": job.fit})

    def _tell(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def ask(self, lo: int, files: list[str]) -> list[int]:
        assert self.process.stdout is not None
        self._tell({"lo": lo, "files": files})
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise DataError(answer["error"])
        return answer["hashes"]

    def _ended(self) -> DataError:
        return DataError(f"a process that decodes images ended with code {self.process.wait()}: is there memory left?")

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Progress:
    """A line on stderr for what takes longer than PATIENCE_S: kept up to date on a terminal, else one at its beginning
    and one at its end."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.began = self.shown = time.monotonic()
        self.visible = False

    def __enter__(self) -> Progress:
        return self

    def add(self, number: int) -> None:
        self.done += number
        now = time.monotonic()
        if now - self.shown < PATIENCE_S or (self.visible and not sys.stderr.isatty()):
            return
        self.shown, self.visible = now, True
        left = (now - self.began) * (self.total - self.done) / self.done
        text = f"{self.what}: {self.done:,} of {self.total:,} images, {left:.0f} s left"
        print(text, end="\x1b[K\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.visible:
            seconds = time.monotonic() - self.began
            end = "\x1b[K\n" if sys.stderr.isatty() else "\n"
            print(f"{self.what}: {self.done:,} images in {seconds:.0f} s", end=end, file=sys.stderr, flush=True)
