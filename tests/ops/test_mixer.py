"""What a mixer does between its projections as one operator: against its plain form, and where a model uses it."""

from __future__ import annotations

import pytest
import torch

import mamba.models.ssm as ssm
from mamba.models.ssm import BlockShape, SelectiveSSM
from mamba.ops.conv import HAS_TRITON
from mamba.ops.mixer import mixer_reference

SHAPES = [(2, 20, 40, 16, 4), (3, 5, 7, 3, 4), (1, 33, 32, 16, 3)]
"""batch, length, d_inner, d_state, taps"""
SCRIPT = """
import tests.ops.test_mixer as t
from mamba.ops.mixer.triton import mixer_triton
t.compare((1, 18, 33, 2, 4), "cpu", t.torch.float32, 1e-5, mixer_triton)  # two chunks of tokens, two blocks of channels
from mamba.ops.mixer import conv
enough, conv.ENOUGH_PROGRAMS = conv.ENOUGH_PROGRAMS, 1  # several batch entries a program, the last one not full
t.compare((3, 5, 7, 1, 2), "cpu", t.torch.float32, 1e-5, mixer_triton)
conv.ENOUGH_PROGRAMS = enough
t.compare_reversed(conv)
"""


def results(mixer, given, grad):
    leaves = [t.detach().clone().requires_grad_() for t in given]
    y = mixer(*leaves)
    return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def compare(shape, device, dtype, tolerance, mixer):
    batch, length, d_inner, d_state, taps = shape
    g = torch.Generator().manual_seed(0)

    def rand(*size):
        return torch.randn(*size, generator=g)

    xz = rand(batch, length, 2 * d_inner).to(dtype)
    project = (rand(2 * d_state + d_inner, d_inner) / d_inner**0.5).to(dtype)
    A = -8 * torch.rand(d_inner, d_state, generator=g)
    given = (xz, rand(d_inner, 1, taps), rand(d_inner), project, A, rand(d_inner), rand(d_inner) - 3)
    grad = rand(batch, length, d_inner).to(dtype)
    want = results(mixer_reference, [t.double() for t in given], grad)
    got = results(mixer, [t.to(device) for t in given], grad.to(device))
    for a, b, like in zip(got, want, (xz, *given), strict=True):
        assert a.shape == b.shape and a.dtype == like.dtype
        error = (a.double().cpu() - b).norm() / b.norm()
        assert error < tolerance, (shape, float(error))


def compare_reversed(conv):
    """The convolution alone, which a mixer of one scan never reverses."""
    from mamba.ops.conv import causal_conv_silu_reference

    x, weight, bias, grad = (torch.randn(*s) for s in ((2, 19, 10), (10, 1, 4), (10,), (2, 19, 10)))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    want = torch.autograd.grad(causal_conv_silu_reference(*leaves, True), leaves, grad)
    with torch.no_grad():
        dx = torch.empty(2, 19, 10)
        got = (dx, *conv.launch_backward(grad, x, weight, bias, True, dx))
        y = conv.launch_forward(x, weight, bias, True)
    torch.testing.assert_close(y, causal_conv_silu_reference(x, weight, bias, True))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_kernels_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(SCRIPT)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("shape", [*SHAPES, (9, 225, 256, 16, 4), (101, 64, 384, 16, 4)])
def test_kernels_on_the_gpu(shape, dtype, tolerance):
    from mamba.ops.mixer.triton import mixer_triton

    compare(shape, "cuda", dtype, tolerance, mixer_triton)


@pytest.mark.gpu
def test_operator_contract():
    import mamba.ops.mixer.triton  # noqa: F401 (registers the operator)

    given = (torch.randn(2, 20, 24), torch.randn(12, 1, 4), torch.randn(12), torch.randn(20, 12),
             -torch.rand(12, 4), torch.randn(12), torch.randn(12))  # fmt: skip
    leaves = tuple(t.cuda().requires_grad_() for t in given)
    torch.library.opcheck(torch.ops.mamba_forge.mixer, (*leaves, True))


@pytest.fixture
def served(monkeypatch):
    """Every tensor is served, by the plain form; how often."""
    calls = []
    monkeypatch.setattr(ssm, "serves", lambda xz: True)
    monkeypatch.setattr(ssm, "mixer", lambda *given: calls.append(1) or mixer_reference(*given))
    return calls


def test_a_plain_mixer_is_one_operator(served, monkeypatch):
    torch.manual_seed(0)
    mixer = SelectiveSSM(12, BlockShape(16, 4, 3, 0)).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    whole = mixer(x)
    assert served == [1]
    monkeypatch.setattr(ssm, "serves", lambda xz: False)
    torch.testing.assert_close(whole, mixer(x))
    assert served == [1]


@pytest.mark.parametrize(
    "more", [{"mixer": "bidirectional"}, {"mixer": "multiscale"}, {"dt_rank": 2}, {"shared_bc": True},
             {"separable_conv": True}],
)  # fmt: skip
def test_other_mixers_are_made_of_parts(served, more):
    SelectiveSSM(12, BlockShape(16, 4, 3, 0, **more))(torch.randn(2, 9, 12))
    assert served == []


@pytest.mark.parametrize("layer", ["conv1d", "x_proj"])
def test_who_watches_a_layer_inside_sees_it(served, layer):
    mixer, seen = SelectiveSSM(12, BlockShape(16, 4, 3, 0)), []
    handle = getattr(mixer, layer).register_forward_pre_hook(lambda *_: seen.append(layer))
    mixer(torch.randn(2, 9, 12))
    assert seen == [layer] and served == []
    handle.remove()
    mixer(torch.randn(2, 9, 12))
    assert served == [1]
