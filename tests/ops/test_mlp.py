"""The MLP with GELU inside the products: against its plain form, and where a model uses it."""

from __future__ import annotations

import pytest
import torch

import mamba.models.block as block
from mamba.errors import ConfigError
from mamba.models.block import Mlp
from mamba.ops.candidates import VARIABLE, named
from mamba.ops.conv import HAS_TRITON
from mamba.ops.mlp import mlp_reference

SHAPES = [((2, 9, 24), 40), ((37, 16), 64), ((3, 5, 48), 7)]
"""x, hidden units"""
SCRIPT = """
import tests.ops.test_mlp as t
import mamba.ops.mlp.triton as kernels
before = dict(kernels.FORWARD), dict(kernels.BACKWARD)
kernels.FORWARD.update(TOKENS=16, HIDDEN=32, DEPTH=16)  # several tiles, the last ones not full
kernels.BACKWARD.update(TOKENS=32, HIDDEN=16, DEPTH=32)
for shape, hidden in t.SHAPES:
    t.compare(shape, hidden, "cpu", t.torch.float32, 1e-5, kernels.mlp_triton)
kernels.FORWARD.update(before[0]), kernels.BACKWARD.update(before[1])
"""


def results(mlp, given, grad):
    leaves = [t.detach().clone().requires_grad_() for t in given]
    y = mlp(*leaves)
    return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def compare(shape, hidden, device, dtype, tolerance, mlp):
    g, channels = torch.Generator().manual_seed(0), shape[-1]

    def rand(*size):
        return torch.randn(*size, generator=g)

    x, up, down = 2 * rand(*shape), 2 * rand(hidden, channels) / channels**0.5, rand(channels, hidden) / hidden**0.5
    given = (x.to(dtype), up.to(dtype), rand(hidden), down.to(dtype), rand(channels))
    grad = rand(*shape).to(dtype)
    want = results(mlp_reference, [t.double() for t in given], grad)
    got = results(mlp, [t.to(device) for t in given], grad.to(device))
    for a, b, like in zip(got, want, (x.to(dtype), *given), strict=True):
        assert a.shape == b.shape and a.dtype == like.dtype
        error = (a.double().cpu() - b).norm() / b.norm()
        assert error < tolerance, (shape, float(error))


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_kernels_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(SCRIPT)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("shape, hidden", [*SHAPES, ((9, 225, 128), 512), ((65, 64, 192), 768), ((11, 64, 192), 400)])
def test_kernels_on_the_gpu(shape, hidden, dtype, tolerance):
    from mamba.ops.mlp.triton import mlp_triton

    compare(shape, hidden, "cuda", dtype, tolerance, mlp_triton)


@pytest.mark.gpu
def test_operator_contract():
    import mamba.ops.mlp.triton  # noqa: F401 (registers the operator)

    given = [torch.randn(*s) for s in ((40, 16), (32, 16), (32,), (16, 32), (16,))]
    torch.library.opcheck(torch.ops.mamba_forge.mlp, tuple(t.cuda().requires_grad_() for t in given))


@pytest.mark.gpu
def test_under_autocast_a_model_follows_the_plain_one():
    """Both candidates, in every gradient of a block."""
    from mamba.models.block import MambaBlock
    from mamba.models.ssm import BlockShape
    from mamba.ops.candidates import ON

    torch.manual_seed(0)
    model, x = MambaBlock(64, BlockShape(128, 16, 4, 256)).cuda(), torch.randn(4, 50, 64, device="cuda")

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            y = model(x)
        return y, *torch.autograd.grad(y.float().square().mean(), list(model.parameters()))

    plain = run()
    ON.update(("mixer", "mlp"))
    try:
        fused = run()
    finally:
        ON.difference_update(("mixer", "mlp"))
    for (name, _), a, b in zip([("y", None), *model.named_parameters()], fused, plain, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm(), name


def test_who_watches_a_layer_inside_sees_it(monkeypatch):
    calls, seen = [], []
    monkeypatch.setattr(block, "mlp", lambda *given: calls.append(1) or mlp_reference(*given))
    module, x = Mlp(12, 20), torch.randn(2, 9, 12)
    whole = module(x)
    handle = module.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    torch.testing.assert_close(module(x), whole)
    assert seen == [(2, 9, 20)] and calls == [1]
    handle.remove()
    assert Mlp(12, 20, dropout=0.5)(x).shape == x.shape and calls == [1]


def test_an_unknown_candidate_is_refused():
    assert named("mixer, mlp") == {"mixer", "mlp"} and named("") == set()
    with pytest.raises(ConfigError, match=f"{VARIABLE}: unknown 'scan'; valid: mixer, mlp"):
        named("mixer,scan")
