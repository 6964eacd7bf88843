"""A run knows its data: what its checkpoints keep of it, and the one comparison of that with the data at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mamba.config.schema import RunConfig
from mamba.data.fingerprint import UNKNOWN, fingerprint
from mamba.data.held import hashes_of, probed_again, unpack
from mamba.data.images import ImageData
from mamba.errors import CheckpointError
from mamba.runs.checkpoint import find_checkpoint, newest_checkpoint, read_description

OLD = "is of an earlier version and does not say what data it was trained on: that cannot be compared"


def describe_data(data: ImageData) -> dict[str, Any]:
    """What a checkpoint's config.json says of its data: `classes` in order, `mean` and `std`, and `data`, the
    fingerprint."""
    return {
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "data": fingerprint(data),
    }


def with_split(config: RunConfig, path: Path | None = None) -> RunConfig:
    """A config whose `data.split_seed` and `data.val_fraction`, or `data.split_from`, where they are None, are those of
    the model that the run starts from, or of its teacher: a trained model's validation split stays its own, whatever
    the seed.

    Args:
        config: of the run.
        path: the checkpoint, where it is not `model.checkpoint`.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    path = path or config.model.checkpoint or config.distill.teacher
    asked = {"data.split_seed": config.data.split_seed, "data.val_fraction": config.data.val_fraction}
    if path is None or config.data.split_from is not None or None not in asked.values():
        return config
    try:
        folder = find_checkpoint(path)
        description = read_description(folder)
    except CheckpointError as error:
        key = "distill.teacher" if path == config.distill.teacher else "model.checkpoint"
        raise CheckpointError(f"{key}: {error}", every_rank=error.every_rank) from None
    split = _dict(_dict(description.get("data")).get("split"))
    seed, fraction = split.get("seed"), split.get("fraction")
    if not split:  # of an earlier version, whose seed decided
        trained = _dict(description.get("config"))
        data = _dict(trained.get("data"))
        own = data.get("split_seed")
        seed, fraction = trained.get("seed") if own is None else own, data.get("val_fraction")
    elif seed is None and split.get("held") and set(asked.values()) == {None}:  # of another run before it
        return config.with_values({"data.split_from": path})
    values = {"data.split_seed": seed, "data.val_fraction": fraction}
    return config.with_values({key: value for key, value in values.items() if asked[key] is None and value is not None})


def own_split(config: RunConfig, folder: Path) -> RunConfig:
    """The config of a run that is continued: where its split is another run's, its own checkpoints keep that by now,
    wherever the other has gone."""
    here = folder if newest_checkpoint(folder) else folder / "start"
    if config.data.split_from is None or not here.exists():
        return config
    return config.with_values({"data.split_from": here})


def check_data(path: Path, data: ImageData, key: str = "model.checkpoint", new_head: bool = False) -> str | None:
    """See that a trained model may be used with this data: its classes are these in this order (unless `new_head`),
    and where it was trained on the same files, nothing it was trained on is validated on.

    Returns:
        what the user should know although nothing is wrong, a sentence; or None.

    Raises:
        CheckpointError: names the first difference.
    """
    description = read_description(find_checkpoint(path))
    classes = description.get("classes")
    if classes is not None and not new_head and list(classes) != list(data.classes):
        raise CheckpointError(f"{key} {path} {_classes_differ(classes, list(data.classes))}", every_rank=True)
    before = _dict(description.get("data"))
    if not before:
        return f"{key} {path} {OLD}"
    now = fingerprint(data)
    if _files(before) != _files(now):
        changed = _check_changed(path, before, data, key)
        return changed or (
            f"{key} {path} was trained on other files than these: whether it has seen some of the images to validate "
            "and test on is not known"
        )
    old, new = before["split"], now["split"]
    if data.val is not None and old["digest"] != new["digest"]:
        raise CheckpointError(
            f"{key} {path} was trained with {_split(old)}, and this run has {_split(new)}: it would validate on images "
            "that the model was trained on; leave data.split_seed and data.val_fraction out to keep the model's own",
            every_rank=True,
        )
    if before["side"] == now["side"] and _pixels(before) != _pixels(now):
        return f"{key} {path} was trained on files of these names and sizes whose pixels were others"
    return None


