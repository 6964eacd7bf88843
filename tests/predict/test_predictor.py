"""Three lines from an image to its class: any form of the image gives what training's own code would see."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import mamba
from mamba.data.registry import load_data
from mamba.data.transform import Transform
from mamba.errors import CheckpointError, ConfigError, DataError
from mamba.runs.checkpoint import save_checkpoint
from tests.data.helpers import config, write_folder
from tests.predict.conftest import checkpoint


def test_every_form_of_an_image_is_the_same_image(run, images):
    model = mamba.load(run)
    file = images / "grey" / "0.png"
    array = np.asarray(Image.open(file))
    forms = [
        file,
        str(file),
        Image.open(file),
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        torch.from_numpy(array / 255).permute(2, 0, 1).float(),
    ]
    want = model.predict(file)
    assert all(model.predict(form) == want for form in forms)
    together = model.predict(forms, batch_size=4)
    assert [p.label for p in together] == [want.label] * len(forms)
    batch = torch.from_numpy(np.stack([array, array])).permute(0, 3, 1, 2)
    assert [p.label for p in model.predict(batch)] == [want.label] * 2
    assert want.label == want.top[0][0] and want.probability == want.top[0][1]
    assert sum(p for _, p in want.top) == pytest.approx(1, abs=1e-5) and len(want.top) == 3
    assert len(model.predict(file, k=2).top) == 2 and str(want).startswith(want.label)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_the_transform_is_what_training_reads(tmp_path, fit):
    root = write_folder(tmp_path / "data", size=(17, 29))
    data = load_data(config(dataset="folder", root=root, img_size=8, fit=fit), 0)
    transform = Transform(8, fit, data.mean, data.std)
    files = [data.test.files.path(row) for row in range(5)]
    want = data.normalise(torch.from_numpy(np.array(data.test.images[:5])))
    assert torch.equal(transform(files), want)


def test_load_model_carries_the_transform(tmp_path, images):
    run = checkpoint(tmp_path / "padded", data__fit="pad")
    model, description = mamba.load_model(run)
    transform = description["transform"]
    assert (transform.side, transform.fit, transform.mean) == (8, "pad", (0.5, 0.5, 0.5))
    with torch.no_grad():
        logits = model(transform([images / "grey" / "0.png"]))
    torch.testing.assert_close(logits.softmax(-1), mamba.load(run).probabilities(images / "grey" / "0.png"))


def test_a_description_with_a_transform_can_be_written_again(tmp_path, run):
    model, description = mamba.load_model(run)
    again = save_checkpoint(tmp_path / "again", model, None, description, None)
    assert "transform" not in json.loads((again / "config.json").read_text())
    assert mamba.load_model(again)[1]["transform"] == description["transform"]


def test_views_fit_what_training_shows(tmp_path, images):
    file = images / "grey" / "0.png"
    plain = mamba.load(checkpoint(tmp_path / "plain"), views=4)
    assert plain.views.count == 1  # trained without augmentation
    flipped = mamba.load(checkpoint(tmp_path / "flips", data__augment="basic"), views=2)
    one = mamba.load(checkpoint(tmp_path / "flips2", data__augment="basic"))
    with torch.no_grad():
        x = one.transform(file)
        want = (one.model(x).softmax(-1) + one.model(x.flip(-1)).softmax(-1)) / 2
    torch.testing.assert_close(flipped.probabilities(file), want)


def test_what_is_refused(tmp_path, run):
    with pytest.raises(ConfigError, match="device gpu: valid are auto, cpu, cuda"):
        mamba.load(run, device="gpu")
    with pytest.raises(CheckpointError, match="there is no"):
        mamba.load(tmp_path / "nothing")
    model, description = mamba.load_model(run)
    for key, value, words in (
        ("classes", ["a", "b"], "names 2 classes for the model's 3 outputs"),
        ("mean", None, "does not say how its images were scaled"),
    ):
        other = save_checkpoint(tmp_path / key, model, None, {**description, key: value}, None)
        with pytest.raises(CheckpointError, match=words):
            mamba.load(other)


def test_words_and_numbers_that_mean_nothing(run, images):
    """`weights="rwa"` gave the raw ones."""
    with pytest.raises(ConfigError, match="weights 'rwa': valid are best, raw, ema"):
        mamba.load(run, weights="rwa")
    for views in (0, -1):
        with pytest.raises(ConfigError, match=f"views {views}: valid are whole numbers from 1"):
            mamba.load(run, views=views)
    model, image = mamba.load(run), images / "dark" / "0.png"
    for named, told in (({"k": 0}, "k 0"), ({"k": -1}, "k -1"), ({"batch_size": 0}, "batch_size 0")):
        with pytest.raises(ConfigError, match=f"{told}: valid are whole numbers from 1"):
            model.predict(image, **named)
    for nothing in (None, {"a": 1}, 5):
        with pytest.raises(DataError, match="is no image; valid: a file, a picture"):
            model.predict(nothing)
