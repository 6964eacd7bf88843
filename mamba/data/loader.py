"""Data sets as uint8 arrays, their splits, and the loaders that feed one rank.

Order and augmentation are functions of (seed, epoch, step) alone, drawn for the whole global batch: they do not
depend on how many workers or loader processes share it, nor on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mamba.config.schema import DataConfig
from mamba.data.augment import BatchAugment, Draws, to_device
from mamba.errors import DataError
from mamba.train.distributed import Process


@dataclass(frozen=True)
class ImageSet:
    """A split: rows `index` of images (n, side, side, 3) uint8 and labels (n,) int64."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def whole(cls, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> ImageSet:
        return cls(images, labels, np.arange(len(labels)))


@dataclass(frozen=True)
class ImageData:
    """The splits of a data set, its class names, and the per-channel statistics of its training images in [0, 1].

    `val` is None where nothing was kept for validation.
    """

    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, images: Tensor) -> Tensor:
        """(n, side, side, 3) uint8 -> (n, 3, side, side) float32 with mean 0 and deviation 1, on the same device."""
        mean, std = (torch.tensor(v, device=images.device) for v in (self.mean, self.std))
        return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def load_data(config: DataConfig, seed: int) -> ImageData:
    """Load, or decode and cache, the data set of a resolved config. Safe to call from many processes at once.

    Raises:
        DataError: missing, empty, inconsistent or unreadable files; what was looked for and where.
    """
    side = config.img_size
    assert side is not None, "the config must be resolved"
    if config.dataset == "folder":
        return _load_folder(config.root, side, config.val_fraction, seed)
    if config.dataset == "digits":
        train, test, classes = _digits()
        mean, std = _statistics(train.images)
    else:
        train, test, classes = _cifar(config.dataset, config.root)
        mean, std = CIFAR_STATISTICS[config.dataset]
    if train.images.shape[1] != side:
        train, test = (ImageSet.whole(_resize(s.images, side), s.labels) for s in (train, test))
    train, val = split_validation(train, config.val_fraction, seed)
    return ImageData(train, val, test, classes, mean, std)


def check_batch_size(train_images: int, config: DataConfig) -> None:
    """Raises DataError where the training set does not fill one batch."""
    if train_images < config.batch_size:
        raise DataError(
            f"data.batch_size {config.batch_size} is larger than the training set of {train_images} images; "
            f"choose at most {train_images}"
        )


def describe(config: DataConfig, seed: int) -> tuple[int, int]:
    """Number of classes and of training images; of CIFAR, without downloading it."""
    if config.dataset in CIFAR_STATISTICS:
        classes = 10 if config.dataset == "cifar10" else 100
        per_class = 50_000 // classes
        return classes, classes * (per_class - round(config.val_fraction * per_class))
    data = load_data(config, seed)
    return len(data.classes), len(data.train)


def split_validation(train: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet | None]:
    """Cut a class-balanced validation split out of the training set: round(fraction n_c) images of each class."""
    if fraction == 0:
        return train, None
    held: list[NDArray[np.int64]] = []
    for label in np.unique(train.labels):
        rows = train.index[train.labels[train.index] == label]
        rng = np.random.default_rng([seed, int(label)])
        held.append(rng.permutation(rows)[: round(fraction * len(rows))])
    val = np.sort(np.concatenate(held))
    rest = np.setdiff1d(train.index, val)
    if len(val) == 0 or len(rest) == 0:
        raise DataError(
            f"data.val_fraction {fraction} of {len(train)} training images leaves {len(rest)} to train on and "
            f"{len(val)} to validate on; choose a fraction that leaves some of both, or 0"
        )
    return ImageSet(train.images, train.labels, rest), ImageSet(train.images, train.labels, val)


# --- data sets -------------------------------------------------------------------------------------------------------

CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def _digits() -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """scikit-learn's 1,797 digits, 8x8, grey repeated to 3 channels; a fixed fifth of each class is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=3)
    train, test = split_validation(ImageSet.whole(images, bunch.target.astype(np.int64)), 0.2, seed=0)
    assert test is not None
    parts = [ImageSet.whole(s.images[s.index], s.labels[s.index]) for s in (train, test)]
    return parts[0], parts[1], tuple(str(d) for d in range(10))


def _cifar(name: str, root: Path) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    from torchvision.datasets import CIFAR10, CIFAR100  # not above: a slow import

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    folder = root / source.base_folder
    try:
        try:
            parts = [source(str(root), train=train) for train in (True, False)]
        except RuntimeError:  # missing or incomplete
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{name}.lock"):
                parts = [source(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
        raise DataError(
            f"{name} is not complete at {folder} and could not be downloaded ({error}); on a machine without network, "
            f"unpack {source.filename} into {root}, so that {folder} exists"
        ) from None
    sets = [ImageSet.whole(p.data, np.asarray(p.targets, dtype=np.int64)) for p in parts]
    return sets[0], sets[1], tuple(parts[0].classes)


def _load_folder(root: Path, side: int, val_fraction: float, seed: int) -> ImageData:
    """root/train and root/test or root/val. With both test and val, val is the validation split as it is; with val
    alone, val is the final test and the validation split is cut out of train."""
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
        train, val = split_validation(train, val_fraction, seed)
    mean, std = _statistics(sets["train"].images)
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


def _resize(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    return np.stack([np.asarray(Image.fromarray(i).resize((side, side), Image.Resampling.BICUBIC)) for i in images])


def _statistics(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel in [0, 1], over at most 10,000 images spread over the set."""
    some = images[:: max(1, len(images) // 10_000)].astype(np.float32) / 255
    mean, std = some.mean(axis=(0, 1, 2), dtype=np.float64), some.std(axis=(0, 1, 2), dtype=np.float64)
    return tuple(mean.tolist()), tuple(np.maximum(std, 1e-3).tolist())


# --- loaders ---------------------------------------------------------------------------------------------------------


class BatchKey(NamedTuple):
    """One rank's part of one micro-batch: rows [lo, hi) of the global batch `step` of `epoch`, and which images."""

    epoch: int
    step: int
    lo: int
    hi: int
    rows: NDArray[np.int64]


class ShardSampler(Sampler[BatchKey]):
    """The order of an epoch, cut into global batches, micro-batches and this rank's contiguous share of each.

    Set `epoch` (and `start`, a step to begin at) before iterating. Images that do not fill the last batch are left
    out of that epoch. With `repeats`, a batch is that many times the same images one after the other
    (https://arxiv.org/abs/1901.09335), and an epoch has as many steps as without.
    """

    def __init__(
        self, size: int, batch_size: int, accumulate: int, rank: int, world_size: int, seed: int, repeats: int = 1
    ) -> None:
        self.size, self.batch_size, self.accumulate = size, batch_size, accumulate
        self.rank, self.world_size, self.seed, self.repeats = rank, world_size, seed, repeats
        self.epoch = self.start = 0

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        return self.size // self.batch_size

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[BatchKey]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        micro = self.batch_size // self.accumulate
        share = micro // self.world_size
        different = self.batch_size // self.repeats
        for step in range(self.start, self.steps):
            batch = np.tile(order[step * different : (step + 1) * different], self.repeats)
            for part in range(self.accumulate):
                lo = part * micro + self.rank * share
                yield BatchKey(self.epoch, step, lo, lo + share, batch[lo : lo + share])


class TrainBatches(Dataset[tuple[Tensor, Tensor]]):
    """BatchKey -> (images (n, 3, side, side) float32 augmented and normalised, labels (n,) int64)."""

    def __init__(self, data: ImageData, config: DataConfig, seed: int) -> None:
        self.data, self.batch_size = data, config.batch_size
        self.augment = BatchAugment(config, data.train.images.shape[1], data.mean, seed)

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, Tensor]:
        train = self.data.train
        rows = train.index[key.rows]
        # a fancy index over a memory map reads in file order when sorted; small enough not to matter here
        images = np.asarray(train.images[rows])
        labels = torch.from_numpy(train.labels[rows])
        if not self.augment.active:
            return self.data.normalise(torch.from_numpy(images)), labels
        draws = self.augment.draw(key.epoch, key.step, self.batch_size).part(key.lo, key.hi)
        augmented = self.augment.transform(torch.from_numpy(images).permute(0, 3, 1, 2), draws)
        normalised = self.data.normalise(augmented.permute(0, 2, 3, 1))
        return self.augment.erase(normalised, torch.from_numpy(draws.erased)), labels


@dataclass
class TrainLoader:
    """A loader of one rank's shards; `epoch(e, start)` iterates one epoch from step `start` on."""

    loader: DataLoader[Any]
    sampler: ShardSampler

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.epoch, self.sampler.start = epoch, start
        return iter(self.loader)


def make_train_loader(
    data: ImageData, config: DataConfig, seed: int, accumulate: int, rank: int, world_size: int, cpus: int, pin: bool
) -> TrainLoader:
    """`cpus` are those of this rank; `pin` the batches' memory for transfer to a GPU.

    Raises:
        DataError: the training set is smaller than one batch.
    """
    check_batch_size(len(data.train), config)
    sampler = ShardSampler(len(data.train), config.batch_size, accumulate, rank, world_size, seed, config.repeats)
    batches = TrainBatches(data, config, seed)
    workers = config.loader_workers
    if workers is None:
        workers = 0 if not batches.augment.active else max(0, min(16, cpus - 1))
    loader: DataLoader[Any] = DataLoader(
        batches,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers > 0 else None,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_trainer,
        generator=torch.Generator().manual_seed(seed),  # its own, so that making an iterator leaves the global one
    )
    return TrainLoader(loader, sampler)


class DeviceBatches:
    """As `TrainLoader`, for images that lie on the device and are augmented there, many steps' worth at a time.

    The number of launches for a chunk hardly depends on its size. On a GPU a chunk is made in a stream of its own while
    steps are taken on the one before.
    """

    def __init__(
        self, data: ImageData, config: DataConfig, seed: int, sampler: ShardSampler, device: torch.device
    ) -> None:
        self.sampler, self.device = sampler, device
        train = data.train
        images = torch.from_numpy(np.ascontiguousarray(train.images[train.index]))
        self.images = images.to(device).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(train.labels[train.index]).to(device)
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (data.mean, data.std))
        self.factor, self.offset = 1 / (255 * std), -mean / std
        self.augment = BatchAugment(config, self.images.shape[-1], data.mean, seed)
        self.batch_size = config.batch_size
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # which has made the images

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(images (n, 3, side, side) float32 augmented and normalised, labels (n,) int64), as the loader gives them."""
        self.sampler.epoch, self.sampler.start = epoch, start
        coming = self._chunks()
        chunk = next(coming, None)
        while chunk:
            following = None
            for i, batch in enumerate(self._batches(chunk)):
                yield batch
                if i == 0:  # not before: the first steps of an epoch need not wait for two chunks to be asked for
                    following = next(coming, None)
            chunk = following

    def _chunks(self) -> Iterator[Chunk]:
        keys: list[BatchKey] = []
        size = 0
        limit = max(1, CHUNK_BYTES // self.images[0].numel())
        for key in self.sampler:
            keys.append(key)
            size += len(key.rows)
            if size + len(key.rows) > limit:
                yield self._make(keys)
                keys, size = [], 0
        if keys:
            yield self._make(keys)

    def _make(self, keys: list[BatchKey]) -> Chunk:
        draws = Draws.join([self.augment.draw(k.epoch, k.step, self.batch_size).part(k.lo, k.hi) for k in keys])
        with torch.cuda.stream(self.stream):  # of None: as it is
            rows = to_device(torch.from_numpy(np.concatenate([k.rows for k in keys])), self.device)
            rectangles = to_device(torch.from_numpy(draws.erased), self.device)
            images, labels = self.augment.transform(self.images[rows], draws), self.labels[rows]
        made = self.stream.record_event() if self.stream else None
        return Chunk([len(k.rows) for k in keys], images, labels, rectangles, made)

    def _batches(self, chunk: Chunk) -> Iterator[tuple[Tensor, Tensor]]:
        if chunk.made:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(chunk.made)
            for tensor in (chunk.images, chunk.labels, chunk.rectangles):
                tensor.record_stream(here)  # or its memory would be given away while this stream still reads it
        parts = (t.split(chunk.sizes) for t in (chunk.images, chunk.labels, chunk.rectangles))
        for images, labels, rectangles in zip(*parts, strict=True):
            normalised = torch.addcmul(self.offset, images.float(), self.factor)
            yield self.augment.erase(normalised, rectangles), labels


class Chunk(NamedTuple):
    """Augmented images of several batches of these sizes, there once `made` has come by."""

    sizes: list[int]
    images: Tensor
    labels: Tensor
    rectangles: Tensor
    made: torch.cuda.Event | None


CHUNK_BYTES = 2**24
"""Pixels augmented at a time on a GPU: 5,461 CIFAR images. Two or three chunks are kept."""
GPU_SHARE = 0.125
"""Part of a GPU's memory that the training images may take before `data.device` auto leaves them on the host."""