def _check_changed(path: Path, before: dict[str, Any], data: ImageData, key: str) -> str | None:
    """Of a folder that has grown or shrunk since a model was trained on it: see that nothing is validated on but what
    that model validated on. Returns what should be said; None where this is no such folder, as far as is known.

    Raises:
        CheckpointError: with the numbers.
    """
    held, files = before["split"].get("held"), data.train.files
    if held is None or files is None or data.val is None or data.split is None:
        return None
    was, now = unpack(held), hashes_of(files, range(len(files)))
    here, other = int(np.isin(now, was).sum()), int((~np.isin(now[data.val.index], was)).sum())
    same, others = probed_again(files, now, before["split"].get("probe"))
    if not here or (others and not same):
        return None
    if others:
        raise CheckpointError(
            f"{key} {path} was trained when the folder held other files, and of {same + others} that were compared "
            f"{others} of the same name and size have other contents: files were renamed or rewritten, so what it was "
            "trained on cannot be told from what is validated on; start from new weights, or from the folder as it was",
            every_rank=True,
        )
    seen = (
        f"{key} {path} was trained when the folder held other files: of {len(was)} images that it validated on {here}"
    )
    if other:
        raise CheckpointError(
            f"{seen} are here, and {other} of the {len(data.val)} to validate on are none of those, it may have been "
            f"trained on them; give --data.split-from {path} to validate on those that are here and to train on all "
            "others, or start from new weights",
            every_rank=True,
        )
    return f"{seen} are here, and nothing else is validated on"


def check_resume(folder: Path, data: ImageData) -> None:
    """See that a run goes on with the data that it began with.

    Args:
        folder: the checkpoint that it goes on from.
        data: as loaded now.

    Raises:
        CheckpointError: names the first difference.
    """
    description = read_description(folder)
    classes = description.get("classes")
    if classes is not None and list(classes) != list(data.classes):
        raise CheckpointError(
            f"{folder} {_classes_differ(classes, list(data.classes))}: a run resumes on its own data only",
            every_rank=True,
        )
    before = _dict(description.get("data"))
    found = difference(before, fingerprint(data)) if before else None
    if found:
        raise CheckpointError(f"{folder}: {found}; a run resumes on its own data only", every_rank=True)


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first thing in which two fingerprints differ, as half a sentence."""
    for name in [*before["sets"], *now["sets"]]:
        if name not in before["sets"] or name not in now["sets"]:
            return f"the data {'has' if name in now['sets'] else 'had'} a set {name}/ of its own that the other lacks"
    for name, old in before["sets"].items():
        for label, line in old.items():
            count, files, pixels = line.split()
            count_now, files_now, pixels_now = now["sets"][name].get(label, "0 - -").split()
            where = f"class {label} of the {name} set"
            if count != count_now:
                return f"{where} had {count} images and has {count_now} now"
            if files != files_now:
                return f"{where} is made of other files: names or sizes have changed"
            if before["side"] == now["side"] and UNKNOWN not in (pixels, pixels_now) and pixels != pixels_now:
                return f"{where} has images with other pixels, though names and sizes are the same, or another data.fit"
    samples = [found.get("sample", UNKNOWN) for found in (before, now)]
    if before["side"] == now["side"] and UNKNOWN not in samples and samples[0] != samples[1]:
        return "training images have other pixels, though names and sizes are the same, or another data.fit"
    old_split, new_split = before["split"], now["split"]
    if old_split["digest"] != new_split["digest"]:
        return f"it was trained with {_split(old_split)} and there is now {_split(new_split)}"
    return None


def _classes_differ(theirs: list[str], ours: list[str]) -> str:
    if sorted(theirs) == sorted(ours):
        at = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
        return (
            f"knows the same classes in another order: number {at} is {theirs[at]} there and {ours[at]} in the data; "
            "its outputs would be read as other classes"
        )
    missing, new = (sorted(set(a) - set(b)) for a, b in ((theirs, ours), (ours, theirs)))
    parts = [f"without {_some(missing)}" if missing else "", f"with {_some(new)}" if new else ""]
    return f"is for other classes: the data is {' and '.join(p for p in parts if p) or 'of another number of them'}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _split(split: dict[str, Any]) -> str:
    if split["seed"] is None:
        return f"a split into {split['train']} training and {split['val']} validation images"
    return (
        f"the split of data.split_seed {split['seed']} and data.val_fraction {split['fraction']:g} ({split['train']} "
        f"training and {split['val']} validation images)"
    )


def _files(found: dict[str, Any]) -> list[str]:
    """What does not depend on the images' size."""
    return [" ".join(line.split()[:2]) for line in found["sets"]["train"].values()]


def _pixels(found: dict[str, Any]) -> list[str]:
    """A digest of each class's training images; nothing where they are not decoded at once."""
    pixels = [line.split()[2] for line in found["sets"]["train"].values()]
    return [] if UNKNOWN in pixels else pixels


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
