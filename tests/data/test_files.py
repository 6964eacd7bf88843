"""Images that stay files: the same data, in memory that does not grow with it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mamba.data.device_loader import make_train_batches
from mamba.data.files import part_of
from mamba.data.fingerprint import fingerprint
from mamba.data.loader import eval_batches, make_train_loader
from mamba.data.registry import load_data
from mamba.errors import DataError
from tests.data.helpers import config, write_folder


def settings(root, **values):
    return config(**{"dataset": "folder", "root": root, "img_size": 8, "val_fraction": 0.5, "batch_size": 4, **values})


def batches(data, spec, workers=0):
    spec = spec.model_copy(update={"loader_workers": workers})
    return list(make_train_loader(data, spec, 0, 1, 0, 1, cpus=1, pin=False).epoch(1))


@pytest.mark.parametrize("augment", ["none", "basic"])
def test_files_are_the_decoded_images(tmp_path, augment):
    root = write_folder(tmp_path)
    specs = [settings(root, cache=cache, augment=augment) for cache in ("decoded", "files")]
    decoded, files = (load_data(spec, 0) for spec in specs)
    assert (decoded.mean, decoded.std) == (files.mean, files.std)
    assert np.array_equal(decoded.train.images, files.train.images[:])
    for workers in (0, 2):
        for (a, _), (b, _) in zip(batches(decoded, specs[0]), batches(files, specs[1], workers), strict=True):
            assert torch.equal(a, b)
    for name in ("val", "test"):
        ours, theirs = (list(eval_batches(d, getattr(d, name), 2, 0, 1, torch.device("cpu"))) for d in (files, decoded))
        assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(ours, theirs, strict=True))
    known, other = fingerprint(decoded), fingerprint(files)
    assert known["sample"] == other["sample"] and known["split"] == other["split"]
    again = pickle.loads(pickle.dumps(files))
    assert np.array_equal(again.train.images[[3]], files.train.images[[3]])


def test_statistics_of_files_are_kept(tmp_path, monkeypatch):
    root = write_folder(tmp_path)
    first = load_data(settings(root, cache="files"), 0)
    with monkeypatch.context() as patched:
        patched.setattr("PIL.Image.open", lambda *_: pytest.fail("decoded again"))
        assert load_data(settings(root, cache="files"), 0).mean == first.mean
    (file,) = (root / ".cache").glob("train-8-crop-*.json")
    file.write_text("{")
    assert load_data(settings(root, cache="files"), 0).mean == first.mean
    Image.new("RGB", (9, 9)).save(root / "train" / "ant" / "0.png")
    assert load_data(settings(root, cache="files"), 0).mean != first.mean
    assert len(list((root / ".cache").glob("train-8-crop-*.json"))) == 1


def test_auto_keeps_files_above_its_limit(tmp_path, monkeypatch):
    root = write_folder(tmp_path)
    assert isinstance(load_data(settings(root), 0).train.images, np.ndarray)
    monkeypatch.setattr("mamba.data.folder.DECODED_BYTES", 36 * 8 * 8 * 3 - 1)
    data = load_data(settings(root), 0)
    assert not isinstance(data.train.images, np.ndarray) and data.side == 8
    with pytest.raises(DataError, match="data.device 'gpu' needs decoded images"):
        make_train_batches(data, settings(root, device="gpu"), 0, 1, 0, 1, 1, torch.device("cpu"))


def test_random_crops_are_cut_from_the_original(tmp_path):
    """Originals eight times as fine as the images: a quarter of one, enlarged, would have lost its stripes."""
    root = write_folder(tmp_path)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::8] = stripes[:, 1::8] = stripes[:, 2::8] = stripes[:, 3::8] = 255
    for file in root.glob("train/*/*.png"):
        Image.fromarray(stripes).save(file)
    spec = settings(root, cache="files", augment="basic", crop="resized", crop_scale=0.05)
    data = load_data(spec, 0)
    part = data.train.images.crops(np.array([0]), np.array([[0, 4, 2, 2]]))[0]  # 16 of the original's columns
    assert part[0, :, 0].max() > 200 and part[0, :, 0].min() < 60
    first, second = batches(data, spec), batches(data, spec, workers=1)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


def test_a_part_keeps_its_share_and_place():
    left, top, right, bottom = part_of((80, 40), [4, 0, 4, 4], 8)
    assert left == 0 and bottom == pytest.approx(40)
    assert (right - left) * (bottom - top) == pytest.approx(80 * 40 / 4) and right - left == pytest.approx(bottom - top)
    left, top, right, bottom = part_of((80, 40), [0, 0, 8, 8], 8)  # all of a square: as much as fits, in the middle
    assert (top, bottom) == (0, 40) and left == pytest.approx(80 - right)


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from mamba.config.schema import RunConfig
from mamba.data.loader import eval_batches, make_train_loader
from mamba.data.registry import load_data
values = {"dataset": "folder", "root": Path(sys.argv[1]), "img_size": 512, "batch_size": 4, "cache": "files",
          "loader_workers": 0, "augment": "none"}
spec = RunConfig().with_values({f"data.{k}": v for k, v in values.items()}).resolve().data
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
limit = (used + 300 * 1024) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
data = load_data(spec, 0)
assert len(data.train.images) * 512 * 512 * 3 > 2 * 300 * 2**20
seen = sum(len(y) for _, y in make_train_loader(data, spec, 0, 1, 0, 1, 1, False).epoch(0))
seen += sum(len(y) for _, y in eval_batches(data, data.val, 4, 0, 1, torch.device("cpu")))
print("seen", seen)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_data_set_larger_than_the_allowed_memory(tmp_path):
    """802 images of 512x512, 631 MB decoded, in a process that may take 300 MiB beside what torch takes."""
    source = tmp_path / "source.png"
    Image.new("RGB", (16, 16), "red").save(source)
    for split, count in (("train", 401), ("test", 4)):
        for name in "ab":
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for i in range(count):
                os.link(source, tmp_path / "d" / split / name / f"{i}.png")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    words = [sys.executable, "-c", MEMORY, str(tmp_path / "d")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "seen 800" in done.stdout  # 722 less the last batch of two, and 80
