"""Image folders: what they hold, and its decoded pixels, kept in a cache."""

from __future__ import annotations

import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageOps

from mamba.config.schema import DataConfig
from mamba.data.images import ImageData, ImageSet, statistics
from mamba.data.split import split_validation
from mamba.errors import DataError


def load_folder(config: DataConfig, seed: int) -> ImageData:
    """data.root/train and data.root/test or data.root/val. With both test and val, val is the validation split as it
    is; with val alone, val is the final test and the validation split is cut out of train."""
    root, side = config.root, config.img_size
    assert side is not None, "the config must be resolved"
    held_out = [name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not held_out:
        raise DataError(
            f"data.root {root} is not an image folder; it must hold train/<class>/<image> and test/ or val/ likewise"
        )
    listings = {name: _list_images(root / name) for name in ("train", *held_out)}
    classes = tuple(listings["train"])
    for name in held_out:
        if tuple(listings[name]) != classes:
            only = {f"only in train/: {sorted(set(classes) - set(listings[name]))}": set(classes) - set(listings[name])}
            only |= {
                f"only in {name}/: {sorted(set(listings[name]) - set(classes))}": set(listings[name]) - set(classes)
            }
            raise DataError(
                f"the class folders of {root}/train and {root}/{name} differ; "
                + "; ".join(text for text, names in only.items() if names)
            )
    sets = {name: _decoded(root, name, listing, side) for name, listing in listings.items()}
    train, test = sets["train"], sets[held_out[0]]
    val: ImageSet | None = sets["val"] if len(held_out) == 2 else None
    if val is None:
        train, val = split_validation(train, config.val_fraction, seed)
    mean, std = statistics(sets["train"].images)
    return ImageData(train, val, test, classes, mean, std)


def _list_images(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both sorted."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    try:
        listing = {
            d.name: sorted(f for f in d.iterdir() if f.suffix.lower() in IMG_EXTENSIONS)
            for d in sorted(folder.iterdir())
            if d.is_dir()
        }
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error}") from None
    if not listing:
        raise DataError(f"{folder} holds no class folders; it must hold {folder.name}/<class>/<image>")
    for name, files in listing.items():
        if not files:
            raise DataError(f"{folder / name} holds no images; valid endings: {', '.join(IMG_EXTENSIONS)}")
    return listing


def _decoded(root: Path, split: str, listing: dict[str, list[Path]], side: int) -> ImageSet:
    """Decode once into a memory-mapped cache, keyed by the files' names, sizes and times and by the image size."""
    files = [f for names in listing.values() for f in names]
    labels = np.repeat(np.arange(len(listing)), [len(v) for v in listing.values()]).astype(np.int64)
    digest = hashlib.sha256(f"{root.resolve()} {side}".encode())
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error}); mend or remove it") from None
        digest.update(f"{file.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n".encode())
    cache = _cache_folder(root)
    path = cache / f"{split}-{side}-{digest.hexdigest()[:16]}.npy"
    with FileLock(cache / f"{split}-{side}.lock"):
        if not path.exists():
            for stale in cache.glob(f"{split}-{side}-*.partial"):  # of a process that was killed
                stale.unlink(missing_ok=True)
            _decode_into(path, files, side)
    return ImageSet.whole(np.load(path, mmap_mode="r"), labels)


def _cache_folder(root: Path) -> Path:
    """Beside the images where that can be written to, else under the user's cache folder."""
    for folder in (root / ".cache", Path.home() / ".cache" / "mamba-forge"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise DataError(f"neither {root / '.cache'} nor ~/.cache/mamba-forge can be written to, to cache decoded images")


def _decode_into(path: Path, files: list[Path], side: int) -> None:
    def decode(job: tuple[int, Path]) -> None:
        row, file = job
        try:
            with Image.open(file) as image:
                out[row] = np.asarray(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC))
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:  # what Pillow raises for files that are no images
            raise DataError(f"{file} is not a readable image ({error}); mend or remove it") from None

    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(len(files), side, side, 3))
        with partial.open("r+b") as file:  # a full disk is an error here, and a crash when written through the map
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        with ThreadPoolExecutor(max_workers=min(16, (os.cpu_count() or 1) + 1)) as pool:
            for _ in pool.map(decode, enumerate(files), chunksize=64):
                pass
        out.flush()
        partial.replace(path)
    except OSError as error:
        raise DataError(f"the cache of decoded images {path} could not be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
