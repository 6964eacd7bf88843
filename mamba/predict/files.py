"""Which images are meant: files, folders and patterns on a command line, with classes where folders name them."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba.data.cache import Job
from mamba.data.files import ImageFiles
from mamba.data.held import hashes_of, unpack
from mamba.data.images import ImageData, ImageSet
from mamba.data.listing import Files, endings, is_hidden, list_split, pack
from mamba.data.transform import Transform
from mamba.errors import DataError, reason

SHOWN = 5


@dataclass(frozen=True)
class Found:
    """Images, in the order of their names."""

    files: Files
    labels: NDArray[np.int64] | None = None
    """(n,): classes by the number of the model's output; None where folders do not name classes."""

    def data(self, transform: Transform, classes: tuple[str, ...]) -> ImageData:
        """As a data set whose images are read when they are asked for, as those of training are; labels that are not
        known are 0."""
        job = Job(self.files.root, "predict", self.files, transform.side, transform.fit)
        labels = np.zeros(len(self.files), np.int64) if self.labels is None else self.labels
        images = ImageSet(ImageFiles(job), labels, np.arange(len(labels)), self.files)
        return ImageData(images, None, images, classes, transform.mean, transform.std)


def find_images(words: Sequence[str | Path], classes: Sequence[str], unlabelled: bool = False) -> Found:
    """The images that are meant by files, folders and patterns (`photos/*.jpg`), each once.

    One folder whose folders are called as the model's classes is labelled by them. A folder with other folders in it
    is refused unless they are said to be no classes, so that no accuracy is ever counted with half of the names.

    Args:
        words: as on a command line.
        classes: of the model.
        unlabelled: folders' names mean nothing.

    Raises:
        DataError: nothing there, no images, or folders whose names are no classes; which.
    """
    places = [place for word in words for place in _places(word)]
    folders = [place for place in places if place.is_dir()]
    inside = [name for folder in folders for name in _folders_in(folder)]
    if inside and not unlabelled:
        if len(places) > 1:
            raise DataError(
                f"{folders[0]} and {len(places) - 1} more were given, and there are folders in them ({_some(inside)}): "
                "give one folder whose folders are classes, or --unlabelled to read all images without classes"
            )
        return _labelled(folders[0], inside, classes)
    paths: dict[str, None] = {}
    for place in places:
        for path in _images_below(place) if place.is_dir() else [place]:
            paths.setdefault(os.path.abspath(path))
    if not paths:
        raise DataError(
            f"there are no images in {_some([str(p) for p in places])}; valid endings: {', '.join(sorted(endings()))}"
        )
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    entries = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({reason(error)}); mend or remove it") from None
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is no file")
        entries.append((os.path.relpath(path, root), status.st_size, status.st_mtime_ns))
    return Found(pack(Path(root), entries))


def seen_in_training(found: Found, classes: Sequence[str], description: Mapping[str, Any]) -> list[str]:
    """The classes all of whose images here are, by names and sizes, those that the model's training set had of it:
    an accuracy on them says little."""
    known = description.get("data")
    train = known.get("sets", {}).get("train", {}) if isinstance(known, Mapping) else {}
    if found.labels is None:
        return []
    same = []
    for number, name in enumerate(classes):
        rows = np.flatnonzero(found.labels == number)
        if len(rows) and train.get(name, "").split()[1:2] == [found.files.digest(rows)]:
            same.append(name)
    return same


def of_training_folder(found: Found, description: Mapping[str, Any]) -> tuple[int, int]:
    """How many of these images the model's run validated on, by names and sizes, and on how many it did: where most
    are here, the others are of its training folder too, whatever has changed there. (0, 0) where that is not known."""
    known = description.get("data")
    split = known.get("split") if isinstance(known, Mapping) else None
    held = split.get("held") if isinstance(split, Mapping) else None
    if held is None or found.labels is None:
        return 0, 0
    try:
        was = unpack(held)
    except ValueError:
        return 0, 0
    return int(np.isin(was, hashes_of(found.files, range(len(found.files)))).sum()), len(was)


def _labelled(folder: Path, inside: Sequence[str], classes: Sequence[str]) -> Found:
    unknown = [name for name in inside if name not in classes]
    if unknown:
        below = [name for name in inside if set(_folders_in(folder / name)) & set(classes)]
        hint = f"did you mean {folder / below[0]}? Else " if below else ""
        raise DataError(
            f"{folder} holds folders that are no classes of the model: {_some(unknown)}; its classes are "
            f"{_some(classes, 20)}; {hint}rename or remove them, or give --unlabelled to read all images without "
            "classes"
        )
    listing = list_split(folder)
    if listing.loose:
        raise DataError(
            f"{folder} holds {listing.loose} files beside the folders of its classes: what class they are is not "
            "known; move them, or give --unlabelled to read all images without classes"
        )
    numbers = np.array([classes.index(name) for name in listing.classes], np.int64)
    return Found(listing.files, numbers[listing.labels])


def _places(word: str | Path) -> list[Path]:
    """What a word means: the file or folder of that name, else what a pattern fits."""
    path = Path(word)
    if path.exists():
        return [path]
    found = sorted(glob.glob(os.path.expanduser(str(word)), recursive=True))
    if not found:
        kind = "nothing fits the pattern" if glob.has_magic(str(word)) else "there is no"
        raise DataError(f"{kind} {word} (seen from {Path.cwd()}); give images, folders of images or patterns")
    pattern = Path(word).name
    return [Path(name) for name in found if os.path.isdir(name) or _is_image(name) or not glob.has_magic(pattern)]


def _folders_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {reason(error)}") from None


def _images_below(folder: Path) -> list[str]:
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        found += [os.path.join(here, name) for name in sorted(names) if not is_hidden(name) and _is_image(name)]
    return found


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in endings()


def _some(names: Sequence[str], most: int = SHOWN) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
