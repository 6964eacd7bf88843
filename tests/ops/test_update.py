"""The fused optimizer step against torch's AdamW, clipping and the plain average; also in Triton's interpreter."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from mamba.config.schema import OptimConfig
from mamba.models.model import mamba_tiny
from mamba.ops.update import make_update
from mamba.train.ema import ModelEma
from mamba.train.optim import make_optimizer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.AdamW([{"params": p[:1], "betas": (0.5, 0.9)}, {"params": p[1:]}], lr=0.1),
    ],
)
def test_an_optimizer_of_another_kind_takes_its_own_step(make):
    """It trained as AdamW on a GPU; and a step that is not finite moved it on every device."""
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = make(weights)
    with pytest.raises(TypeError, match="has no fused update"):
        make_update(optimizer, None, None, fused=True)
    update = make_update(optimizer, None, None, fused=False)
    for finite in (True, False):
        for weight in weights:
            weight.grad = torch.full_like(weight, 1.0 if finite else torch.nan)
        before = [weight.detach().clone() for weight in weights]
        update.apply(torch.tensor(0.1), update.norm(), torch.tensor(finite))
        assert all(torch.equal(a, b) != finite for a, b in zip(weights, before, strict=True))


def compare(device: str, optimizer: str = "adamw") -> None:
    """Six steps, the third not finite, one parameter frozen and one without a gradient."""
    config = OptimConfig(optimizer=optimizer, layer_decay=0.8, weight_decay=0.3, lr=0.02)  # type: ignore[arg-type]
    torch.manual_seed(0)
    plain = mamba_tiny(img_size=8, patch_size=4, d_model=24, depth=2).to(device)
    plain.blocks[0].ssm.D.requires_grad_(False)
    fused = copy.deepcopy(plain)
    emas = [ModelEma(m, 0.9) for m in (plain, fused)]
    optimizers = [make_optimizer(m, config) for m in (plain, fused)]
    reference, update = (make_update(optimizers[i], emas[i], 0.5, fused=bool(i)) for i in (0, 1))
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

        norm, want = update.norm(), reference.norm()
        torch.testing.assert_close(norm, want, rtol=1e-5, atol=0)
        for group in optimizers[0].param_groups:
            group["lr"] = rate * group["lr_scale"]
        update.apply(torch.tensor(rate, device=device), norm, finite)
        reference.apply(torch.tensor(rate, device=device), want, finite)

        for a, b in ((plain, fused), (emas[0].model, emas[1].model)):
            for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
                torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert emas[0].updates == emas[1].updates
    states = [o.state_dict()["state"] for o in optimizers]
    for key, mine in states[0].items():
        for name, value in mine.items():
            torch.testing.assert_close(value, states[1][key][name], rtol=2e-5, atol=2e-6)


def test_the_reference_is_torchs():
    """Clipping, AdamW and the average, against torch's own calls on another copy."""
    torch.manual_seed(0)
    models = [mamba_tiny(img_size=8, patch_size=4, d_model=12, depth=1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    emas = [ModelEma(m, 0.9) for m in models]
    optimizers = [make_optimizer(m, OptimConfig(lr=0.01)) for m in models]
    update = make_update(optimizers[0], emas[0], 0.5, fused=False)
    for step in range(3):
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            a.grad = torch.full_like(a, float("nan")) if step == 1 else torch.randn_like(a)
            b.grad = a.grad.clone()
        norm = update.norm()
        update.apply(torch.tensor(0.01), norm, norm.isfinite())
        if step != 1:
            torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(models[1].parameters(), 0.5))
            optimizers[1].step()
            emas[1].update()
    for a, b in ((models[0], models[1]), (emas[0].model, emas[1].model)):
        torch.testing.assert_close(list(a.parameters()), list(b.parameters()))
    assert emas[0].updates == 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter(in_the_interpreter, optimizer):
    in_the_interpreter(f"import tests.ops.test_update as t; t.compare('cpu', '{optimizer}')")


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_on_the_gpu(optimizer):
    compare("cuda", optimizer)
