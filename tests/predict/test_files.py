"""Files, folders and patterns; folders that name classes are compared with the model's."""

from __future__ import annotations

import numpy as np
import pytest

from mamba.data.listing import list_split
from mamba.errors import DataError
from mamba.predict.files import find_images, seen_in_training
from tests.predict.conftest import CLASSES


def names(found):
    return [found.files.path(row).name for row in range(len(found.files))]


def test_folders_that_are_classes_are_labels(images):
    found = find_images([images], CLASSES)
    labels = {found.files.path(i).parent.name: int(found.labels[i]) for i in range(len(found.files))}
    assert labels == {"dark": 0, "grey": 1, "bright": 2} and len(found.files) == 12


def test_some_of_the_classes_are_enough(images):
    import shutil

    shutil.rmtree(images / "grey")
    found = find_images([images], CLASSES)
    assert sorted(set(found.labels.tolist())) == [0, 2]


def test_files_folders_and_patterns_each_once(images, monkeypatch):
    (images / "dark" / "notes.txt").write_text("no image")
    found = find_images([images / "dark", str(images / "dark" / "*"), images / "grey" / "1.png"], CLASSES)
    assert found.labels is None and names(found) == ["0.png", "1.png", "2.png", "3.png", "1.png"]
    assert len(find_images([images], CLASSES, unlabelled=True).files) == 12
    monkeypatch.chdir(images)
    assert len(find_images(["*/0.png"], CLASSES).files) == 3


def test_folders_that_are_no_classes_are_refused_by_name(images):
    (images / "grey").rename(images / "gray")
    with pytest.raises(DataError, match="no classes of the model: gray; its classes are dark, grey, bright"):
        find_images([images], CLASSES)
    (images / "gray").rename(images / "grey")
    with pytest.raises(DataError, match="did you mean .*images"):
        find_images([images.parent], CLASSES)


@pytest.mark.parametrize(
    "words, said",
    [
        (["nothing"], "there is no nothing"),
        (["*.nothing"], "nothing fits the pattern"),
        (["IMAGES", "IMAGES/dark"], "give one folder whose folders are classes"),
        (["IMAGES/loose"], "files beside the folders"),
        (["IMAGES/empty"], "there are no images"),
    ],
)
def test_what_is_refused(images, words, said):
    if "loose" in words[0]:
        (images / "loose" / "dark").mkdir(parents=True)
        for place in ("loose", "loose/dark"):
            (images / place / "a.png").write_bytes((images / "grey" / "0.png").read_bytes())
    if "empty" in words[0]:
        (images / "empty").mkdir()
    with pytest.raises(DataError, match=said):
        find_images([word.replace("IMAGES", str(images)) for word in words], CLASSES)


def test_training_images_are_known_again(images):
    listing = list_split(images)
    rows = np.flatnonzero(listing.labels == 0)
    train = {listing.classes[0]: f"4 {listing.files.digest(rows)} -"}
    found = find_images([images], CLASSES)
    assert seen_in_training(found, CLASSES, {"data": {"sets": {"train": train}}}) == [listing.classes[0]]
    assert seen_in_training(found, CLASSES, {}) == []
