"""Models that our own pruning wrote: predict.py is as often right as the training said, and every format agrees."""

from __future__ import annotations

import csv
import json
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import mamba
from mamba.models.model import Architecture, MambaModel, count_parameters
from mamba.train.distributed import local_process
from mamba.train.trainer import fit
from pruning import measure
from pruning.plans import apply_plan
from pruning.rounds import Engine, hooks_for, run_rounds
from pruning.store import load_smaller, of_cut, save_pruned
from ray_jobs.export import main as export
from ray_jobs.predict import main as predict
from tests.conftest import make_small_config


def write_labelled(root, images, classes):
    """An `ImageSet` as a folder whose folders are classes."""
    for i, row in enumerate(images.index):
        folder = root / classes[int(images.labels[i])]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.images[row]).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, small_data):
    return write_labelled(tmp_path_factory.mktemp("labelled"), small_data.test, small_data.classes)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, small_data):
    """(folder of a pruned model, its test accuracy) by how it was pruned."""
    out = tmp_path_factory.mktemp("runs")
    small = partial(make_small_config, out, optim__epochs=2, model__drop_path=0.0)

    def train(config, folder):
        folder.mkdir(parents=True, exist_ok=True)
        return fit(config, local_process(), folder, small_data, hooks_for(config))

    def measured(config, path):
        smaller, _ = load_smaller(path)
        accuracy = measure.accuracy(smaller.model, small_data, small_data.val)
        return {**measure.size(smaller.model), "val/accuracy": accuracy}

    dense = out / "dense" / "one"
    train(small(name="dense", trial="one"), dense)
    made = {}
    for method in ("magnitude", "refill", "rsst"):
        config = small(name=method, model__checkpoint=dense, prune__method=method, prune__rate=0.5, prune__rounds=1)
        folder = out / method
        folder.mkdir()
        rows = run_rounds(config, folder, small_data, Engine(train, measured, lambda text: None))
        made[f"{method}, a round's run"] = (folder / "round-01", rows[-1]["test_accuracy"])
        made[f"{method}, what it kept"] = (folder / "round-01" / "pruned", rows[-1]["test_accuracy"])
    model, description = mamba.load_model(dense)
    for plan in ("stage1", "stage2"):
        found = apply_plan(model, plan)
        folder = out / plan
        save_pruned(folder / "checkpoints" / "best-00000", found.model, found.masks, of_cut(description))
        made[plan] = (folder, measure.accuracy(found.model, small_data, small_data.test))
        tuned = train(small(name="tuned", trial=plan, model__checkpoint=folder).resolve(), out / "tuned" / plan)
        made[f"{plan}, fine-tuned"] = (out / "tuned" / plan, tuned["metrics"]["test/accuracy"])
    return made


DENSE = 6675
"""Parameters of the model that is pruned."""
KINDS = [f"{m}, {what}" for m in ("magnitude", "refill", "rsst") for what in ("a round's run", "what it kept")]
KINDS += [f"{plan}{tuned}" for plan in ("stage1", "stage2") for tuned in ("", ", fine-tuned")]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_as_often_right_as_was_measured(pruned, labelled, tmp_path, kind, capsys):
    folder, accuracy = pruned[kind]
    out = tmp_path / "p.csv"
    assert predict([str(folder), str(labelled), "--out", str(out), "--device", "cpu"]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["accuracy"] == pytest.approx(accuracy)
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30 and f"{accuracy:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_alone_make_the_smaller_model_again(pruned, tmp_path, kind):
    folder, _ = pruned[kind]
    path = tmp_path / "m.safetensors"
    assert export([str(folder), "--format", "safetensors", "--out", str(path)]) == 0
    with safe_open(path, "pt") as file:
        about = file.metadata()
        model = MambaModel(Architecture.from_dict(json.loads(about["architecture"]))).eval()
    model.load_state_dict(load_file(path))
    dense, images = mamba.load(folder, device="cpu"), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(images), dense.model(images))
    assert json.loads(about["classes"]) == list(dense.classes) == ["dark", "grey", "bright"]
    smaller = not kind.startswith(("magnitude", "stage1"))
    assert smaller == (count_parameters(model) < 0.9 * DENSE), "units that are gone are not exported"


@pytest.mark.parametrize("form", ["torch_export", pytest.param("onnx", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["refill, a round's run", pytest.param("stage2", marks=pytest.mark.long)])
def test_it_runs_elsewhere_as_here(pruned, labelled, tmp_path, kind, form):
    """One uneven model runs in ONNX Runtime in the short suite too: test_export.py."""
    folder, _ = pruned[kind]
    path = tmp_path / "model"
    if form == "onnx":
        ort = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    assert export([str(folder), "--format", form, "--out", str(path)]) == 0
    ours = mamba.load(folder, device="cpu")
    images = ours.transform(sorted(labelled.rglob("*.png")))
    with torch.no_grad():
        want = ours.model(images)
    if form == "onnx":
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        got = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    else:
        got = torch.export.load(path).module()(images)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
