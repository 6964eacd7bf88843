"""Each kind of model in each format gives our logits, for any batch size."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch

import mamba
from mamba.errors import ConfigError
from mamba.ops.scan import bidirectional_scan, scans_by, selective_scan
from mamba.predict import export as exporting
from mamba.predict.export import FORMATS, export
from mamba.predict.onnx import require_onnx, scan_for_onnx
from mamba.predict.predictor import Predictor
from ray_jobs.export import main
from tests.predict.conftest import checkpoint
from tests.pruning.small_models import FAMILY, PLAIN, build

UNEVEN = (
    PLAIN,
    replace(PLAIN, d_inner=7, d_state=3, mlp_hidden=5, out_channels=6),
    replace(PLAIN, d_inner=9, d_conv=2),
)
KINDS = {**FAMILY, "uneven": lambda: build(*UNEVEN)}


def predictor_of(model, run):
    description = mamba.load_model(run)[1]
    return Predictor(model.float(), description, "toy")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_runs_in_onnxruntime(kind, run, tmp_path):
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    found = export(predictor_of(KINDS[kind](), run), "onnx", tmp_path / "m.onnx")
    assert found.difference <= 1e-5


def test_an_uneven_model_runs_in_onnxruntime(run, tmp_path):
    ort, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    model = build(replace(UNEVEN[1], mixer="bidirectional"), class_token="middle")
    assert export(predictor_of(model, run), "onnx", tmp_path / "m.onnx").difference <= 1e-5
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(7, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), model(x))
    proto = onnx.load(tmp_path / "m.onnx")
    props = {p.key: p.value for p in proto.metadata_props}
    assert props["classes"] == '["dark", "grey", "bright"]' and props["fit"] == "crop"
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 18)]
    assert sum(node.op_type == "Scan" for node in proto.graph.node) == 2  # one for each direction


def test_the_form_of_the_scan():
    torch.manual_seed(0)
    u, delta, z = (torch.randn(2, 5, 9) for _ in range(3))
    B, C = (torch.randn(2, 4, 9) for _ in range(2))
    inputs = (u, delta, -torch.rand(5, 4), B, C, torch.randn(5), z, torch.randn(5))
    want = selective_scan(*inputs, delta_softplus=True, backend="reference")
    calls = []

    def counted(*arguments):
        calls.append(1)
        return scan_for_onnx(*arguments)

    with scans_by(counted):
        torch.testing.assert_close(selective_scan(*inputs, delta_softplus=True), want)
        both = bidirectional_scan(*((x, x) for x in inputs), delta_softplus=True)
    torch.testing.assert_close(both[0], want)
    assert len(calls) == 3


@pytest.mark.parametrize("form, ending", [("safetensors", "safetensors"), ("torch_export", "pt2")])
def test_other_formats(run, tmp_path, capsys, form, ending):
    out = tmp_path / "new" / f"m.{ending}"
    assert main([str(run), "--format", form, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert out.exists() and "logits differ from ours by at most 0.0e+00" in said
    times = re.findall(r"([\d.]+) ms \(([\d.]+) to ([\d.]+)\)", said)
    assert len(times) == 2 and all(float(low) <= float(mid) <= float(high) for mid, low, high in times)


def test_a_file_that_differs_is_removed(run, tmp_path, monkeypatch):
    written = exporting._written

    def wrong(*args):
        inner = written(*args)
        return lambda x: inner(x) + 1e-3

    monkeypatch.setattr(exporting, "_written", wrong)
    with pytest.raises(ConfigError, match="logits differ from ours by 1.0e-03, more than 1e-04"):
        export(mamba.load(run, device="cpu"), "safetensors", tmp_path / "new" / "m.safetensors")
    assert not list((tmp_path / "new").iterdir())


def test_what_is_there_already_stays(run, tmp_path):
    """Weights of another run, a table, a run's own config.yaml were written over without a word."""
    mine = tmp_path / "mine.safetensors"
    mine.write_text("what was there")
    with pytest.raises(ConfigError, match=f"--out {mine} is there already; remove it, or choose another place"):
        export(mamba.load(run, device="cpu"), "safetensors", mine)
    assert mine.read_text() == "what was there" and not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("form", ["safetensors", "torch_export"])
def test_a_place_that_cannot_be_written_to_is_a_sentence(run, tmp_path, capsys, form):
    for place, told in ((tmp_path, "Is a directory"), ("/proc/no/m", "No such file"), ("/proc/m", "No such file")):
        assert main([str(run), "--format", form, "--out", str(place)]) == 2
        assert f"error: --out {place} cannot be written: {told}" in capsys.readouterr().err


def test_a_disk_that_is_full_is_a_sentence(run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:778] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(ConfigError, match="m.pt2 cannot be written: .*failed writing"):
        export(mamba.load(run, device="cpu"), "torch_export", tmp_path / "m.pt2")
    assert not [file.name for file in tmp_path.iterdir() if "m.pt2" in file.name]


def test_without_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"needs onnx, which is not installed: pip install"):
        require_onnx()
    assert main([str(checkpoint(tmp_path / "run")), "--out", str(tmp_path / "m.onnx")]) == 2
    assert not (tmp_path / "m.onnx").exists()


def test_the_command_offers_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["RUN", "--format", "none"])
    offered = capsys.readouterr().err.partition("choose from ")[2]
    assert re.findall(r"\w+", offered) == list(FORMATS)
