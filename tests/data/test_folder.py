"""Image folders: listed, decoded once, and what is wrong is named."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from mamba.data.copies import copies
from mamba.data.listing import list_split
from mamba.data.registry import load_data
from mamba.errors import DataError
from tests.data.helpers import config, write_folder


def load(root, **values):
    return load_data(config(**{"dataset": "folder", "root": root, "img_size": 8, "val_fraction": 0.5, **values}), 0)


def test_folder_is_decoded_once(tmp_path, monkeypatch):
    root = write_folder(tmp_path)
    spec = config(dataset="folder", root=root, img_size=8, val_fraction=0.5)
    data = load_data(spec, 0)
    assert data.classes == ("ant", "bee", "cat")
    assert (len(data.train), len(data.val), len(data.test)) == (9, 9, 18)
    assert data.test.images.shape == (18, 8, 8, 3)
    brightness = [data.test.images[data.test.labels == c].mean() for c in range(3)]
    assert brightness[0] < brightness[1] < brightness[2]  # labels belong to their images
    monkeypatch.setattr("PIL.Image.open", lambda *_: pytest.fail("decoded again"))
    again = load_data(spec, 0)
    assert np.array_equal(again.train.images, data.train.images)


def test_a_changed_file_is_decoded_again(tmp_path):
    root = write_folder(tmp_path)
    spec = config(dataset="folder", root=root, img_size=8)
    before = load_data(config(dataset="folder", root=root, img_size=8, val_fraction=0.5), 0).train.images[0].copy()
    Image.fromarray(np.full((11, 11, 3), 255, np.uint8)).save(root / "train" / "ant" / "0.png")
    after = load_data(spec.model_copy(update={"val_fraction": 0.5}), 0).train.images[0]
    assert after.min() == 255 and not np.array_equal(before, after)


def test_folder_with_val_and_test_uses_val_as_it_is(tmp_path):
    root = write_folder(tmp_path, ("train", "val", "test"))
    for name in ("ant", "bee", "cat"):
        (root / "val" / name / "0.png").unlink()
    data = load_data(config(dataset="folder", root=root, img_size=8), 0)
    assert (len(data.train), len(data.val), len(data.test)) == (18, 15, 18)


def test_what_asks_for_another_split_than_val_is_said_or_refused(tmp_path):
    """data.val_fraction was taken, and val/ validated as ever."""
    root = write_folder(tmp_path, splits=("train", "val", "test"))
    assert not any("without effect" in note for note in load(root, val_fraction=None).notes)
    note = load(root, val_fraction=0.3).notes[-1]
    assert note.endswith("val is the validation split as it is: data.val_fraction 0.3 without effect")
    with pytest.raises(DataError, match=r"data\.split_from .* has no effect: .*val is the validation split"):
        load(root, split_from=tmp_path)


def test_folder_with_val_alone_tests_on_it(tmp_path):
    root = write_folder(tmp_path, ("train", "val"))
    data = load_data(config(dataset="folder", root=root, img_size=8, val_fraction=0.5), 0)
    assert (len(data.train), len(data.val), len(data.test)) == (9, 9, 18)


def test_unwritable_root_is_cached_elsewhere(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "images")
    (root / ".cache").write_text("a file, so that no folder can be made of it")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_data(config(dataset="folder", root=root, img_size=8, val_fraction=0.5), 0)
    assert list((tmp_path / "home" / ".cache" / "mamba-forge" / "data").glob("images-*/train-8-*.npy"))


def test_the_cache_follows_its_variable(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "images")
    monkeypatch.setenv("MAMBA_FORGE_CACHE", str(tmp_path / "elsewhere"))
    load(root)
    assert list((tmp_path / "elsewhere" / "data").glob("images-*/train-8-*.npy")) and not (root / ".cache").exists()


def break_corrupt(root):
    (root / "train" / "bee" / "3.png").write_bytes(b"not an image")


def break_link(root):
    (root / "train" / "bee" / "9.png").symlink_to(root / "nowhere.png")


def break_truncated(root):
    file = root / "test" / "cat" / "5.png"
    file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda root: shutil.rmtree(root / "train"), "is not an image folder; it must hold train/<class>/<image>"),
        (lambda root: shutil.rmtree(root / "test"), "is not an image folder"),
        (lambda root: shutil.rmtree(root / "test" / "bee"), r"differ; only in train/: \['bee'\]$"),
        (lambda root: (root / "test" / "bee").rename(root / "test" / "wasp"), r"\['bee'\]; only in test/: \['wasp'\]"),
        (lambda root: [f.unlink() for f in (root / "train" / "ant").iterdir()], "train/ant holds no images"),
        (lambda root: [shutil.rmtree(d) for d in (root / "train").iterdir()], "train holds no class folders"),
        (
            lambda root: [shutil.rmtree(d) for d in root.glob("*/[bc]*")],
            "train holds one class, ant; a classifier needs",
        ),
        (break_corrupt, r"train/bee/3.png is not a readable image"),
        (break_link, r"train/bee/9.png cannot be read"),
        (break_truncated, r"test/cat/5.png is not a readable image"),
    ],
)
def test_folder_errors_name_the_place(tmp_path, damage, message):
    root = write_folder(tmp_path)
    damage(root)
    with pytest.raises(DataError, match=message):
        load_data(config(dataset="folder", root=root, img_size=8, val_fraction=0.5), 0)
    assert not list(root.glob(".cache/*.partial"))


# --- what is read, and what is said of the rest ----------------------------------------------------------------------


def test_what_is_not_read_is_said_and_can_be_refused(tmp_path):
    root = write_folder(tmp_path / "images")
    for hidden in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        shutil.copytree(root / "train" / "ant", root / "train" / hidden)
        shutil.copytree(root / "train" / "ant", root / "test" / "bee" / hidden)
    for name in ("train/ant/a.npy", "train/ant/b.npy", "train/bee/x.heic", "test/labels.csv", "train/ant/._0.png"):
        (root / name).write_bytes(b"?")
    (root / "extra").mkdir()
    data = load(root)
    assert data.classes == ("ant", "bee", "cat") and len(data.train) + len(data.val) == 18
    (line,) = data.notes
    for said in (
        "36 images read",
        "3 files that are no images",
        "2 .npy",
        "1 .heic",
        "1 files beside the class folders",
    ):
        assert said in line
    assert "2 @eaDir" in line and "2 __MACOSX" in line and "2 .ipynb_checkpoints" in line and "extra/ beside" in line
    with pytest.raises(DataError, match="data.strict: .*2 .npy"):
        load(root, strict=True)
    assert load(write_folder(tmp_path / "clean"), strict=True).notes == ()


def test_deeper_folders_and_other_endings_are_read(tmp_path):
    root = write_folder(tmp_path)
    plain = load(root)
    (root / "train" / "bee" / "3more" / "still").mkdir(parents=True)
    (root / "train" / "bee" / "3more" / "still" / "up").symlink_to(root / "train" / "bee")  # a circle
    for i in (3, 4):
        (root / "train" / "bee" / f"{i}.png").rename(root / "train" / "bee" / "3more" / "still" / f"{i}.PNG")
    Image.open(root / "train" / "cat" / "0.png").save(root / "train" / "cat" / "0.avif")
    (root / "train" / "cat" / "0.png").unlink()
    (root / "train" / "ant" / "0.png").rename(root / "train" / "ant" / "0.jfif")
    data = load(root)
    assert len(data.train) + len(data.val) == 18 and data.notes == ()
    assert np.bincount(data.train.labels).tolist() == [6, 6, 6]
    assert np.array_equal(data.train.images[6:12], plain.train.images[6:12])  # 3 and 4 still after 0 to 2
    assert data.train.files.name(9) == "bee/3more/still/3.PNG"


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(p.read_bytes()[:100]),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:-500]),
        lambda p: p.write_bytes(p.read_bytes()[:-500] + bytes(500)),
        lambda p: p.unlink(),
    ],
    ids=["cut", "empty", "cut in the pixels", "zeros", "gone"],
)
@pytest.mark.parametrize("ending", ["npy", "hash"])
def test_a_damaged_cache_is_made_again(tmp_path, damage, ending):
    root = write_folder(tmp_path)
    good = load(root)
    images, hashes = np.array(good.train.images), good.train.hashes.copy()
    (file,) = (root / ".cache").glob(f"train*.{ending}")
    damage(file)
    again = load(root)
    assert np.array_equal(again.train.images, images) and np.array_equal(again.train.hashes, hashes)


def test_caches_of_changed_files_are_removed(tmp_path):
    root = write_folder(tmp_path)
    load(root)
    load(root, fit="pad")
    (root / ".cache" / "train-8-0123456789abcdef.npy").write_bytes(b"as an earlier version named it")
    Image.new("RGB", (9, 9)).save(root / "train" / "ant" / "0.png")
    load(root)
    left = sorted(p.name.rsplit("-", 1)[0] + p.suffix for p in (root / ".cache").glob("train*.[nh]*"))
    assert left == ["train-8-crop.hash", "train-8-crop.npy", "train-8-pad.hash", "train-8-pad.npy"]


def test_pixels_are_not_pickled(tmp_path):
    """Tune puts the data into its object store: the file's name, not what it holds."""
    root = write_folder(tmp_path, size=(64, 64))
    data = load(root, img_size=64)
    pickled = pickle.dumps(data)
    assert len(pickled) < data.train.images.nbytes / 10
    shutil.rmtree(root / ".cache")  # as on another node
    again = pickle.loads(pickled)
    assert np.array_equal(again.train.images, data.train.images) and again.classes == data.classes
    part = pickle.loads(pickle.dumps(data.train.images[2:4]))  # what is taken out of it is an array
    assert type(part) is np.ndarray and np.array_equal(part, data.train.images[2:4])


