"""The fused optimizer step against torch's AdamW, clipping and the plain average; also in Triton's interpreter."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mamba.config.schema import OptimConfig
from mamba.models.model import mamba_tiny
from mamba.train.ema import ModelEma
from mamba.train.optim import make_optimizer

ROOT = Path(__file__).parents[2]


def compare(device: str, optimizer: str = "adamw") -> None:
    """Six steps, the third not finite, one parameter frozen and one without a gradient."""
    config = OptimConfig(optimizer=optimizer, layer_decay=0.8, weight_decay=0.3, lr=0.02)  # type: ignore[arg-type]
    from mamba.ops.update.triton import FusedUpdate

    torch.manual_seed(0)
    plain = mamba_tiny(img_size=8, patch_size=4, d_model=24, depth=2).to(device)
    plain.blocks[0].ssm.D.requires_grad_(False)
    fused = copy.deepcopy(plain)
    emas = [ModelEma(m, 0.9) for m in (plain, fused)]
    optimizers = [make_optimizer(m, config) for m in (plain, fused)]
    update = FusedUpdate(optimizers[1], emas[1], clip=0.5)
    for step in range(6):
        for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
            a.grad = torch.randn_like(a) * 10 ** -(step % 3)
            b.grad = a.grad.clone()
        plain.head.bias.grad = fused.head.bias.grad = None
        plain.blocks[0].ssm.D.grad = fused.blocks[0].ssm.D.grad = None
        plain.blocks[1].ssm.delta_bias += 0.1
        fused.blocks[1].ssm.delta_bias += 0.1
        finite = torch.tensor(step != 2, device=device)
        rate = config.lr / (step + 1)

        norm = update.norm()
        update.apply(torch.tensor(rate, device=device), norm, finite)
        want = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        torch.testing.assert_close(norm, want, rtol=1e-5, atol=0)
        for group in optimizers[0].param_groups:
            group["lr"] = rate * group["lr_scale"]
        optimizers[0].found_inf = (~finite).float()
        optimizers[0].step()
        emas[0].update(finite)

        for a, b in ((plain, fused), (emas[0].model, emas[1].model)):
            for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
                torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert emas[0].updates == emas[1].updates
    states = [o.state_dict()["state"] for o in optimizers]
    for key, mine in states[0].items():
        for name, value in mine.items():
            torch.testing.assert_close(value, states[1][key][name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter(optimizer):
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    code = f"import tests.ops.test_update as t; t.compare('cpu', '{optimizer}')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_on_the_gpu(optimizer):
    compare("cuda", optimizer)
