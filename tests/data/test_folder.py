"""Image folders: listed, decoded once, and what is wrong is named."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from mamba.data.registry import load_data
from mamba.errors import DataError
from tests.data.helpers import config, write_folder


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


def test_folder_with_val_alone_tests_on_it(tmp_path):
    root = write_folder(tmp_path, ("train", "val"))
    data = load_data(config(dataset="folder", root=root, img_size=8, val_fraction=0.5), 0)
    assert (len(data.train), len(data.val), len(data.test)) == (9, 9, 18)


def test_unwritable_root_is_cached_elsewhere(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "images")
    (root / ".cache").write_text("a file, so that no folder can be made of it")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_data(config(dataset="folder", root=root, img_size=8, val_fraction=0.5), 0)
    assert list((tmp_path / "home" / ".cache" / "mamba-forge").glob("train-8-*.npy"))


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