def test_processes_decode_what_threads_do(tmp_path, monkeypatch, capfd):
    root = write_folder(tmp_path, count=50)
    threads = load(root)
    monkeypatch.setattr("mamba.data.cache.MANY_FILES", 1)
    monkeypatch.setattr("mamba.data.cache.PIECE", 16)
    monkeypatch.setattr("mamba.data.cache.PATIENCE_S", 0.0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    shutil.rmtree(root / ".cache")
    processes = load(root)
    assert np.array_equal(threads.train.images, processes.train.images)
    assert np.array_equal(threads.train.hashes, processes.train.hashes)
    assert "decoding train: 150 images in" in capfd.readouterr().err
    shutil.rmtree(root / ".cache")
    (root / "train" / "bee" / "7.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="train/bee/7.png is not a readable image"):
        load(root)


# --- what the user is told -------------------------------------------------------------------------------------------


def test_duplicates_and_tiny_splits_are_said(tmp_path):
    root = write_folder(tmp_path)
    for name in ("0", "1"):
        shutil.copy(root / "train" / "bee" / f"{name}.png", root / "test" / "bee" / f"{name}.png")
    rng = np.random.default_rng(1)
    for file in [*root.glob("test/[ac]*/*"), *root.glob("test/bee/[2-9].png")]:  # the helper writes both splits alike
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(file)
    remarks = load(root).remarks()
    assert "2 of 18 test images are training images too, pixel for pixel" in remarks
    assert "validation split of 9 images: one is 11 points" in remarks
    assert "test set of 18 images: one is 5.6 points" in remarks
    assert load_data(config(dataset="digits"), 0).remarks() == []
    said = [line for line in load(root, cache="files").remarks() if "training images too" in line]
    words = "2 of 18 test images are training images too, byte for byte (pixels are not compared with data.cache files)"
    assert said == [words]


def test_images_that_lie_twice_in_the_training_set_are_said_where_they_are_validated_on(tmp_path):
    root = write_folder(tmp_path)
    said = [line for line in load(root).remarks() if "validation images are training images" in line]
    assert said == []
    for file in sorted(root.glob("train/*/*.png")):
        shutil.copy(file, file.with_name(f"{file.stem} copy.png"))
    data = load(root)
    (said,) = [line for line in data.remarks() if "validation images are training images" in line]
    hashes = data.train.pixel_hashes
    both = np.isin(hashes[data.val.index], hashes[data.train.index]).sum()
    assert said.startswith(f"{both} of {len(data.val)} validation images are training images too") and both > 0


def test_copies_are_told_from_files_of_the_same_size(tmp_path, monkeypatch):
    root = write_folder(tmp_path, count=2)
    for i, file in enumerate(sorted(root.rglob("*.png"))):
        file.write_bytes(bytes([i]) + bytes(10_000) + bytes([i]))  # alike in their middles
    train, test = (list_split(root / name).files for name in ("train", "test"))
    assert copies(train, test) == 0
    shutil.copy(root / "train" / "bee" / "0.png", root / "test" / "cat" / "1.png")
    train, test = (list_split(root / name).files for name in ("train", "test"))
    assert copies(train, test) == 1
    monkeypatch.setattr("mamba.data.copies._count", lambda *_: pytest.fail("counted again"))
    assert copies(train, test) == 1
