"""An experiment or a series goes on with the data and the models that it was begun with."""

from __future__ import annotations

import json

import pytest

from mamba.data.fingerprint import fingerprint
from mamba.errors import ConfigError, FolderError
from mamba.runs.inputs import INPUTS, keep_inputs
from tests.runs.test_provenance import load, stored, write


def test_other_data_and_other_models_are_refused(tmp_path):
    """A sweep that was continued after its folder had grown ranked trials on both, one below the other."""
    root = write(tmp_path / "d")
    first, other = (fingerprint(load(root, img_size=side)) for side in (8, 16))
    model = stored(tmp_path / "model", load(root))
    keep_inputs(tmp_path, {"a": first}, [model])
    keep_inputs(tmp_path, {"a": first, "b": other}, [model])  # a search draws what is new
    keep_inputs(tmp_path, {"b": other})
    (root / "train" / "bee" / "3.png").unlink()
    with pytest.raises(ConfigError, match=r"begun with other data: class bee of the train set had 10 images and has 9"):
        keep_inputs(tmp_path, {"a": fingerprint(load(root))}, [model])
    tree = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**tree, "checksums": {"model.safetensors": "another"}}))
    with pytest.raises(ConfigError, match=r"begun with another model: .*model has changed since"):
        keep_inputs(tmp_path, {"a": first}, [model])


def test_a_config_that_was_changed_is_refused(tmp_path):
    """Rounds of one series could be pruned at two rates, which no table would say."""
    keep_inputs(tmp_path, {}, config={"prune.rate": 0.2, "out": "here", "scaling.num_workers": 1})
    keep_inputs(tmp_path, {}, config={"prune.rate": 0.2, "out": "there", "scaling.num_workers": 2, "new.key": 1})
    with pytest.raises(ConfigError, match=r"was changed since: it says prune\.rate 0\.5, and it was 0\.2"):
        keep_inputs(tmp_path, {}, config={"prune.rate": 0.5})


def test_damage_is_named(tmp_path):
    keep_inputs(tmp_path, {"a": {}})
    (tmp_path / INPUTS).write_text((tmp_path / INPUTS).read_text().replace("models", "modelz"))
    with pytest.raises(FolderError, match=f"{INPUTS} is damaged"):
        keep_inputs(tmp_path, {})
