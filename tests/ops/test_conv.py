"""The fused convolution: against its plain form, on a GPU and, without one, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from mamba.ops.conv import HAS_TRITON, causal_conv_silu, causal_conv_silu_reference

SHAPES = [(2, 64, 96, 4), (3, 5, 7, 4), (1, 1, 1, 1), (2, 70, 33, 3), (2, 3, 64, 5), (1, 130, 130, 2)]
"""batch, length, channels, taps"""
FEWER_TILES = [(2, 20, 96, 4), (3, 5, 7, 4), (1, 1, 1, 1), (2, 22, 33, 3), (2, 3, 64, 5), (1, 34, 130, 2)]
"""The same for the interpreter: one to three tiles of 16 tokens, and of 64 channels, the last of them full or not."""
SCRIPT = """
import tests.ops.test_conv as t
for shape in t.FEWER_TILES:
    for reverse in (False, True):
        t.compare(shape, "cpu", t.torch.float32, 1e-5, t.fused(), reverse)
import mamba.ops.conv.triton as kernels
enough, kernels.ENOUGH_PROGRAMS = kernels.ENOUGH_PROGRAMS, 1
for shape in [(9, 17, 7, 4), (3, 16, 64, 3)]:  # several batch entries a program, and a last program that is not full
    t.compare(shape, "cpu", t.torch.float32, 1e-5, t.fused(), False)
kernels.ENOUGH_PROGRAMS = enough
"""


def fused():
    from mamba.ops.conv.triton import causal_conv_silu_triton

    return causal_conv_silu_triton


def results(conv, x, weight, bias, grad, reverse):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    half = leaves[0][..., : weight.shape[0]]  # a view with strides of its own, as the mixer's x is
    out = conv(half, leaves[1], leaves[2], reverse)
    return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def compare(shape, device, dtype, tolerance, conv, reverse):
    batch, length, channels, taps = shape
    g = torch.Generator().manual_seed(0)

    def rand(*size):
        return torch.randn(*size, generator=g)

    x, grad = rand(batch, length, 2 * channels).to(dtype), rand(batch, length, channels).to(dtype)
    weight, bias = rand(channels, 1, taps), rand(2 * channels)[::2]
    given = (x, weight, bias, grad)
    want = results(causal_conv_silu_reference, *(t.double() for t in given), reverse)
    got = results(conv, *(t.to(device) for t in given), reverse)
    assert got[0].dtype == dtype and got[2].dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        error = (a.double().cpu() - b).norm() / b.norm().clamp_min(1e-12)
        assert error < tolerance, (shape, float(error))


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_kernels_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(SCRIPT)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("shape", [*SHAPES, (16, 64, 384, 4), (101, 64, 384, 4)])
@pytest.mark.parametrize("reverse", [False, True])
def test_kernels_on_the_gpu(shape, dtype, tolerance, reverse):
    compare(shape, "cuda", dtype, tolerance, causal_conv_silu, reverse)


@pytest.mark.gpu
def test_operator_contract():
    fused()  # the operator is registered by its module
    x = torch.randn(2, 9, 12, device="cuda", requires_grad=True)
    weight, bias = torch.randn(12, 1, 4, device="cuda", requires_grad=True), torch.zeros(12, device="cuda")
    torch.library.opcheck(torch.ops.mamba_forge.causal_conv_silu, (x, weight, bias.requires_grad_(), True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_form_keeps_the_type_and_the_past(dtype):
    """No output sees a later token."""
    x, weight, bias = torch.randn(1, 8, 3).to(dtype), torch.randn(3, 1, 4), torch.randn(3)
    out = causal_conv_silu(x, weight, bias)
    assert out.dtype == dtype
    x[:, 5:] = 9
    assert torch.equal(out[:, :5], causal_conv_silu(x, weight, bias)[:, :5])


def test_reversed_is_flipped():
    x, weight, bias = torch.randn(2, 9, 3), torch.randn(3, 1, 4), torch.randn(3)
    expected = causal_conv_silu(x.flip(1), weight, bias).flip(1)
    torch.testing.assert_close(causal_conv_silu(x, weight, bias, reverse=True), expected)
