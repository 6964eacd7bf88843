"""Data sets, splits, loaders: exact, seeded, independent of how the work is shared out; bad files are named."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mamba.config.schema import DataConfig, RunConfig
from mamba.data.loader import (
    ImageSet,
    describe,
    eval_batches,
    load_data,
    make_train_loader,
    split_validation,
)
from mamba.errors import DataError


def config(**values) -> DataConfig:
    return RunConfig().with_values({f"data.{k}": v for k, v in values.items()}).resolve().data


def write_folder(root, splits=("train", "test"), classes=("ant", "bee", "cat"), count=6, size=(10, 12)):
    rng = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (*size, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


# --- splits ----------------------------------------------------------------------------------------------------------


def test_digits_splits_are_fixed_disjoint_and_balanced():
    data, other_seed = load_data(config(dataset="digits"), 0), load_data(config(dataset="digits"), 1)
    assert (len(data.train), len(data.val), len(data.test)) == (1295, 143, 359)
    assert data.train.images.shape[1:] == (8, 8, 3) and data.train.images.max() == 255
    assert not set(data.train.index) & set(data.val.index)
    assert np.array_equal(data.test.images, other_seed.test.images)  # the test set does not depend on the seed
    assert not np.array_equal(data.val.index, other_seed.val.index)
    counts = np.bincount(data.val.labels[data.val.index])
    assert counts.min() >= 14 and counts.max() <= 15
    assert np.array_equal(data.val.index, load_data(config(dataset="digits"), 0).val.index)


def test_no_validation_split():
    data = load_data(config(dataset="digits", val_fraction=0), 0)
    assert data.val is None and len(data.train) == 1438


def test_validation_split_that_would_be_empty():
    tiny = ImageSet.whole(np.zeros((6, 2, 2, 3), np.uint8), np.array([0, 0, 0, 1, 1, 1]))
    with pytest.raises(DataError, match="data.val_fraction 0.1 of 6 training images leaves 6 to train on and 0"):
        split_validation(tiny, 0.1, 0)


def test_resized_digits():
    data = load_data(config(dataset="digits", img_size=16), 0)
    assert data.train.images.shape[1:] == data.test.images.shape[1:] == (16, 16, 3)


# --- CIFAR -----------------------------------------------------------------------------------------------------------


def write_cifar10(root):
    """A valid, small CIFAR-10 in torchvision's own format (its checksums are switched off by the caller)."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))


def test_cifar10_through_torchvision(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = load_data(config(dataset="cifar10", root=tmp_path), 0)
    assert (len(data.train), len(data.val), len(data.test)) == (90, 10, 20)
    assert data.train.images.shape == (100, 32, 32, 3) and data.classes[3] == "class3"


@pytest.mark.parametrize("name, inner", [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_cifar_without_network_says_where_to_put_it(tmp_path, monkeypatch, name, inner):
    def offline(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(DataError, match=f"{inner} and could not be downloaded .*no network.*python.tar.gz into"):
        load_data(config(dataset=name, root=tmp_path), 0)


def test_describe_cifar_without_files(tmp_path):
    assert describe(config(dataset="cifar10", root=tmp_path / "none"), 0) == (10, 45_000)
    assert describe(config(dataset="cifar100", root=tmp_path / "none"), 0) == (100, 45_000)


# --- image folders ---------------------------------------------------------------------------------------------------


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


# --- loaders ---------------------------------------------------------------------------------------------------------


def loader(data, rank=0, world_size=1, accumulate=1, seed=0, **values):
    spec = config(dataset="digits", batch_size=16, **values)
    return make_train_loader(data, spec, seed, accumulate, rank, world_size, cpus=1, pin=False)


def batches(data, epoch=0, start=0, **kwargs):
    return list(loader(data, **kwargs).epoch(epoch, start))


def test_an_epoch_sees_each_image_once_and_reshuffles(small_data):
    marked = np.arange(96, dtype=np.int64)  # labels that say which image it was
    data = small_data.__class__(
        ImageSet(small_data.train.images, marked, small_data.train.index), None, small_data.test, ("a",), (0,), (1,)
    )
    first, second = (torch.cat([labels for _, labels in batches(data, epoch=e)]).tolist() for e in (0, 1))
    assert len(set(first)) == len(first) == 64  # 72 images, 4 batches of 16, the rest is left out
    assert set(first) <= set(small_data.train.index.tolist())
    assert first != second
    again = torch.cat([labels for _, labels in batches(data, epoch=1)]).tolist()
    assert again == second


@pytest.mark.parametrize("augment", ["none", "basic", "randaugment", "autoaugment"])
def test_sharing_the_work_changes_nothing(small_data, augment):
    """The same images, augmented the same way: one worker, two workers, micro-batches, loader processes."""
    settings = {"augment": augment, "random_erasing": 0.5}
    whole = batches(small_data, epoch=1, **settings)
    ranks = [batches(small_data, epoch=1, rank=r, world_size=2, **settings) for r in (0, 1)]
    micro = batches(small_data, epoch=1, accumulate=2, **settings)
    processes = batches(small_data, epoch=1, loader_workers=2, **settings)
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(images, torch.cat([ranks[r][step][0] for r in (0, 1)]))
        assert torch.equal(images, torch.cat([micro[2 * step + i][0] for i in (0, 1)]))
        assert torch.equal(images, processes[step][0])
        assert torch.equal(labels, torch.cat([ranks[r][step][1] for r in (0, 1)]))


def test_augmentation_differs_by_seed_epoch_and_step(small_data):
    """The same 16 images over and over, so that only the random numbers can make a difference."""
    few = small_data.__class__(
        **{**vars(small_data), "train": ImageSet(small_data.train.images, small_data.train.labels, np.zeros(48, int))}
    )
    settings = {"augment": "basic", "random_erasing": 0.5}
    first, second = (images for images, _ in batches(few, **settings)[:2])
    other_epoch = batches(few, epoch=1, **settings)[0][0]
    other_seed = batches(few, seed=1, **settings)[0][0]
    for other in (second, other_epoch, other_seed):
        assert not torch.equal(first, other)
    assert len({i.numpy().tobytes() for i in first}) > 8  # nor is it one draw for the whole batch


def test_an_epoch_can_begin_in_the_middle(small_data):
    settings = {"augment": "basic"}
    rest = batches(small_data, epoch=2, start=2, **settings)
    for (a, _), (b, _) in zip(batches(small_data, epoch=2, **settings)[2:], rest, strict=True):
        assert torch.equal(a, b)


def test_loading_leaves_the_global_random_state(small_data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    batches(small_data, augment="autoaugment", random_erasing=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_larger_than_the_training_set(small_data):
    spec = config(dataset="digits", batch_size=128)
    with pytest.raises(DataError, match="data.batch_size 128 is larger than the training set of 72 images"):
        make_train_loader(small_data, spec, 0, 1, 0, 1, cpus=1, pin=False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_sees_each_image_exactly_once(small_data, world_size):
    seen = [
        labels
        for rank in range(world_size)
        for _, labels in eval_batches(small_data, small_data.val, 7, rank, world_size, torch.device("cpu"))
    ]
    counts = torch.bincount(torch.cat(seen), minlength=3).tolist()
    assert counts == np.bincount(small_data.val.labels[small_data.val.index]).tolist()


def test_normalised_training_images(small_data):
    data = load_data(config(dataset="digits"), 0)
    images = data.normalise(torch.from_numpy(data.train.images))
    assert images.shape[1:] == (3, 8, 8)
    assert abs(float(images.mean())) < 1e-3 and abs(float(images.std()) - 1) < 1e-3
