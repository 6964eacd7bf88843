"""A run knows its data: what is stored, what is compared, and whose validation split it is."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mamba.config.schema import RunConfig
from mamba.data import load_data
from mamba.data.fingerprint import fingerprint
from mamba.data.images import ImageSet
from mamba.errors import CheckpointError, DataError
from mamba.runs.checkpoint import find_checkpoint, newest_checkpoint
from mamba.runs.provenance import check_data, check_resume, describe_data, own_split, with_split


def write(root, classes=("ant", "bee", "cat"), count=10, first=0, seed=0):
    rng = np.random.default_rng((seed, first))
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(first, count):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / split / name / f"{i}.png")
    return root


def load(root, seed=0, **values):
    values = {"dataset": "folder", "root": root, "img_size": 8, "val_fraction": 0.2, **values}
    return load_data(RunConfig().with_values({f"data.{k}": v for k, v in values.items()}).resolve().data, seed)


def stored(folder, data_set, **more):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**describe_data(data_set), **more}))
    return folder


def test_a_moved_copy_is_the_same_data(tmp_path):
    root = write(tmp_path / "here")
    before = fingerprint(load(root))
    shutil.move(root, tmp_path / "there")
    for file in (tmp_path / "there").rglob("*.png"):
        file.touch()
    assert fingerprint(load(tmp_path / "there")) == before
    assert str(tmp_path) not in json.dumps(before)


def other_pixels(root):
    file = root / "train" / "bee" / "3.png"
    size = file.stat().st_size
    for level in range(256):  # another picture in as many bytes
        pixels = np.asarray(Image.open(file)).copy()
        pixels[0, 0] = level
        Image.fromarray(pixels).save(file)
        if file.stat().st_size == size:
            return


def rename(root, old, new):
    (root / old).rename(root / new)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda root: [rename(root, f"{s}/ant", f"{s}/owl") for s in ("train", "test")], "without ant and with owl"),
        (lambda root: (root / "train/bee/3.png").unlink(), "class bee of the train set had 10 images and has 9"),
        (lambda root: rename(root, "train/bee/3.png", "train/bee/x.png"), "class bee .* is made of other files"),
        (lambda root: rename(root, "test/cat/3.png", "test/cat/x.png"), "class cat of the test set is made of"),
        (other_pixels, "class bee of the train set has images with other pixels"),
    ],
)
def test_a_run_resumes_on_its_own_data_only(tmp_path, change, said):
    root = write(tmp_path / "d")
    folder = stored(tmp_path / "checkpoint", load(root))
    check_resume(folder, load(root))
    change(root)
    with pytest.raises(CheckpointError, match=f"{said}.*: a run resumes|{said}.*; a run resumes"):
        check_resume(folder, load(root))


def test_another_split_is_no_resume(tmp_path):
    root = write(tmp_path / "d")
    folder = stored(tmp_path / "checkpoint", load(root))
    with pytest.raises(CheckpointError, match="trained with the split of data.split_seed 0 .* now the split of .* 1 "):
        check_resume(folder, load(root, split_seed=1))


def test_classes_of_a_trained_model(tmp_path):
    data = load(write(tmp_path / "d"))
    folder = stored(tmp_path / "checkpoint", data, classes=["ant", "cat", "bee"])
    with pytest.raises(CheckpointError, match="another order: number 1 is cat there and bee in the data"):
        check_data(folder, data)
    folder = stored(tmp_path / "checkpoint", data, classes=["ant", "bee", "cow"])
    with pytest.raises(CheckpointError, match="distill.teacher .* for other classes: .* without cow and with cat"):
        check_data(folder, data, "distill.teacher")
    assert check_data(folder, data, new_head=True) is None


def test_validation_images_are_never_those_of_the_training(tmp_path):
    root = write(tmp_path / "d")
    folder = stored(tmp_path / "checkpoint", load(root))
    assert check_data(folder, load(root)) is None
    assert check_data(folder, load(root, seed=1, val_fraction=0)) is None  # nothing is validated
    for values in ({"seed": 1}, {"split_seed": 7}, {"val_fraction": 0.3}, {"seed": 1, "img_size": 16}):
        with pytest.raises(CheckpointError, match="would validate on images that the model was trained on"):
            check_data(folder, load(root, **values))
    assert "other files" in check_data(folder, load(write(tmp_path / "e", count=20, seed=1), seed=1))


@pytest.mark.parametrize("cache", ["decoded", "files"])
def test_a_folder_that_has_changed_is_not_validated_on_what_was_trained_on(tmp_path, cache):
    """The split was drawn anew over the new list: images that a model had trained on validated it."""
    root = write(tmp_path / "d")
    before = load(root, cache=cache)
    old = stored(tmp_path / "old", before)
    trained = {before.train.files.name(row) for row in before.train.index}
    validated = {before.train.files.name(row) for row in before.val.index}
    write(root, count=25, first=10)  # grown
    (root / "train" / sorted(validated)[0]).unlink()  # and shrunk
    with pytest.raises(CheckpointError, match=r"of 6 images .* validated on 5 are here, and \d+ of the 15 to validate"):
        check_data(old, load(root, cache=cache))
    assert check_data(old, load(root, cache=cache, val_fraction=0)) is not None  # nothing is validated
    now = load(root, cache=cache, split_from=old, seed=3)
    names = {now.train.files.name(row) for row in now.val.index}
    assert names == validated - {sorted(validated)[0]} and len(now.train) == 74 - 5
    assert trained <= {now.train.files.name(row) for row in now.train.index}
    assert "nothing else is validated on" in check_data(old, now)
    new = stored(tmp_path / "new", now)  # and who starts from that one has its split without being asked
    config = with_split(RunConfig().with_values({"model.checkpoint": new}))
    assert config.data.split_from == new and config.data.split_seed is None
    again = load(root, cache=cache, split_from=config.data.split_from)
    assert check_data(new, again) is None
    check_resume(new, again)
    shutil.rmtree(old)  # a run that goes on has its own by now
    assert own_split(RunConfig().with_values({"data.split_from": old}), tmp_path).data.split_from == old
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copytree(new, tmp_path / "run" / "checkpoints" / "step-3")
    resumed = own_split(RunConfig().with_values({"data.split_from": old}), tmp_path / "run")
    check_resume(new, load(root, cache=cache, split_from=resumed.data.split_from))


def as_bitmaps(root):
    """All files of the same size."""
    for file in sorted(root.rglob("*.png")):
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()


def test_files_that_were_renumbered_are_not_taken_for_those_that_they_are_named_after(tmp_path):
    """One was removed and those behind it were renamed: what a model had trained on bore names of its validation."""
    root = write(tmp_path / "d")
    as_bitmaps(root)
    before = load(root)
    old = stored(tmp_path / "old", before)
    folder = root / "train" / before.train.files.name(int(before.train.index[0]))
    numbered = sorted(folder.parent.glob("*.bmp"))
    numbered[3].unlink()
    for one, other in itertools.pairwise(numbered[3:]):
        other.rename(one)
    with pytest.raises(CheckpointError, match="of the same name and size have other contents: files were renamed"):
        check_data(old, load(root, split_from=old))


def test_other_pixels_under_the_same_names_are_said(tmp_path):
    root = write(tmp_path / "d")
    as_bitmaps(root)
    old = stored(tmp_path / "old", load(root))
    one, other = sorted((root / "train").rglob("*.bmp"))[:2]
    one.rename(root / "aside"), other.rename(one), (root / "aside").rename(other)
    assert "whose pixels were others" in (check_data(old, load(root)) or "")


def test_a_split_that_cannot_be_that_of_another_run_is_refused(tmp_path):
    root = write(tmp_path / "d")
    with pytest.raises(DataError, match=r"data\.split_from .*nowhere: there is no checkpoint"):
        load(root, split_from=tmp_path / "nowhere")
    old = stored(tmp_path / "old", load(root, val_fraction=0))
    with pytest.raises(DataError, match="does not say which images it validated on"):
        load(root, split_from=old)
    stored(old, load(root))
    text = (old / "config.json").read_text()
    held = json.loads(text)["data"]["split"]["held"]
    (old / "config.json").write_text(text.replace(held, held[:-8] + "AAAAAAA="))
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        load(root, split_from=old)
    stored(old, load(root))
    for file in (root / "train" / "bee").iterdir():
        file.rename(file.with_stem(f"x{file.stem}"))
    with pytest.raises(DataError, match=r"4 of the 6 images .* of 1 of 3 classes: bee \(10 and 0\);"):
        load(root, split_from=old)
    with pytest.raises(DataError, match="is for image folders"):
        load(root, dataset="digits", split_from=old)


def test_a_checkpoint_of_an_earlier_version_is_said(tmp_path):
    data = load(write(tmp_path / "d"))
    folder = stored(tmp_path / "checkpoint", data, data=None)
    assert "earlier version" in check_data(folder, data)
    check_resume(folder, data)


def test_the_split_stays_the_models_own(small_fit, small_config, small_data, tmp_path):
    small_fit("run", optim__epochs=1, seed=4)
    start = find_checkpoint(tmp_path / "run")
    description = json.loads((start / "config.json").read_text())
    assert description["data"]["split"]["val"] == 24
    del description["checksum"]
    description["data"]["split"] |= {"seed": 5, "fraction": 0.25}
    (start / "config.json").write_text(json.dumps(description))
    for key in ("model__checkpoint", "distill__teacher"):
        config = with_split(small_config(seed=9, **{key: start}))
        assert (config.data.split_seed, config.data.val_fraction, config.seed) == (5, 0.25, 9)
    asked = with_split(small_config(model__checkpoint=start, data__split_seed=1))
    assert (asked.data.split_seed, asked.data.val_fraction) == (1, 0.25)
    del description["data"]  # of an earlier version: its seed decided
    (start / "config.json").write_text(json.dumps(description))
    assert with_split(small_config(seed=9), start).data.split_seed == 4
    assert with_split(small_config(seed=9)).data.split_seed is None


def test_the_trainer_compares(small_fit, small_data, tmp_path):
    small_fit("run", optim__epochs=1)
    assert newest_checkpoint(tmp_path / "run") is not None
    renamed = small_data.__class__(**{**_fields(small_data), "classes": ("grey", "dark", "bright")})
    with pytest.raises(CheckpointError, match="another order: number 0 is dark"):
        small_fit("run", data=renamed, optim__epochs=2)
    (tmp_path / "other").mkdir()
    moved = np.concatenate([small_data.val.index, small_data.train.index])
    swapped = {
        "train": ImageSet(small_data.train.images, small_data.train.labels, np.sort(moved[:72])),
        "val": ImageSet(small_data.train.images, small_data.train.labels, np.sort(moved[72:])),
    }
    leaky = small_data.__class__(**{**_fields(small_data), **swapped})
    for key in ("model__checkpoint", "distill__teacher"):
        with pytest.raises(CheckpointError, match="would validate on images that the model was trained on"):
            small_fit("other", data=leaky, optim__epochs=1, **{key: tmp_path / "run"})


def _fields(data):
    return {name: getattr(data, name) for name in data.__dataclass_fields__}
