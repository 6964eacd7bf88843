"""What only a GPU can show: precision, the skipped step without a look from the host, compilation, resuming."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from mamba.models.model import mamba_tiny, named_model
from mamba.ops.scan import selective_scan
from mamba.runs import checkpoint as ckpt
from mamba.train.compilation import COMPILE_FROM_IMAGES, compile_blocks
from mamba.train.distributed import local_process
from mamba.train.record import RecordedStep
from mamba.train.trainer import Trainer, initial_model
from tests.conftest import make_small_config

pytestmark = pytest.mark.gpu

PLAIN = {"optim__cuda_graph": False, "optim__compile": False}
RECORDED = {"optim__cuda_graph": True, "optim__compile": False}
FAST = {
    "recorded": RECORDED,
    "in parts": {**RECORDED, "optim__accumulate": 2},
    "compiled": {"optim__compile": True, "optim__cuda_graph": False},
    "both": {"optim__compile": True, "optim__cuda_graph": True},
}


@pytest.mark.parametrize("amp", ["auto", "bf16", "fp16", "off"])
def test_learns_in_every_precision(small_fit, amp):
    result = small_fit(optim__amp=amp, optim__epochs=12)
    expected = {"auto": "bfloat16", "bf16": "bfloat16", "fp16": "float16", "off": "off"}[amp]
    assert result["amp"] == expected
    assert result["metrics"]["test/accuracy"] > 90


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_a_loss_that_is_not_finite_skips_the_step(small_config, small_data, tmp_path, amp):
    trainer = Trainer(small_config(optim__amp=amp), local_process(), tmp_path, small_data)
    images, targets = torch.randn(16, 3, 8, 8, device="cuda"), torch.full((16, 3), 1 / 3, device="cuda")
    trainer.model.train()
    for _ in range(8):  # fp16's loss scale settles
        trainer.train_step([(images, targets)])
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.optimizer_step.skipped.zero_()
    trainer.train_step([(images * float("nan"), targets)])
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert trainer.optimizer_step.skipped.tolist() == [1, 1]
    trainer.train_step([(images, targets)])
    assert trainer.optimizer_step.skipped[1].item() == 0
    assert not torch.equal(trainer.model.head.weight, before["head.weight"])


def steps_of(monkeypatch):
    """The optimizer steps that runs take from now on, by number."""
    taken, original = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, b: taken.append(self.global_step) or original(self, b))
    return taken


def last_weights(folder):
    return load_file(ckpt.newest_checkpoint(folder) / "model.safetensors")


@pytest.mark.parametrize(
    "settings, rtol, atol",
    [
        (PLAIN, 1e-2, 1e-3),
        (RECORDED | {"optim__amp": "off"}, 1e-4, 1e-5),
        (RECORDED | {"optim__amp": "off", "optim__optimizer": "muon"}, 2e-2, 2e-3),
    ],
)
def test_resumes(small_fit, tmp_path, monkeypatch, settings, rtol, atol):
    """Close, not bit-equal: some of CUDA's sums are in no fixed order. Drop path draws the same in a recorded step as
    in a plain one, and goes on where the checkpoint was."""
    (tmp_path / "whole").mkdir()
    small_fit("whole", **settings)
    small_fit("run", **settings, checkpoint__keep=3)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    checkpoints[-1].rename(tmp_path / "removed")
    taken = steps_of(monkeypatch)
    small_fit("run", **settings, checkpoint__keep=3)
    assert taken == [8, 9, 10, 11]
    a, b = last_weights(tmp_path / "whole"), last_weights(tmp_path / "run")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol)


def test_fast_runs_follow_the_plain_one(small_fit, tmp_path, monkeypatch):
    """The same losses and weights, recorded, compiled or both; mixing and augmentation are on. The plain run learns, so
    that one which hardly trained would be far from it."""
    recordings, record = [], RecordedStep._capture
    monkeypatch.setattr(RecordedStep, "_capture", lambda self, graph: recordings.append(record(self, graph)))
    settings = {"optim__amp": "off", "optim__lr": 2e-2, "model__drop_path": 0, "data__augment": "basic"}
    curves, found = {}, {}
    for name, values in {"plain": PLAIN, **FAST}.items():
        (tmp_path / name).mkdir()
        recordings.clear()
        result = small_fit(name, **settings, data__mixup=0.8, **values)
        assert result["recorded"] == (len(recordings) == 1) == values["optim__cuda_graph"], name
        assert result["compiled"] == values["optim__compile"], name
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        curves[name] = [json.loads(line)[key] for line in lines for key in ("train/loss", "val/loss")]
        found[name] = torch.cat([w.flatten() for w in last_weights(tmp_path / name).values()])
    assert curves["plain"][-1] < 0.5, "a validation loss of 1.1 is chance"
    torch.manual_seed(0)
    start = initial_model(make_small_config(tmp_path, **settings), tmp_path, 3, 8, local_process())
    way = (found["plain"] - torch.cat([w.flatten() for w in start.state_dict().values()])).norm()
    for name in FAST:
        assert curves[name] == pytest.approx(curves["plain"], rel=2e-3), name
        assert (found[name] - found["plain"]).norm() < 0.05 * way, name


def test_a_recorded_step_skips_what_is_not_finite(small_config, small_data, tmp_path):
    trainer = Trainer(small_config(optim__cuda_graph=True), local_process(), tmp_path, small_data)
    images, targets = torch.randn(16, 3, 8, 8, device="cuda"), torch.full((16, 3), 1 / 3, device="cuda")
    trainer.model.train()
    for _ in range(6):
        trainer.train_step([(images, targets)])
    assert trainer.optimizer_step.recorded.graph is not None
    before = copy.deepcopy(trainer.model.state_dict())
    average = copy.deepcopy(trainer.ema.model.state_dict())
    trainer.train_step([(images * float("nan"), targets)])
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert all(torch.equal(v, average[k]) for k, v in trainer.ema.model.state_dict().items())
    assert trainer.optimizer_step.skipped.tolist() == [1, 1] and trainer.ema.updates.item() == 6
    trainer.train_step([(images, targets)])
    assert trainer.optimizer_step.skipped.tolist() == [1, 0]
    assert not torch.equal(trainer.model.head.weight, before["head.weight"])


def test_model_on_the_gpu_equals_the_model_on_the_cpu():
    torch.manual_seed(0)
    model = mamba_tiny(img_size=16, d_model=32, depth=3)
    images = torch.randn(4, 3, 16, 16)
    expected = model(images)
    torch.testing.assert_close(model.cuda()(images.cuda()).cpu(), expected, rtol=1e-3, atol=1e-4)


def test_auto_backend_runs_without_a_copy_of_the_inputs():
    """Peak memory of a forward pass over channels-last inputs: the output, not another set of inputs."""
    x = torch.randn(64, 64, 256, device="cuda", dtype=torch.bfloat16)
    B = torch.randn(64, 64, 16, device="cuda", dtype=torch.bfloat16)
    A = -torch.rand(256, 16, device="cuda")
    with torch.no_grad():
        selective_scan(x.transpose(1, 2), x.transpose(1, 2), A, B.transpose(1, 2), B.transpose(1, 2))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = selective_scan(x.transpose(1, 2), x.transpose(1, 2), A, B.transpose(1, 2), B.transpose(1, 2))
        assert isinstance(out, torch.Tensor)
        extra = torch.cuda.max_memory_allocated() - before
    assert extra < 2.5 * x.numel() * x.element_size()


FAMILY = [
    {"mixer": "bidirectional", "stem": "conv"},
    {"stem": "cct", "head": "attention"},
    {"mixer": "cross", "layer_shuffle": 0.5},
    {"mixer": "bidirectional_shared", "class_token": "middle", "pos_embed": "both"},
    {"mixer": "multiscale", "scan_order": "snake"},
    {"name": "vim_tiny"},
]


@pytest.mark.parametrize("options", FAMILY)
@pytest.mark.parametrize("compiled", [False, True])
def test_every_kind_of_model_on_the_gpu_equals_it_on_the_cpu(options, compiled):
    """Logits and gradients, in float32 against float64, and logits in bfloat16 roughly."""
    torch.manual_seed(0)
    model = named_model(options.get("name", "mamba_tiny"), 10, 32, depth=2, d_model=64,
                        **{k: v for k, v in options.items() if k != "name"}).eval()  # fmt: skip
    x = torch.randn(4, 3, 32, 32)
    exact, device = copy.deepcopy(model).double(), copy.deepcopy(model).cuda()
    if compiled:
        compile_blocks(device)
    expected, got = exact(x.double()), device(x.cuda())
    torch.testing.assert_close(got.double().cpu(), expected, rtol=1e-3, atol=1e-4)
    expected.square().sum().backward()
    got.square().sum().backward()
    for (name, a), (_, b) in zip(exact.named_parameters(), device.named_parameters(), strict=True):
        error = (b.grad.double().cpu() - a.grad).norm() / a.grad.norm().clamp_min(1e-9)
        assert error < 2e-3, name
    with torch.autocast("cuda", dtype=torch.bfloat16), torch.no_grad():
        assert (device(x.cuda()).double().cpu() - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("options", FAMILY)
def test_every_kind_of_model_is_recorded(small_fit, tmp_path, options):
    values = {f"model__{key}": value for key, value in options.items()} | {"optim__lr": 2e-2}
    plain, recorded = (small_fit(n, **values, **more) for n, more in (("plain", PLAIN), ("fast", RECORDED)))
    assert recorded["recorded"] and not plain["recorded"]
    assert plain["metrics"]["val/loss"] < 0.8, "it learned"
    assert abs(plain["metrics"]["val/loss"] - recorded["metrics"]["val/loss"]) < 0.1


def test_a_run_is_recorded_unless_told_otherwise_and_compiled_if_long(small_config, small_data, tmp_path):
    trainer = Trainer(small_config(), local_process(), tmp_path / "short", small_data)
    assert trainer.optimizer_step.recorded is not None and not trainer.compiled
    epochs = -(-COMPILE_FROM_IMAGES // len(small_data.train))
    trainer = Trainer(small_config(optim__epochs=epochs), local_process(), tmp_path / "long", small_data)
    assert trainer.compiled
    trainer = Trainer(small_config(optim__amp="fp16"), local_process(), tmp_path / "fp16", small_data)
    assert trainer.optimizer_step.recorded is None