def make_train_batches(
    data: ImageData, config: DataConfig, seed: int, accumulate: int, process: Process
) -> TrainLoader | DeviceBatches:
    """Training batches of one rank by the rule of `data.device`.

    Raises:
        DataError: the training set is smaller than one batch.
    """
    gpu = process.device.type == "cuda"
    side = data.train.images.shape[1]
    on_device = config.device == "gpu"
    if config.device == "auto" and gpu:
        total = torch.cuda.get_device_properties(process.device).total_memory
        on_device = len(data.train) * side * side * 3 <= GPU_SHARE * total
    if not on_device:
        return make_train_loader(
            data, config, seed, accumulate, process.rank, process.world_size, process.cpus, pin=gpu
        )
    check_batch_size(len(data.train), config)
    rank, world_size = process.rank, process.world_size
    sampler = ShardSampler(len(data.train), config.batch_size, accumulate, rank, world_size, seed, config.repeats)
    return DeviceBatches(data, config, seed, sampler, process.device)


def _leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C reaches a terminal's whole process group; a loader process that ended at once would take the trainer's
    orderly stop with it. Loader processes end with their trainer."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def eval_batches(
    data: ImageData, split: ImageSet, batch_size: int, rank: int, world_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's every world_size-th image of a split, normalised, on the device: nothing padded, nothing twice."""
    mine = split.index[rank::world_size]
    for at in range(0, len(mine), batch_size):
        rows = mine[at : at + batch_size]
        images = torch.from_numpy(np.ascontiguousarray(split.images[rows])).to(device, non_blocking=True)
        yield data.normalise(images), torch.from_numpy(split.labels[rows]).to(device, non_blocking=True)
